"""Finds the sink that ``millstream sink --sink`` names."""

from pathlib import Path

from millstream.consumers.sink.clickhouse import ClickHouseSink
from millstream.consumers.sink.port import Sink
from millstream.pipeline.store.clickhouse import ClickHouseStore
from millstream.schemas.config.settings import Settings
from millstream.schemas.errors import ConfigError
from millstream.schemas.import_path import load_object

CLICKHOUSE = "clickhouse"
PARQUET = "parquet"
OTLP = "otlp"


def open_sink(choice: str, settings: Settings) -> Sink:
    """``clickhouse`` (its tables are brought up to date), ``parquet``, ``otlp``, or ``module:attribute`` of a `Sink` or
    of what makes one of the settings. Raises `ConfigError`, `StoreError`."""
    if choice == CLICKHOUSE:
        store = ClickHouseStore(settings)
        try:
            store.migrate()
        except BaseException:
            store.close()
            raise
        return ClickHouseSink(store, settings.topics.events)
    if choice == PARQUET:
        from millstream.consumers.sink.parquet import ParquetSink

        return ParquetSink(settings)
    if choice == OTLP:
        from millstream.consumers.sink.otlp import OtlpSink

        return OtlpSink(settings)
    found = load_object("sink", choice, str(Path.cwd()))
    made = found(settings) if callable(found) else found
    if not isinstance(made, Sink):
        raise ConfigError(f"sink {choice!r} is a {type(made).__name__}, which lacks write, flush or close: see ms.Sink")
    return made


def sink_name(choice: str) -> str:
    """What its consumer group is called unless it is named: nothing for ClickHouse, else the choice's last word."""
    return "" if choice == CLICKHOUSE else choice.rpartition(":")[2]
