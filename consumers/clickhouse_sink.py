"""Records into ClickHouse: one insert per table and batch, by column."""

from collections.abc import Iterator, Sequence
from typing import Any, Protocol

from millstream.consumers.rows import Rows, Unusable, to_rows
from millstream.consumers.sink_port import Batch
from millstream.schemas.errors import StoreError


class RowsRefused(StoreError):
    """A row can't be what its table holds: sending it again can't help."""


class Inserter(Protocol):
    """Where the rows go; `pipeline.store.Store` is one."""

    def insert(self, table: str, column_names: Sequence[str], columns: Sequence[Sequence[Any]], token: str) -> None:
        """Stores the rows. A repeated ``token`` may be dropped. Raises `RowsRefused`, or `StoreError` if it may help to
        try again: some of the rows may be there by then."""

    def close(self) -> None: ...


class ClickHouseSink:
    """A `Sink`. An insert that is tried again carries the same deduplication token; what comes again in another batch
    has the same sorting key, and ReplacingMergeTree keeps one of the two."""

    def __init__(self, store: Inserter, marks_topic: str) -> None:
        """``marks_topic``: the events topic, see `to_rows`."""
        self._store = store
        self._marks_topic = marks_topic

    def write(self, batch: Batch) -> list[Unusable]:
        tables, unusable = to_rows(batch.records, self._marks_topic)
        refused = dict(found for rows in tables for found in self._insert(rows, batch.token))
        if refused:
            records = {(*record.partition, record.offset): record for record in batch.records}
            unusable += [Unusable(records[place], "unstorable", error) for place, error in refused.items()]
        return unusable

    def flush(self) -> None:
        """An insert is durable when it returns."""

    def close(self) -> None:
        self._store.close()

    def _insert(self, rows: Rows, token: str) -> Iterator[tuple[tuple[Any, ...], str]]:
        """Inserts, by halves where something is refused; yields the place of each row that can't be stored, and why."""
        try:
            self._store.insert(rows.table, rows.column_names, rows.columns, token)
        except RowsRefused as error:
            if len(rows) == 1:
                yield rows.place(0), str(error)
                return
            half = len(rows) // 2
            # Each part has a token of its own, the same each time: what is in stays in when the whole is repeated.
            yield from self._insert(rows.cut(0, half), f"{token}<")
            yield from self._insert(rows.cut(half, len(rows)), f"{token}>")
