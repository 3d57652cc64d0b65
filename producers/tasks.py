"""Turns a file of prompts into groups of rollouts and publishes their tasks on the topic of their priority."""

import time
from collections.abc import Callable, Iterable
from pathlib import Path
from typing import Annotated, Any, Final

from pydantic import AfterValidator, BaseModel, ConfigDict, Field, ValidationError

from millstream.producers.log.acks import Acks
from millstream.producers.log.port import Producer
from millstream.producers.task_input import task_input
from millstream.schemas.config.settings import MAX_ATTEMPTS, Settings
from millstream.schemas.errors import CodecError, ConfigError, TooLarge, problems_of
from millstream.schemas.ids import derived_seed, id_time_ms, new_id
from millstream.schemas.spans import semconv
from millstream.schemas.wire import codec, status
from millstream.schemas.wire.log import KIND_HEADER, ROLLOUT_HEADER, Headers
from millstream.schemas.wire.records import LONGEST_ATTEMPT_S, LONGEST_LEASE_S, RolloutTask
from millstream.schemas.wire.topics import LIFETIMES, PRIORITIES

MAX_PROBLEMS = 20  # listed in one error message
TOGETHER: Final = 5000  # tasks that are sent before their acknowledgements are waited for


def _one_of(*allowed: str) -> AfterValidator:
    def check(value: str) -> str:
        if value not in allowed:
            raise ValueError(f"{value!r} is none of {', '.join(allowed)}")
        return value

    return AfterValidator(check)


class TaskLine(BaseModel):
    """A line of a tasks file: a prompt, and the options that override the settings for its rollouts."""

    model_config = ConfigDict(extra="forbid", strict=True)

    input: Any = Field(description="What the agent gets: any JSON value.")
    group_id: str | None = Field(None, min_length=1, description="Group of its rollouts. Default: one of its own.")
    mode: Annotated[str, _one_of("train", "val", "test")] = Field(
        "train", description="train, val or test. Only train is trained on."
    )
    priority: Annotated[str, _one_of(*PRIORITIES)] | None = Field(
        None, description="high, normal or low. Default: what the publisher says."
    )
    resources_id: str | None = Field(None, description="Version of prompts and policy. Default: the latest.")
    max_attempts: int | None = Field(
        None, ge=1, le=MAX_ATTEMPTS, description="Attempts that may fail. Default: `retry_max_attempts`."
    )
    max_lost_attempts: int | None = Field(
        None, ge=0, le=MAX_ATTEMPTS, description="Lost attempts that are forgiven. Default: `retry_max_lost_attempts`."
    )
    retry_on: list[Annotated[str, _one_of(*sorted(status.RETRIED))]] = Field(
        [], description=f"Which ends are retried: {', '.join(sorted(status.RETRIED))}. Default: all."
    )
    timeout_s: float | None = Field(
        None, gt=0, le=LONGEST_ATTEMPT_S, description="Seconds an attempt may run. Default: the setting `timeout_s`."
    )
    lease_s: float | None = Field(
        None, gt=0, le=LONGEST_LEASE_S, description="Seconds without a heartbeat until it is lost. Default: `lease_s`."
    )
    unresponsive_s: float | None = Field(
        None, gt=0, le=LONGEST_ATTEMPT_S, description="Seconds without a span or model call until it ends."
    )
    seed: int | None = Field(
        None, ge=-(2**63), lt=2**63, description="The seeds of its model calls are derived from it."
    )
    agent: str | None = Field(
        None, min_length=1, description="module:attribute; runners of other agents refuse the task."
    )
    metadata: dict[str, str] = Field({}, description="Text by name; a column of the store, and in `rollout.metadata`.")


def group_of(
    line: TaskLine, settings: Settings, *, size: int = 1, priority: str = "normal", experiment_id: str = ""
) -> list[RolloutTask]:
    """Creates the group of ``size`` rollouts for one prompt. Of a line with a seed the first has that seed, each other
    one a seed derived from it, so that they differ. Raises `ConfigError` naming what in it is not JSON."""
    group_id = line.group_id or new_id()
    now = time.time_ns()
    given = task_input(line.input)
    return [
        RolloutTask(
            rollout_id=new_id(),
            group_id=group_id,
            group_size=size,
            input=given,
            mode=line.mode,
            priority=line.priority or priority,
            resources_id=line.resources_id,
            max_attempts=line.max_attempts or settings.retry_max_attempts,
            max_lost_attempts=settings.retry_max_lost_attempts
            if line.max_lost_attempts is None
            else line.max_lost_attempts,
            timeout_s=line.timeout_s or settings.timeout_s,
            lease_s=line.lease_s or settings.lease_s,
            unresponsive_s=line.unresponsive_s,
            retry_on=tuple(line.retry_on),
            seed=line.seed if line.seed is None or not number else derived_seed(line.seed, number),
            experiment_id=experiment_id,
            metadata=line.metadata | ({} if line.agent is None else {semconv.AGENT_NAME: line.agent}),
            created_at=now,
        )
        for number in range(size)
    ]


