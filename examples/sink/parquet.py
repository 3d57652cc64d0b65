"""Stores records in Parquet files by hour, for data lakes: ``FOLDER/Span/date=2027-01-15/hour=08/TOKEN.parquet``. Run
it with ``LAKE_URL=s3://bucket/lake millstream sink --sink examples.sink.parquet:ParquetSink``.

The columns are the record's fields and its place in the log: ``log_topic``, ``log_partition``, ``log_offset``,
``log_time``, whose hour decides the folder. A retried batch writes the same files again. After a crash a record may be
in two files of the same folder, equal in all columns: `read_records` returns it once. Other readers deduplicate, as in
DuckDB: ``SELECT DISTINCT ON (log_topic, log_partition, log_offset) * FROM 'runs/lake/Span/*/*/*.parquet'``.
"""

import os
from collections import defaultdict
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

import pyarrow as pa
from pyarrow import dataset, fs, parquet

import millstream as ms
from millstream.consumers.sink.port import Unusable
from millstream.schemas.errors import CodecError, ConfigError, StoreError
from millstream.schemas.wire import codec
from millstream.schemas.wire.records import Record

PLACE = {"log_topic": pa.string(), "log_partition": pa.int32(), "log_offset": pa.int64()}
PRIMITIVES = {
    "string": pa.string(),
    "bytes": pa.binary(),
    "boolean": pa.bool_(),
    "int": pa.int32(),
    "long": pa.int64(),
    "float": pa.float32(),
    "double": pa.float64(),
}


def arrow_type(avro: Any) -> pa.DataType:
    """The Arrow type of an Avro type; of a union with null that of the other."""
    if isinstance(avro, list):
        (avro,) = [branch for branch in avro if branch != "null"]
    if isinstance(avro, str):
        return PRIMITIVES[avro]
    match avro["type"]:
        case "map":
            return pa.map_(pa.string(), arrow_type(avro["values"]))
        case "array":
            return pa.list_(arrow_type(avro["items"]))
        case "record":
            return pa.struct([(part["name"], arrow_type(part["type"])) for part in avro["fields"]])
        case other:
            return arrow_type(other)


COLUMNS = PLACE | {"log_time": pa.timestamp("ms", "UTC")}
SCHEMAS = {kind: pa.schema([*COLUMNS.items(), *arrow_type(codec.load_schema(kind.__name__))]) for kind in codec.CODECS}


class ParquetSink:
    """A `ms.Sink` that writes below ``LAKE_URL``: a local folder, or anything that pyarrow has a file system for."""

    def __init__(self, _settings: ms.Settings) -> None:
        self._files, self._root = _file_system(os.environ.get("LAKE_URL", "runs/lake"))
        self._tables: dict[str, pa.Table] = {}  # by path; written and not yet flushed

    def write(self, batch: ms.Batch) -> list[Unusable]:
        rows: dict[tuple[type[Record], str], list[dict[str, Any]]] = defaultdict(list)
        unusable = []
        for record in batch.records:
            value = record.value
            try:
                encoded = value if isinstance(value, bytes) else codec.encode(value)
                written = codec.codec_of(encoded)
                kind, row = written.record_type, written.decode_dict(encoded)
            except CodecError as error:
                unusable.append(Unusable(record, "undecodable", str(error)))
                continue
            row |= zip(PLACE, (*record.partition, record.offset), strict=True)
            row["log_time"] = record.timestamp
            hour = datetime.fromtimestamp(record.timestamp / 1000, UTC).strftime("date=%Y-%m-%d/hour=%H")
            rows[kind, hour].append(row)
        for (kind, hour), found in rows.items():
            path = f"{self._root}/{kind.__name__}/{hour}/{batch.token}.parquet"
            self._tables[path] = pa.Table.from_pylist(found, SCHEMAS[kind])
        return unusable

    def flush(self) -> None:
        try:
            for path, table in self._tables.items():
                folder, _, name = path.rpartition("/")
                self._files.create_dir(folder)
                unfinished = f"{folder}/_{name}"  # readers ignore names that begin with _
                with self._files.open_output_stream(unfinished) as stream:
                    parquet.write_table(table, stream, compression="zstd")
                if isinstance(self._files, fs.LocalFileSystem):
                    with Path(unfinished).open("rb") as written:
                        os.fsync(written.fileno())
                self._files.move(unfinished, path)
        except OSError as error:
            raise StoreError(f"Parquet files below {self._root} can't be written: {error}") from error
        self._tables = {}

    def close(self) -> None:
        """Nothing is open between two calls."""


def read_records(url: str, kind: type[Record]) -> pa.Table:
    """All records of a type below ``url``, each once."""
    files, root = _file_system(url)
    table = dataset.dataset(f"{root}/{kind.__name__}", SCHEMAS[kind], "parquet", files).to_table()
    numbered = table.append_column("row", pa.array(range(len(table)), pa.int64()))
    return table.take(numbered.group_by(list(PLACE)).aggregate([("row", "min")])["row_min"])


def _file_system(url: str) -> tuple[fs.FileSystem, str]:
    try:
        return fs.FileSystem.from_uri(url if "://" in url else str(Path(url).resolve()))  # type: ignore[no-any-return]
    except (OSError, ValueError) as error:
        raise ConfigError(f"LAKE_URL: {url!r} can't be used: {error}") from error
