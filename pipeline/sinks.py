"""Finds the sink that ``millstream sink --sink`` names."""

from pathlib import Path

from millstream.consumers.clickhouse_sink import ClickHouseSink
from millstream.consumers.objects import load_object
from millstream.consumers.sink_port import Sink
from millstream.pipeline.store import ClickHouseStore
from millstream.schemas.errors import ConfigError
from millstream.schemas.settings import Settings

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
        from millstream.consumers.parquet_sink import ParquetSink

        return ParquetSink(settings)
    if choice == OTLP:
        from millstream.consumers.otlp_sink import OtlpSink

        return OtlpSink(settings)
    found = load_object("sink", choice, str(Path.cwd()))
    made = found(settings) if callable(found) else found
    if not isinstance(made, Sink):
        raise ConfigError(f"sink {choice!r} is a {type(made).__name__}, which lacks write, flush or close: see ms.Sink")
    return made


def sink_name(choice: str) -> str:
    """What its consumer group is called unless it is named: nothing for ClickHouse, else the choice's last word."""
    return "" if choice == CLICKHOUSE else choice.rpartition(":")[2]
