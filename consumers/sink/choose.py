"""Opens the sink that ``millstream sink --sink`` names."""

from pathlib import Path

from millstream.consumers.sink.port import Sink
from millstream.schemas.config.settings import Settings
from millstream.schemas.errors import ConfigError
from millstream.schemas.import_path import load_object

CLICKHOUSE = "clickhouse"


def open_sink(choice: str, settings: Settings) -> Sink:
    """Opens ``clickhouse`` (and brings its tables up to date), or ``module:attribute``: a `Sink`, or a callable that
    takes the settings and returns one. Raises `ConfigError`, `StoreError`."""
    if choice == CLICKHOUSE:
        from millstream.consumers.sink.clickhouse import open_clickhouse_sink

        return open_clickhouse_sink(settings)
    found = load_object("sink", choice, str(Path.cwd()))
    made = found(settings) if callable(found) else found
    if not isinstance(made, Sink):
        raise ConfigError(f"sink {choice!r} is a {type(made).__name__}, which lacks write, flush or close: see ms.Sink")
    return made


def sink_name(choice: str) -> str:
    """The default name of the sink's consumer group: empty for ClickHouse, else the last word of the choice."""
    return "" if choice == CLICKHOUSE else choice.rpartition(":")[2]
