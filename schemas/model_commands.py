"""What is asked of whoever serves a model, and its answers: records on the control topic."""

import json
import time
from collections.abc import Mapping
from dataclasses import asdict, dataclass, field
from typing import Any, ClassVar, Final, Literal, Self

from millstream.schemas.errors import ConfigError
from millstream.schemas.wire.records import Control

COMMAND: Final = "model-command"  # kinds of control records
ANSWER: Final = "model-answer"
SERVER: Final = "model-server"


@dataclass(frozen=True, slots=True, kw_only=True)
class _Said:
    """The body of a control record; the field ``_name`` is its name."""

    _kind: ClassVar[str]
    _name: ClassVar[str] = "command_id"

    def to_control(self) -> Control:
        body = json.dumps(asdict(self))
        return Control(kind=self._kind, name=getattr(self, self._name), body=body, created_at=time.time_ns())

    @classmethod
    def from_control(cls, record: Control) -> Self:
        """Raises `ConfigError` naming the record that can't be read."""
        try:
            return cls(**json.loads(record.body))
        except (ValueError, TypeError) as error:
            raise ConfigError(f"{record.kind} {record.name}: {type(error).__name__}: {error}") from error


@dataclass(frozen=True, slots=True, kw_only=True)
class ModelCommand(_Said):
    """Something to be done about a model's versions. ``command_id`` is a UUIDv7."""

    _kind = COMMAND
    command_id: str
    action: Literal["deploy", "rollback", "split"]
    model: str
    version: str = ""  # to deploy, or to go back to; empty: the one before
    folder: str = ""  # of the weights to deploy
    lora: bool = False
    shares: Mapping[str, float] = field(default_factory=dict)  # version → share, of a split

    def __post_init__(self) -> None:
        if self.action not in ("deploy", "rollback", "split"):
            raise ValueError(f"there is no action {self.action!r}")


@dataclass(frozen=True, slots=True, kw_only=True)
class ModelAnswer(_Said):
    """What became of a command: a routing table, or why not."""

    _kind = ANSWER
    command_id: str
    table_id: str = ""
    error: str = ""


@dataclass(frozen=True, slots=True, kw_only=True)
class ServerState(_Said):
    """What an upstream's replicas serve."""

    _kind = SERVER
    _name = "upstream"
    upstream: str
    model: str
    version: str  # of the whole model
    adapters: tuple[str, ...] = ()  # names of the LoRA adapters beside it
    replicas: tuple[Mapping[str, Any], ...] = ()  # url, alive, restarts of each
