"""The port for places where agents run, with the options and limits that all hosts share."""

from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass
from typing import Protocol

from prometheus_client import Metric

from millstream.consumers.runner.attempt_writer import AttemptWriter


class AgentHost(Protocol):
    """Has slots for attempts. It reports to each attempt's `AttemptWriter` what the agent does, and always ends it: by
    what the agent did, or by what happened to its process. Call everything on the runner's loop."""

    @property
    def free(self) -> int:
        """Attempts that could begin now."""

    @property
    def free_alone(self) -> int:
        """Attempts that could begin now in a process of their own, where the host has processes."""

    @property
    def lost(self) -> Exception | None:
        """Why no agent can run here any more."""

    @property
    def starving_s(self) -> float:
        """How long no agent process has lived because none can be started."""

    @property
    def pids(self) -> Sequence[int]:
        """Of the agent processes that live; empty if agents run in threads. From any thread."""

    async def start(self) -> None:
        """Raises `ConfigError` if the agent can't be imported."""

    def collect(self) -> Iterable[Metric]:
        """Prometheus' collector, from any thread: the metrics of hooks."""

    def run(self, writer: AttemptWriter, *, alone: bool = False) -> None:
        """Begins an attempt; there must be a free slot. ``alone``: in a process of its own, where there are any."""

    def cancel(self, writer: AttemptWriter) -> None:
        """Asks the agent to end. Has no effect on a sync agent."""

    def kill(self, writer: AttemptWriter) -> None:
        """Ends the attempt whatever the agent does, along with other attempts if they can't be told apart."""

    async def close(self) -> None:
        """Ends everything that still runs."""


@dataclass(frozen=True, slots=True)
class HostPolicy:
    stop_s: float = 3.0  # for a process to end once it was asked to; the agent may have resources to close
    cancel_s: float = 1.0  # likewise, for cancelled agents in threads
    pending_spans: int = 20_000  # not acknowledged yet; above it a host stops reading, and its agents wait
    pending_bytes: int = 256 << 20  # likewise, of contents not stored yet
    pending_check_s: float = 0.05  # between two looks at whether it may read again
    memory_check_s: float = 0.2  # between two looks at how much memory the processes hold
    start_backoff_s: tuple[float, float] = (0.5, 15.0)  # first and longest wait after a process could not be started


@dataclass(frozen=True, slots=True)
class HostOptions:
    """What a runner sets for its host."""

    concurrency: int  # attempts at a time, in each process
    on_free: Callable[[], None]  # a slot may have become free, or the host may be lost
    on_late_span: Callable[[bytes], None]  # an encoded span of an attempt that has ended
    on_late_content: Callable[[str, bytes], object]  # likewise, a content by its digest
    policy: HostPolicy
    on_process_ended: Callable[[str], None] = lambda _reason: None  # see `schemas.metrics.AGENT_PROCESSES_ENDED`
