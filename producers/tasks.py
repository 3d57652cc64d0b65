"""Turns a file of prompts into groups of rollouts and publishes their tasks on the topic of their priority."""

import time
from collections.abc import Iterable
from pathlib import Path
from typing import Annotated, Any

from pydantic import AfterValidator, BaseModel, ConfigDict, Field, ValidationError

from millstream.producers.log.acks import Acks
from millstream.producers.log.port import Producer
from millstream.schemas.config.settings import Settings, problems_of
from millstream.schemas.errors import ConfigError
from millstream.schemas.ids import new_id
from millstream.schemas.spans.text import json_text
from millstream.schemas.wire import status
from millstream.schemas.wire.records import LONGEST_ATTEMPT_S, LONGEST_LEASE_S, RolloutTask
from millstream.schemas.wire.topics import PRIORITIES, Topics

MAX_PROBLEMS = 20  # listed in one error message


def _one_of(*allowed: str) -> AfterValidator:
    def check(value: str) -> str:
        if value not in allowed:
            raise ValueError(f"{value!r} is none of {', '.join(allowed)}")
        return value

    return AfterValidator(check)


class TaskLine(BaseModel):
    """A line of a tasks file: a prompt, and the options that override the settings for its rollouts."""

    model_config = ConfigDict(extra="forbid", strict=True)

    input: Any
    group_id: str | None = Field(None, min_length=1)
    mode: Annotated[str, _one_of("train", "val", "test")] = "train"
    priority: Annotated[str, _one_of(*PRIORITIES)] | None = None
    resources_id: str | None = None
    max_attempts: int | None = Field(None, ge=1)
    max_lost_attempts: int | None = Field(None, ge=0)
    retry_on: list[Annotated[str, _one_of(*sorted(status.RETRIED))]] = []
    timeout_s: float | None = Field(None, gt=0, le=LONGEST_ATTEMPT_S)
    lease_s: float | None = Field(None, gt=0, le=LONGEST_LEASE_S)
    unresponsive_s: float | None = Field(None, gt=0, le=LONGEST_ATTEMPT_S)
    seed: int | None = None
    metadata: dict[str, str] = {}


def group_of(
    line: TaskLine, settings: Settings, *, size: int = 1, priority: str = "normal", experiment_id: str = ""
) -> list[RolloutTask]:
    """Creates the group of ``size`` rollouts for one prompt."""
    group_id = line.group_id or new_id()
    now = time.time_ns()
    return [
        RolloutTask(
            rollout_id=new_id(),
            group_id=group_id,
            group_size=size,
            input=json_text(line.input),
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
            seed=line.seed,
            experiment_id=experiment_id,
            metadata=line.metadata,
            created_at=now,
        )
        for _ in range(size)
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
    except (OSError, UnicodeDecodeError) as error:
        raise ConfigError(f"{path} can't be read: {error}") from error
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
        tasks += group_of(line, settings, size=group_size, priority=priority, experiment_id=experiment_id)
    if bad and not skip_bad:
        more = f"\n… and {len(bad) - MAX_PROBLEMS} more" if len(bad) > MAX_PROBLEMS else ""
        shown = "\n".join(bad[:MAX_PROBLEMS])
        raise ConfigError(f"{shown}{more}\nNothing was published. Fix the file, or skip invalid lines with --skip-bad.")
    return tasks, bad


class TaskPublisher:
    """Sends tasks without a key, which spreads them over the partitions."""

    def __init__(self, producer: Producer, topics: Topics) -> None:
        self._producer = producer
        self._topics = topics

    async def publish(self, tasks: Iterable[RolloutTask]) -> None:
        """Returns when all tasks are acknowledged. Raises what `Producer.send` raises, and `LogError`."""
        acks = Acks(self._producer)
        for task in tasks:
            acks.send(self._topics.tasks(task.priority), task)
        await acks.wait()
