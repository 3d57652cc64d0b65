"""The hooks that come with the package. Make one in a module of yours and name it: ``--hook my_hooks:monitor``."""

import json
import threading
import urllib.request
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any, Final, Generic, TypeVar
from weakref import WeakValueDictionary

from prometheus_client import Counter, Histogram

from millstream.consumers.runner.hooks import WISHES, Hook, RunnerInfo, TraceSummary
from millstream.producers.agent.attempt import RolloutInfo
from millstream.producers.agent.emit import emit_span
from millstream.producers.files import files_at
from millstream.schemas.errors import ConfigError
from millstream.schemas.spans import semconv

Agent = Callable[..., Any]
T = TypeVar("T")

# Counted in whichever process the agent runs in; the runner's /metrics shows them, added up.
SECONDS: Final = Histogram(
    "millstream_agent_seconds",
    "How long agents ran, by how they ended: its count gives attempts and error rate.",
    ["agent", "status"],
    buckets=(0.1, 0.3, 1, 3, 10, 30, 60, 120, 300, 600, 1800, 3600),
)
TOKENS: Final = Counter("millstream_agent_tokens", "Tokens that agents' own spans tell of.", ["agent", "direction"])
SLOW: Final = Counter("millstream_agent_slow", "Attempts above the monitor's threshold.", ["agent"])


class WarmUp(Hook, Generic[T]):
    """Loads something once per process (a model, a connection), before the first attempt there. The agent takes it
    from ``value``: ``index = WarmUp(load_index)`` in a module, ``--hook module:index``, and ``index.value``.

    If ``load`` fails, the next attempt tries again. The time counts towards the attempt that it holds up.
    """

    timeout_s = 600.0

    def __init__(self, load: Callable[[], T], *, timeout_s: float | None = None) -> None:
        super().__init__(timeout_s=timeout_s)
        self._load = load
        self._loaded: list[T] = []
        self._lock = threading.Lock()

    @property
    def value(self) -> T:
        """What ``load`` gave; loads it if nobody has. Raises what ``load`` raises."""
        with self._lock:
            if not self._loaded:
                self._loaded.append(self._load())
            return self._loaded[0]

    def on_rollout_start(self, agent: Agent, runner: RunnerInfo, rollout: RolloutInfo) -> None:
        _ = self.value


class PerformanceMonitor(Hook):
    """Counts duration, tokens and errors of attempts as Prometheus metrics of the process.

    An attempt that ran for longer than ``threshold_s`` gets a span ``slow_attempt``, of which the runner writes a copy
    to the topic ``PREFIX.alerts``, and is told to ``webhook`` as JSON, with a ``text`` as Slack wants it. Raises
    `ConfigError` if ``webhook`` is no http(s) URL.
    """

    def __init__(
        self, threshold_s: float = 300.0, webhook: str | None = None, *, timeout_s: float | None = None
    ) -> None:
        super().__init__(timeout_s=timeout_s)
        if webhook is not None and not webhook.startswith(("http://", "https://")):
            raise ConfigError(f"webhook {webhook!r} is no http or https URL")
        self._threshold_s = threshold_s
        self._webhook = webhook

    def on_trace_end(self, agent: Agent, runner: RunnerInfo, tracer: TraceSummary, rollout: RolloutInfo) -> None:
        SECONDS.labels(runner.agent, tracer.status).observe(tracer.duration_s)
        TOKENS.labels(runner.agent, "input").inc(tracer.input_tokens)
        TOKENS.labels(runner.agent, "output").inc(tracer.output_tokens)
        if tracer.duration_s <= self._threshold_s:
            return
        SLOW.labels(runner.agent).inc()
        alert = {
            "rollout_id": rollout.rollout_id,
            "attempt_id": rollout.attempt_id,
            "agent": runner.agent,
            "worker_id": runner.worker_id,
            "host": runner.host,
            "status": tracer.status,
            "duration_s": round(tracer.duration_s, 3),
            "threshold_s": self._threshold_s,
        }
        details = {f"{semconv.ALERT_NAME}.{name}": value for name, value in alert.items()}
        emit_span("slow_attempt", {semconv.ALERT_NAME: "slow_attempt", **details})
        if self._webhook is not None:
            text = f"{runner.agent}: rollout {rollout.rollout_id} ran for {tracer.duration_s:.1f} s ({tracer.status})"
            request = urllib.request.Request(  # noqa: S310 - http(s) only, see above
                self._webhook,
                json.dumps({"text": text, **alert}).encode(),
                {"Content-Type": "application/json"},
            )
            with urllib.request.urlopen(request, timeout=self.timeout_s):  # noqa: S310
                pass


class ErrorHandler(Hook):
    """Says by the type of what the agent raised what becomes of the attempt: "retry", "fail" or "ignore", as in
    `Hook.on_error`. The nearest base class counts; errors of other types are left alone.

    Raises `ConfigError` for other words.
    """

    def __init__(self, actions: Mapping[type[BaseException], str], *, timeout_s: float | None = None) -> None:
        super().__init__(timeout_s=timeout_s)
        for kind, action in actions.items():
            if action not in WISHES:
                raise ConfigError(f"ErrorHandler: {action!r} for {kind.__name__} is none of {', '.join(WISHES)}")
        self._actions = dict(actions)

    async def on_error(
        self, agent: Agent, runner: RunnerInfo, rollout: RolloutInfo, error: BaseException
    ) -> str | None:
        return next((self._actions[kind] for kind in type(error).__mro__ if kind in self._actions), None)


class StateBackup(Hook):
    """Writes what is worth keeping of each attempt to ``<folder>/<rollout_id>/<attempt_id>.json``, whole or not at all.

    ``folder`` is a path, or a URL as fsspec knows them (``s3://bucket/backups``), for which fsspec has to be installed
    where the agent runs: else raises `ConfigError`. An attempt whose process dies leaves nothing.
    """

    def __init__(self, folder: str | Path, *, timeout_s: float | None = 30.0) -> None:
        super().__init__(timeout_s=timeout_s)
        self._files = files_at(str(folder), "StateBackup:")
        # Kept until the attempt's end by the attempt itself.
        self._traces: WeakValueDictionary[str, TraceSummary] = WeakValueDictionary()

    async def on_trace_start(
        self, agent: Agent, runner: RunnerInfo, tracer: TraceSummary, rollout: RolloutInfo
    ) -> None:
        self._traces[rollout.attempt_id] = tracer

    def on_rollout_end(self, agent: Agent, runner: RunnerInfo, rollout: RolloutInfo, status: str) -> None:
        trace = self._traces.get(rollout.attempt_id) or TraceSummary()  # else it was cancelled before its trace began
        state = {
            "rollout_id": rollout.rollout_id,
            "attempt_id": rollout.attempt_id,
            "attempt": rollout.attempt,
            "mode": rollout.mode,
            "metadata": dict(rollout.metadata),
            "input": rollout.input,
            "status": status,
            "error": None if trace.error is None else f"{type(trace.error).__name__}: {trace.error}",
            "output": None if trace.output is None else json.loads(trace.output),
            "duration_s": round(trace.duration_s, 3),
            "spans": dict(trace.kinds),
            "failed_spans": trace.errors,
            "tokens": {"input": trace.input_tokens, "output": trace.output_tokens},
            "agent": runner.agent,
            "worker_id": runner.worker_id,
            "host": runner.host,
        }
        self._files.write(f"{rollout.rollout_id}/{rollout.attempt_id}.json", json.dumps(state, indent=2).encode())