def read_tasks(
    path: Path,
    settings: Settings,
    *,
    group_size: int = 1,
    priority: str = "normal",
    experiment_id: str = "",
    skip_bad: bool = False,
) -> tuple[list[RolloutTask], list[str]]:
    """Reads a file with one JSON object per line (`TaskLine`). Returns its rollouts and the errors of skipped lines.

    Raises `ConfigError` with file, line and cause of the invalid lines, unless ``skip_bad``. Ignores empty lines.
    """
    try:
        lines = path.read_text("utf-8").splitlines()
    except OSError as error:
        raise ConfigError(f"{path} can't be read: {error.strerror}") from error
    except UnicodeDecodeError as error:
        raise ConfigError(f"{path} is not UTF-8 text ({error.reason} at byte {error.start}): convert it") from error
    tasks: list[RolloutTask] = []
    bad: list[str] = []
    for number, text in enumerate(lines, 1):
        if not text.strip():
            continue
        try:
            line = TaskLine.model_validate_json(text)
        except ValidationError as error:
            bad.append(f"{path}:{number}: {problems_of(error)}")
            continue
        try:
            tasks += group_of(line, settings, size=group_size, priority=priority, experiment_id=experiment_id)
        except ConfigError as error:
            bad.append(f"{path}:{number}: {error}")
    if bad and not skip_bad:
        more = f"\n… and {len(bad) - MAX_PROBLEMS} more" if len(bad) > MAX_PROBLEMS else ""
        shown = "\n".join(bad[:MAX_PROBLEMS])
        raise ConfigError(f"{shown}{more}\nNothing was published. Fix the file, or skip invalid lines with --skip-bad.")
    return tasks, bad


def task_headers(task: RolloutTask) -> Headers:
    return {KIND_HEADER: b"task", ROLLOUT_HEADER: task.rollout_id.encode()}


def unreadable_task(rollout_id: str, time_ns: int) -> RolloutTask:
    """Stands for a task of which only the id is known."""
    return RolloutTask(
        rollout_id=rollout_id, group_id=rollout_id, input="", timeout_s=60.0, lease_s=60.0, created_at=time_ns
    )


def expired(rollout_id: str, time_ms: int, after_s: float = LIFETIMES.task_s) -> bool:
    """Whether the rollout, by the time in its id, is too old to be run at ``time_ms``. False for an id without a
    time."""
    try:
        return time_ms - id_time_ms(rollout_id) > after_s * 1000
    except ValueError:
        return False


class TaskPublisher:
    """Sends tasks without a key, which spreads them over the partitions."""

    # A task travels within the records of its attempts, which hold ids, a status and an error besides.
    RESERVED_BYTES: Final = 4096

    def __init__(self, producer: Producer, settings: Settings) -> None:
        self._producer = producer
        self._topics = settings.topics
        self._limit = settings.max_record_bytes

    async def publish(self, tasks: Iterable[RolloutTask], progress: Callable[[int, int], None] | None = None) -> None:
        """Returns when all tasks are acknowledged. Sends none if one of them can't be published: raises `ConfigError`,
        `CodecError` or `TooLarge`, which name it. Raises `LogError` if the log refuses some. ``progress`` is called
        with how many are acknowledged, and of how many."""
        now_ms = time.time_ns() // 1_000_000
        checked = [self._checked(number, task, now_ms) for number, task in enumerate(tasks, 1)]
        acks = Acks(self._producer)
        for start in range(0, len(checked), TOGETHER):
            for topic, body, headers in checked[start : start + TOGETHER]:
                acks.send(topic, body, headers=headers)
            await acks.wait()
            if progress is not None:
                progress(min(start + TOGETHER, len(checked)), len(checked))

    def encoded(self, task: RolloutTask) -> bytes:
        """Raises `CodecError`, and `TooLarge` if its attempts could not be recorded."""
        body = codec.encode(task)
        if len(body) > self._limit - self.RESERVED_BYTES:
            raise TooLarge(
                f"the task has {len(body):,} bytes; max_record_bytes is {self._limit:,}, of which its attempts need "
                f"{self.RESERVED_BYTES:,}. Keep long inputs in a file or object store, and publish their names"
            )
        return body

    def _checked(self, number: int, task: RolloutTask, now_ms: int) -> tuple[str, bytes, Headers]:
        name = f"task {number} (rollout {task.rollout_id}), nothing was published"
        if task.priority not in PRIORITIES:
            raise ConfigError(f"{name}: priority {task.priority!r} is none of {', '.join(PRIORITIES)}")
        if expired(task.rollout_id, now_ms):
            days = LIFETIMES.task_s / 86_400
            raise ConfigError(f"{name}: its id is more than {days:g} days old, so it would end unrun; create a new id")
        try:
            return self._topics.tasks(task.priority), self.encoded(task), task_headers(task)
        except TooLarge as error:
            raise TooLarge(f"{name}: {error}") from error
        except CodecError as error:
            raise CodecError(f"{name}: {error}") from error
