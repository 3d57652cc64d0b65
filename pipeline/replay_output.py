"""Where a replay writes: a new topic, as the adapter would have written it, or a new folder of Parquet files."""

from collections.abc import Sequence
from pathlib import Path
from typing import Any, Protocol

import pyarrow as pa
import pyarrow.parquet as pq

from millstream.consumers.adapter.decision import without_triplets
from millstream.consumers.adapter.replay import Replayed
from millstream.consumers.log.port import Log
from millstream.consumers.sink.parquet import arrow_type
from millstream.schemas.config.settings import Settings
from millstream.schemas.errors import ConfigError, LogError
from millstream.schemas.wire import codec
from millstream.schemas.wire.log import KIND_HEADER, Partition
from millstream.schemas.wire.prefixes import expand
from millstream.schemas.wire.records import Record, RolloutEnd, Triplet
from millstream.schemas.wire.topics import Topic

ROOM = 1024  # for key and headers, beside a record's body
FLUSH_S = 60.0
GROUP_ROWS = 5000  # of a Parquet file, written at once


class Output(Protocol):
    """Takes rollouts one by one; complete only once ``close`` has returned."""

    def write(self, replayed: Replayed) -> None: ...

    def close(self) -> None: ...


async def open_output(to: str, log: Log, settings: Settings) -> Output:
    """A folder if ``to`` has a slash in it, else a topic. Raises `ConfigError` if it holds anything."""
    if "/" in to:
        return ParquetFolder(Path(to))
    topics = settings.topics
    if to in {topic.name for topic in topics.all}:
        raise ConfigError(f"--to {to}: that is one of the deployment's own topics; name a new one")
    await log.create_topics([Topic(to, topics.partitions, "delete", "rollout_id")])
    consumer = log.consumer()
    ends = await consumer.end_offsets([Partition(to, n) for n in range(topics.partitions)])
    await consumer.close()
    if any(ends.values()):
        raise ConfigError(f"--to {to}: the topic holds records already; name a new one, or a folder (with a slash)")
    return TopicOutput(log, to, settings.max_record_bytes)


class TopicOutput:
    """The partition of every record is that of its rollout's events, as on the triplets topic."""

    def __init__(self, log: Log, topic: str, max_record_bytes: int) -> None:
        self._producer = log.producer()
        self._topic = topic
        self._limit = max_record_bytes - ROOM
        self._failed: list[Exception] = []

    def write(self, replayed: Replayed) -> None:
        end, triplets = replayed.end, [codec.encode(triplet) for triplet in replayed.triplets]
        if (size := max(map(len, triplets), default=0)) > self._limit:
            end = without_triplets(end, f"too_large: a triplet of {size:,} bytes; replay it into a folder")
            triplets = []
        for triplet in triplets:
            self._send(replayed, triplet, b"triplet")
        self._send(replayed, codec.encode(end), b"end")

    def _send(self, replayed: Replayed, value: bytes, kind: bytes) -> None:
        key, headers = replayed.end.rollout_id, {KIND_HEADER: kind}
        self._producer.send(
            self._topic, value, key=key, partition=replayed.partition, headers=headers, on_ack=self._on_ack
        )

    def _on_ack(self, error: Exception | None, _offset: int) -> None:
        if error is not None:
            self._failed.append(error)

    def close(self) -> None:
        self._producer.close(FLUSH_S)
        if self._failed:
            raise LogError(f"{len(self._failed)} records could not be written to {self._topic}: {self._failed[0]}")


class ParquetFolder:
    """``triplets.parquet`` and ``ends.parquet``: a column for each field of the record. The files have their names
    only once they are complete."""

    def __init__(self, folder: Path) -> None:
        if folder.exists() and (not folder.is_dir() or any(folder.iterdir())):
            raise ConfigError(f"--to {folder}: there is something already; name a new folder")
        folder.mkdir(parents=True, exist_ok=True)
        self._triplets = _ParquetFile(folder / "triplets.parquet", Triplet)
        self._ends = _ParquetFile(folder / "ends.parquet", RolloutEnd)

    def write(self, replayed: Replayed) -> None:
        self._triplets.write(expand(replayed.triplets))
        self._ends.write([replayed.end])

    def close(self) -> None:
        self._triplets.close()
        self._ends.close()


class _ParquetFile:
    def __init__(self, path: Path, kind: type[Record]) -> None:
        self._path = path
        self._unfinished = path.with_name(f"_{path.name}")  # readers pass over what begins like that
        self._schema = pa.schema([*arrow_type(codec.load_schema(kind.__name__))])
        self._writer = pq.ParquetWriter(self._unfinished, self._schema, compression="zstd")
        self._rows: list[dict[str, Any]] = []

    def write(self, records: Sequence[Record]) -> None:
        self._rows += [{name: getattr(record, name) for name in self._schema.names} for record in records]
        if len(self._rows) >= GROUP_ROWS:
            self._flush()

    def _flush(self) -> None:
        self._writer.write_table(pa.Table.from_pylist(self._rows, self._schema))
        self._rows = []

    def close(self) -> None:
        self._flush()
        self._writer.close()
        self._unfinished.rename(self._path)
