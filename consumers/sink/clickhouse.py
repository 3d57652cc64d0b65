"""Stores records in ClickHouse: one insert per table and batch, by column."""

from collections.abc import Iterator

from millstream.consumers.sink.clickhouse_writer import ClickHouseWriter
from millstream.consumers.sink.encoded_spans import Broken, EncodedSpans
from millstream.consumers.sink.port import Batch, Unusable
from millstream.consumers.sink.rows import Inserter, Rows, RowsRefused, to_rows
from millstream.schemas.config.settings import Settings


class ClickHouseSink:
    """A `Sink`. A retried insert carries the same deduplication token; a record that comes again in another batch has
    the same sorting key, and ReplacingMergeTree keeps one of the two."""

    def __init__(self, writer: Inserter, marks_topic: str) -> None:
        """``marks_topic``: the events topic, see `to_rows`."""
        self._writer = writer
        self._marks_topic = marks_topic

    def write(self, batch: Batch) -> list[Unusable]:
        tables, unusable = to_rows(batch.records, self._marks_topic)
        refused = {
            place: (reason, error) for rows in tables for place, reason, error in self._insert(rows, batch.token)
        }
        if refused:
            records = {(*record.partition, record.offset): record for record in batch.records}
            unusable += [Unusable(records[place], *why) for place, why in refused.items()]
        return unusable

    def flush(self) -> None:
        """An insert is durable when it returns."""

    def close(self) -> None:
        self._writer.close()

    def _insert(self, rows: Rows | EncodedSpans, token: str) -> Iterator[Broken]:
        """Inserts the rows, and in halves if some are refused; yields place, reason and error of each row that can't be
        stored."""
        try:
            rows.insert(self._writer, token)
        except RowsRefused as error:
            # Each part has a token of its own, the same each time: a retry of the whole does not store it again.
            good, broken = rows.sift()
            if broken:
                yield from broken
                if good:
                    yield from self._insert(good, f"{token}=")
                return
            if len(rows) == 1:
                yield rows.place(0), "unstorable", str(error)
                return
            half = len(rows) // 2
            yield from self._insert(rows.cut(0, half), f"{token}<")
            yield from self._insert(rows.cut(half, len(rows)), f"{token}>")


def open_clickhouse_sink(settings: Settings) -> ClickHouseSink:
    """Connects, and brings the tables up to date. Raises `ConfigError`, `StoreError`."""
    writer = ClickHouseWriter(settings)
    try:
        writer.migrate()
    except BaseException:
        writer.close()
        raise
    return ClickHouseSink(writer, settings.topics.events)
