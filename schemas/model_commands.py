"""What is asked of whoever serves a model, and its answers: records on the control topic."""

import json
import time
from collections.abc import Mapping
from dataclasses import asdict, dataclass, field
from typing import Any, Final, Literal, Self

from millstream.schemas.errors import ConfigError
from millstream.schemas.records import Control

COMMAND: Final = "model-command"  # kinds of control records
ANSWER: Final = "model-answer"
SERVER: Final = "model-server"


@dataclass(frozen=True, slots=True, kw_only=True)
class ModelCommand:
    """Something to be done about a model's versions. ``command_id`` is a UUIDv7."""

    command_id: str
    action: Literal["deploy", "rollback", "split"]
    model: str
    version: str = ""  # to deploy, or to go back to; empty: the one before
    folder: str = ""  # of the weights to deploy
    lora: bool = False
    shares: Mapping[str, float] = field(default_factory=dict)  # version → share, of a split

    def to_control(self) -> Control:
        return _record(COMMAND, self.command_id, asdict(self))

    @classmethod
    def from_control(cls, record: Control) -> Self:
        """Raises `ConfigError` naming the command that can't be read."""
        command: Self = _read(cls, record)
        if command.action not in ("deploy", "rollback", "split"):
            raise ConfigError(f"model command {record.name}: there is no action {command.action!r}")
        return command


@dataclass(frozen=True, slots=True, kw_only=True)
class ModelAnswer:
    """What became of a command: a routing table, or why not."""

    command_id: str
    table_id: str = ""
    error: str = ""

    def to_control(self) -> Control:
        return _record(ANSWER, self.command_id, asdict(self))

    @classmethod
    def from_control(cls, record: Control) -> Self:
        """Raises `ConfigError`."""
        answer: Self = _read(cls, record)
        return answer


@dataclass(frozen=True, slots=True, kw_only=True)
class ServerState:
    """What an upstream's replicas serve."""

    upstream: str
    model: str
    version: str  # of the whole model
    adapters: tuple[str, ...] = ()  # names of the LoRA adapters beside it
    replicas: tuple[Mapping[str, Any], ...] = ()  # url, alive, restarts of each

    def to_control(self) -> Control:
        return _record(SERVER, self.upstream, asdict(self))

    @classmethod
    def from_control(cls, record: Control) -> Self:
        """Raises `ConfigError`."""
        state: Self = _read(cls, record)
        return state


def _record(kind: str, name: str, body: dict[str, Any]) -> Control:
    return Control(kind=kind, name=name, body=json.dumps(body), created_at=time.time_ns())


def _read(kind: Any, record: Control) -> Any:
    try:
        return kind(**json.loads(record.body))
    except (ValueError, TypeError) as error:
        raise ConfigError(f"{record.kind} {record.name}: {type(error).__name__}: {error}") from error
