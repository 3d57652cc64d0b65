"""The records on the topics: a frozen class for each ``avro/*.avsc``, with its fields in the same order.

Ids are UUIDv7 strings, times are nanoseconds since the epoch (UTC). The ``.avsc`` documents each
field; a test compares the two.
"""

from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any, ClassVar, Final, Protocol, TypeVar, dataclass_transform

T = TypeVar("T")

# Seconds of a task, above 0 and at most this. A lease holds back its partition's offset for as long as it lasts, and a
# live runner renews it every few seconds.
LONGEST_LEASE_S: Final = 86_400.0
LONGEST_ATTEMPT_S: Final = 366 * 86_400.0


class Record(Protocol):
    """Any record class of this module."""

    __dataclass_fields__: ClassVar[dict[str, Any]]


@dataclass_transform(kw_only_default=True, frozen_default=True)
def _frozen_for_mypy(cls: type[T]) -> type[T]:
    """Frozen for mypy alone: there are many spans, and Python takes five times as long to create frozen objects."""
    return dataclass(slots=True, kw_only=True)(cls)


@dataclass(frozen=True, slots=True, kw_only=True)
class RolloutTask:
    """An attempt at a rollout that a runner may claim."""

    rollout_id: str
    group_id: str
    group_size: int = 1
    input: str
    mode: str = "train"
    priority: str = "normal"
    resources_id: str | None = None
    attempt: int = 1
    max_attempts: int = 1
    lost_attempts: int = 0
    max_lost_attempts: int = 0
    crashes: int = 0
    timeout_s: float
    lease_s: float
    unresponsive_s: float | None = None
    retry_on: tuple[str, ...] = ()
    seed: int | None = None
    state: bytes | None = None
    experiment_id: str = ""
    metadata: Mapping[str, str] = field(default_factory=dict)
    created_at: int


@dataclass(frozen=True, slots=True, kw_only=True)
class ErrorInfo:
    """Why an attempt did not succeed."""

    type: str
    message: str
    stack: str


@dataclass(frozen=True, slots=True, kw_only=True)
class AttemptEvent:
    """A status change or heartbeat of an attempt. In the order of the log, the first terminal status is final."""

    rollout_id: str
    attempt_id: str
    attempt: int
    status: str
    worker_id: str
    time: int
    lease_s: float
    task: bytes | None = None
    error: ErrorInfo | None = None
    span_counts: Mapping[str, int] = field(default_factory=dict)
    output: str | None = None
    state: bytes | None = None
    metadata: Mapping[str, str] = field(default_factory=dict)


@dataclass(frozen=True, slots=True, kw_only=True)
class SpanEvent:
    """An instant within a span."""

    name: str
    time: int
    attributes: Mapping[str, str]


@dataclass(frozen=True, slots=True, kw_only=True)
class SpanLink:
    """A related span."""

    trace_id: str
    span_id: str
    attributes: Mapping[str, str]


@_frozen_for_mypy
class Span:
    """A timed operation of an attempt: OpenTelemetry's fields, its rollout, and the fields that training reads."""

    trace_id: str
    span_id: str
    parent_id: str = ""
    trace_state: str = ""
    name: str
    kind: str
    span_kind: str = "Internal"
    start: int
    end: int
    status: str = "Unset"
    status_message: str = ""
    attributes: Mapping[str, str] = field(default_factory=dict)
    events: tuple[SpanEvent, ...] = ()
    links: tuple[SpanLink, ...] = ()
    resource: Mapping[str, str] = field(default_factory=dict)
    scope_name: str = ""
    scope_version: str = ""
    rollout_id: str
    attempt_id: str
    source: str
    sequence: int
    prompt_token_ids: bytes | None = None
    response_token_ids: bytes | None = None
    response_logprobs: bytes | None = None
    reward: float | None = None
    reward_name: str | None = None
    model_version: str | None = None


@dataclass(frozen=True, slots=True, kw_only=True)
class Triplet:
    """An LLM call of the chosen attempt, ready to train on."""

    rollout_id: str
    attempt_id: str
    group_id: str
    experiment_id: str = ""
    mode: str = "train"
    resources_id: str | None = None
    turn: int
    span_id: str
    prompt: str
    response: str
    prompt_token_ids: bytes | None = None
    response_token_ids: bytes | None = None
    response_logprobs: bytes | None = None
    reward: float | None = None
    model_version: str | None = None
    agent_name: str | None = None
    trainable: bool = True
    reason: str | None = None
    metadata: Mapping[str, str] = field(default_factory=dict)
    tools: str | None = None
    prefix_turn: int | None = None
    prefix_tokens: int = 0
    prefix_characters: int = 0
    response_versions: str | None = None


@dataclass(frozen=True, slots=True, kw_only=True)
class RolloutEnd:
    """The end of a rollout: exactly one for each, also for failures. On the events topic it is the adapter's mark."""

    rollout_id: str
    group_id: str
    group_size: int
    experiment_id: str = ""
    mode: str = "train"
    resources_id: str | None = None
    status: str
    attempt_id: str | None = None
    attempts: int
    lost_attempts: int = 0
    turns: int = 0
    spans: int = 0
    prompt_tokens: int = 0
    response_tokens: int = 0
    reward: float | None = None
    model_version: str | None = None
    trainable: bool = True
    reason: str | None = None
    created_at: int
    started_at: int | None = None
    ended_at: int


@dataclass(frozen=True, slots=True, kw_only=True)
class Control:
    """A control message for all roles (see `schemas.control`): resources, a routing table, a cancel, a pause …"""

    kind: str
    name: str
    experiment_id: str = ""
    body: str
    created_at: int


@dataclass(frozen=True, slots=True, kw_only=True)
class Worker:
    """The current state of a process."""

    worker_id: str
    role: str
    host: str
    version: str
    slots: int = 0
    running: int = 0
    started: int
    last_seen: int


@dataclass(frozen=True, slots=True, kw_only=True)
class DeadLetter:
    """A record that a role could not use, unchanged."""

    topic: str
    partition: int
    offset: int
    key: bytes | None = None
    value: bytes | None = None
    headers: Mapping[str, bytes] = field(default_factory=dict)
    timestamp: int
    role: str
    reason: str
    error: str
    time: int


@dataclass(frozen=True, slots=True, kw_only=True)
class Settled:
    """What one transaction of the adapter has settled on one partition of events."""

    marks: bytes
    refused: tuple[int, ...] = ()


@dataclass(frozen=True, slots=True, kw_only=True)
class TrainingStep:
    """One step of training: what it took, what it earned and which rollouts it trained on."""

    experiment_id: str
    run: str = ""
    epoch: int = 0
    step: int
    model_version: str = ""
    started_at: int
    ended_at: int
    wait_s: float = 0.0
    update_s: float = 0.0
    save_s: float = 0.0
    publish_s: float = 0.0
    other_s: float = 0.0
    reward_mean: float | None = None
    reward_std: float | None = None
    validation_reward: float | None = None
    rollouts: int = 0
    failed: int = 0
    groups: int = 0
    dropped: Mapping[str, int] = field(default_factory=dict)
    staleness_mean: float = 0.0
    staleness_max: int = 0
    tokens: int = 0
    metrics: Mapping[str, float] = field(default_factory=dict)
    trained: tuple[str, ...] = ()
    restored_from: str = ""


RECORD_TYPES: tuple[type[Record], ...] = (
    RolloutTask,
    AttemptEvent,
    Span,
    Triplet,
    RolloutEnd,
    Control,
    Worker,
    DeadLetter,
    Settled,
    TrainingStep,
)
