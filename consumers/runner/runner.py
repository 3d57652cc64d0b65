"""The runner: claims tasks, runs the agent on them, and writes how each attempt ends.

    claim (preparing, acknowledged, committed) ─► host runs the agent: running, spans, heartbeats
        ─► the agent ends ─► closed at the proxy ─► all spans acknowledged ─► terminal event

It is stateless: what has been claimed lives in the log. The runner sends the heartbeats, not the agent, so an agent
that blocks keeps its lease. A runner whose heartbeats are not acknowledged for a lease ends its own attempts: by then
the adapter has had them retried elsewhere.
"""

import asyncio
import logging
import time
from collections import deque
from collections.abc import Callable, Iterable, Sequence
from contextlib import suppress
from dataclasses import dataclass, field
from pathlib import Path

from prometheus_client import CollectorRegistry, Metric

from millstream.consumers.control import ControlFollower
from millstream.consumers.log.port import Log
from millstream.consumers.runner.agent import AgentConfig, AgentFunction
from millstream.consumers.runner.attempt_writer import AttemptWriter
from millstream.consumers.runner.claims import ROLE, Claim, ClaimPolicy, Claims
from millstream.consumers.runner.hooks import Hook
from millstream.consumers.runner.hosts.agent_user import agent_user as find_user
from millstream.consumers.runner.hosts.port import AgentHost, HostOptions, HostPolicy
from millstream.consumers.runner.hosts.processes import ProcessHost, agent_environment
from millstream.consumers.runner.hosts.threads import ThreadHost
from millstream.consumers.runner.hosts.usage import Usage, usage_of
from millstream.consumers.runner.metrics import RunnerMetrics
from millstream.consumers.runner.outcome import Outcome, stopped_by
from millstream.consumers.runner.proxies import Proxies, ProxiesPolicy, ProxyNotClosed
from millstream.producers.agent.instrumentation import chosen, report
from millstream.producers.blob_store import Blobs
from millstream.producers.log.port import Producer
from millstream.producers.supervisor import supervisor
from millstream.producers.workers import new_worker_id, reporting
from millstream.schemas.config.settings import Settings
from millstream.schemas.errors import CodecError, ConfigError, LogError, MillstreamError
from millstream.schemas.spans import semconv
from millstream.schemas.wire import codec, status
from millstream.schemas.wire.log import KIND_HEADER
from millstream.schemas.wire.records import Span

logger = logging.getLogger(__name__)


@dataclass(frozen=True, slots=True)
class RunnerPolicy:
    poll_s: float = 0.2  # how long one poll for tasks waits; a stop may be noticed that late
    gather_s: float = 0.005  # slots that become free within it are filled by one claim, with one commit
    stay_s: float = 2.0  # between polls that only keep the group membership, while there is no free slot
    cancel_grace_s: float = 5.0  # between asking an agent to end and ending it
    heartbeats: int = 3  # in a lease
    report_s: float = 5.0  # between reports on the workers topic
    alone_from: int = 2  # crashes of shared processes: a task that was in so many runs alone, and blame is certain
    claims: ClaimPolicy = field(default_factory=ClaimPolicy)
    host: HostPolicy = field(default_factory=HostPolicy)
    proxies: ProxiesPolicy = field(default_factory=ProxiesPolicy)


def _cancelled(what: str) -> Outcome:
    return stopped_by(status.CANCELLED, "cancelled", f"{what} has been cancelled")


_Timers = dict[str, asyncio.TimerHandle]


class Runner:
    """Runs one agent: ``module:attribute``, found from ``folder`` (default: the current one), or a callable.

    With ``processes`` 0, and for a callable, attempts run in threads of this process, ``concurrency`` at a time; else
    in child processes, ``concurrency`` in each, which get the environment variables named by ``env`` besides the
    basics, may hold ``memory_limit`` MiB, run as ``agent_user``, and are replaced after ``max_attempts_per_process``.
    ``hooks``: ``module:attribute``, or objects if attempts run in threads. ``instrument``: see `chosen`. ``registry``
    gets its metrics.
    """

    def __init__(
        self,
        log: Log,
        settings: Settings,
        agent: str | AgentFunction,
        *,
        worker_id: str | None = None,
        processes: int | None = None,
        concurrency: int | None = None,
        env: Sequence[str] = (),
        folder: Path | None = None,
        drain_s: float = 30.0,
        memory_limit: int | None = None,
        max_attempts_per_process: int | None = None,
        agent_user: str | None = None,
        hooks: Sequence[Hook | str] = (),
        instrument: str | None = None,
        registry: CollectorRegistry | None = None,
        policy: RunnerPolicy = RunnerPolicy(),
    ) -> None:
        self.worker_id = worker_id or new_worker_id()
        self._log = log
        self._settings = settings
        self._topics = settings.topics
        self._processes = settings.runner_processes if processes is None else processes
        if not isinstance(agent, str):
            self._processes = 0
        self._concurrency = concurrency or settings.runner_concurrency
        self._environment = agent_environment(env)
        self._drain_s = drain_s
        self._metrics = RunnerMetrics(registry)
        self._policy = policy
        self._memory_limit = memory_limit
        self._max_attempts = max_attempts_per_process
        self._user = None if agent_user is None else find_user(agent_user)
        if memory_limit is not None and not Path("/proc/self/statm").exists():
            raise ConfigError("--memory-limit needs Linux's /proc; leave it out, and limit the runner from outside")
        self._config = AgentConfig(
            agent,
            str(folder or Path.cwd()),
            self.worker_id,
            settings.proxy_urls,
            settings.gateway_url,
            hooks,
            chosen(instrument),
            settings.log_level,
            settings.log_format,
        )
        self._proxies = Proxies(settings.proxy_urls, settings.proxy_secret.get_secret_value(), policy.proxies)
        self._running: dict[AttemptWriter, _Timers] = {}  # until their terminal event is written
        self._suspects: deque[AttemptWriter] = deque()  # claimed; each waits for a process of its own
        self._changed = asyncio.Event()
        self._claims: Claims | None = None
        self._collect: Callable[[], Iterable[Metric]] = tuple
        self._pids: Callable[[], Sequence[int]] = tuple

    async def run(self, stop: asyncio.Event) -> None:
        """Works until ``stop`` is set, then waits ``drain_s`` for running attempts; the rest ends as lost.

        Raises `ConfigError` if the agent can't be imported, `MillstreamError` if its processes no longer start.
        """
        self._loop = asyncio.get_running_loop()
        self._supervisor = supervisor()
        report(self._config.instrument)
        self._producer: Producer = self._log.producer()
        self._blobs = Blobs(self._settings.blob_url)
        self._host = self._make_host()
        self._collect = self._host.collect
        self._pids = lambda: self._host.pids
        control = ControlFollower(self._log, self._topics, lambda: self._end_cancelled(control))
        claims = Claims(
            self._log,
            self._topics,
            self._producer,
            control,
            self.worker_id,
            self._policy.claims,
            on_dead_letter=self._metrics.dead_letter,
        )
        self._claims = claims
        try:
            await self._host.start()
            await control.start()
            await claims.start()
            logger.info("runner %s is ready: %d slots", self.worker_id, self._host.free)
            stopping = supervisor().job("stop", self._notice(stop))
            try:
                async with reporting(
                    self._producer, self._topics, ROLE, self.worker_id, self.load, report_s=self._policy.report_s
                ):
                    while not stop.is_set():
                        await self._claim(claims, control)
                    await self._until_idle(self._drain_s)
            finally:
                stopping.cancel()
        finally:
            await claims.close()
            await self._end_all()
            await self._proxies.close()
            await control.close()
            self._blobs.close()
            await asyncio.to_thread(self._producer.close)

    @property
    def heartbeat_age_s(self) -> float:
        """Age of the last acknowledged heartbeat, of the running attempt for which it is oldest."""
        writers = list(self._running)  # the probes' thread asks
        oldest = min((w.last_acknowledged for w in writers), default=None)
        return 0.0 if oldest is None else time.monotonic() - oldest

    @property
    def starving_s(self) -> float:
        """How long the lag has grown although slots are free and the runner polls, or no agent process could be
        started."""
        return 0.0 if self._claims is None else max(self._claims.starvation.seconds, self._host.starving_s)

    @property
    def proxy_away_s(self) -> float:
        """How long no proxy has answered: the runner then claims nothing."""
        return self._proxies.away_s

    @property
    def trouble(self) -> str | None:
        """Why no task is claimed."""
        return self._proxies.trouble

    def collect(self) -> Iterable[Metric]:
        """Prometheus' collector, from any thread: the metrics of hooks."""
        return self._collect()

    def agents_usage(self) -> Usage | None:
        """What its agent processes use, from any thread; None if agents run in threads of this process."""
        return usage_of(self._pids()) if self._processes else None

    def load(self) -> tuple[int, int]:
        """Slots, and running attempts."""
        return self._concurrency * (self._processes or 1), len(self._running)

    def _make_host(self) -> AgentHost:
        options = HostOptions(
            self._concurrency,
            self._changed.set,
            self._late_span,
            self._blobs.put,
            self._policy.host,
            self._metrics.process_ended,
        )
        if self._processes == 0:
            if self._memory_limit or self._max_attempts or self._user:
                raise ConfigError(
                    "--memory-limit, --max-attempts-per-process and --agent-user need agent processes (--processes)"
                )
            return ThreadHost(self._config, options)
        for hook in self._config.hooks:
            if not isinstance(hook, str):
                name = type(hook).__name__
                raise ConfigError(f"hook {name}(…) can't go to agent processes: name it module:attribute")
        return ProcessHost(
            self._config,
            options,
            processes=self._processes,
            environment=self._environment,
            memory_limit=self._memory_limit,
            max_attempts=self._max_attempts,
            user=self._user,
        )

    async def _claim(self, claims: Claims, control: ControlFollower) -> None:
        """Claims as many tasks as there are free slots. Waits for a task, for a slot, or for a proxy that answers."""
        if self._host.lost is not None:
            raise self._host.lost
        self._changed.clear()
        if self._running:
            await asyncio.sleep(self._policy.gather_s)
        self._run_suspects()
        free = self._host.free - len(self._suspects)
        if free > 0 and not await self._proxies.available(control.all_latest()):
            await claims.stay(0)
            await asyncio.sleep(self._policy.poll_s)
            return
        if free > 0:
            for claim in await claims.claim(free, self._policy.poll_s):
                self._begin(claim, control)
            return
        try:
            await asyncio.wait_for(self._changed.wait(), self._policy.stay_s)
        except TimeoutError:
            await claims.stay(0)

    def _begin(self, claim: Claim, control: ControlFollower) -> None:
        writer = AttemptWriter(
            claim, self._producer, self._topics, self.worker_id, self._blobs, on_dead_letter=self._metrics.dead_letter
        )
        self._running[writer] = {}
        writer.outcome.add_done_callback(lambda outcome: self._finish_soon(writer, outcome.result()))
        if (refusal := self._refusal(claim, control)) is not None:
            writer.verdict = refusal
            writer.end(refusal)
            return
        self._later(writer, "beat", claim.task.lease_s / self._policy.heartbeats, self._beat)
        if self._suspected(claim):
            self._suspects.append(writer)
            self._run_suspects()
        else:
            self._run(writer)

    def _suspected(self, claim: Claim) -> bool:
        return claim.task.crashes >= self._policy.alone_from

    def _run_suspects(self) -> None:
        while self._suspects and self._host.free_alone > 0:
            self._run(self._suspects.popleft(), alone=True)

    def _run(self, writer: AttemptWriter, *, alone: bool = False) -> None:
        task = writer.claim.task
        writer.proxy_url = self._proxies.choose(writer.claim)
        if writer.proxy_url or self._settings.gateway_url:
            writer.proxy_key = self._proxies.key(writer.claim)
        self._later(writer, "timeout", task.timeout_s, self._time_out)
        if task.unresponsive_s is not None:
            self._later(writer, "silence", task.unresponsive_s, self._check_silence)
        self._host.run(writer, alone=alone)

    def _refusal(self, claim: Claim, control: ControlFollower) -> Outcome | None:
        """The outcome of a claim that can't run."""
        if claim.refused is not None:
            return claim.refused
        if (what := control.cancelled(claim.task)) is not None:  # perhaps since its claim began
            return _cancelled(what)
        wanted = claim.task.metadata.get(semconv.AGENT_NAME, self._config.name)
        if wanted != self._config.name:
            message = f"the task is for agent {wanted}, but this runner runs {self._config.name}; "
            message += "give each agent's tasks and runners a topic_prefix of their own"
            return stopped_by(status.FAILED, "agent", message)
        if claim.resources is None:
            message = f"resources {claim.task.resources_id} do not exist on {self._topics.control}"
            return stopped_by(status.FAILED, "resources", message)
        if self._host.free <= 0 and not self._suspected(claim):  # the process with the free slot has died
            return stopped_by(status.LOST, "exit", "there is no agent process left to run it")
        return None

    def _later(self, writer: AttemptWriter, name: str, seconds: float, call: Callable[[AttemptWriter], None]) -> None:
        self._running[writer][name] = self._loop.call_later(seconds, call, writer)

    def _beat(self, writer: AttemptWriter) -> None:
        lease_s = writer.claim.task.lease_s
        silent_s = time.monotonic() - writer.last_acknowledged
        if silent_s > lease_s and not writer.outcome.done():
            message = f"no heartbeat was acknowledged for {silent_s:.1f} s, longer than its lease of {lease_s:g} s"
            logger.error("the attempt is ended: %s", message, extra=writer.fields)
            writer.verdict = stopped_by(status.LOST, "lease", message)
            self._host.kill(writer)
            return
        writer.heartbeat()
        seconds = lease_s / self._policy.heartbeats
        if not writer.outcome.done():  # else its end is being written, however long that takes
            seconds = min(seconds, max(lease_s - silent_s, 0.0) + 0.01)  # the end of the lease may come first
        self._later(writer, "beat", seconds, self._beat)

    def _time_out(self, writer: AttemptWriter) -> None:
        seconds = writer.claim.task.timeout_s
        self._stop(writer, stopped_by(status.TIMEOUT, "timeout", f"the agent ran for longer than {seconds:g} s"))

    def _check_silence(self, writer: AttemptWriter) -> None:
        limit_s, silent_s = writer.claim.task.unresponsive_s or 0.0, writer.silent_s
        if silent_s < limit_s:
            self._later(writer, "silence", limit_s - silent_s + 0.01, self._check_silence)
        else:
            message = f"the agent made no span and no model call for {limit_s:g} s"
            self._stop(writer, stopped_by(status.UNRESPONSIVE, "unresponsive", message))

    def _end_cancelled(self, control: ControlFollower) -> None:
        for writer in self._running:
            if (what := control.cancelled(writer.claim.task)) is not None:
                self._stop(writer, _cancelled(what))

    def _stop(self, writer: AttemptWriter, verdict: Outcome) -> None:
        """Asks the agent to end, and kills it after a grace period. The first verdict holds."""
        if writer.outcome.done() or writer.verdict is not None:
            return
        writer.verdict = verdict
        if writer in self._suspects:
            self._suspects.remove(writer)
            writer.end(verdict)
            return
        self._host.cancel(writer)
        self._later(writer, "kill", self._policy.cancel_grace_s, self._kill)

    def _kill(self, writer: AttemptWriter) -> None:
        if not writer.outcome.done():
            logger.warning("the attempt did not end when asked to, it is killed", extra=writer.fields)
            self._host.kill(writer)

    def _finish_soon(self, writer: AttemptWriter, outcome: Outcome) -> None:
        self._supervisor.job("finish", self._finish(writer, outcome))

    async def _notice(self, stop: asyncio.Event) -> None:
        await stop.wait()
        self._changed.set()

    async def _finish(self, writer: AttemptWriter, outcome: Outcome) -> None:
        proxy_spans: int | None = None
        try:
            if writer.proxy_url:
                try:
                    calls = await self._proxies.close_attempt(writer.claim, writer.proxy_url, writer.proxy_key)
                    proxy_spans, outcome = calls.made, calls.outcome(outcome)
                except ProxyNotClosed as error:
                    outcome = stopped_by(status.LOST, error.cause, str(error))
            final = await writer.finish(outcome, proxy_spans)
            self._metrics.ended(final.status, time.monotonic() - writer.began, writer.spans)
            if final.error is not None:
                level = logging.INFO if final.status == status.CANCELLED else logging.WARNING
                said = (final.status, final.error.type, final.error.message)
                logger.log(level, "attempt %s: %s: %s", *said, extra=writer.fields)
        except LogError as error:
            logger.error("the attempt's end can't be written, its lease will expire: %s", error, extra=writer.fields)
        except Exception:  # a fault of ours: it costs this attempt, not the runner with all others
            logger.exception("the attempt's end can't be written, its lease will expire", extra=writer.fields)
        finally:
            for timer in self._running.pop(writer).values():
                timer.cancel()
            self._changed.set()

    def _late_span(self, encoded: bytes) -> None:
        """Records a span of an attempt that has ended: it reaches the store and is not trained on."""
        try:
            span = codec.decode_as(Span, encoded)
            if span.source != semconv.SOURCE_AGENT:
                raise CodecError(f"its source is {span.source!r}")
            headers = {KIND_HEADER: span.kind.encode()}
            self._producer.send(self._topics.events, encoded, key=span.rollout_id, headers=headers)
            self._metrics.late_span()
        except MillstreamError as error:
            logger.warning("a late span is not recorded: %s", error)

    async def _until_idle(self, seconds: float) -> None:
        """Waits for running attempts, for at most ``seconds``."""
        deadline = time.monotonic() + seconds
        while self._running and (left := deadline - time.monotonic()) > 0:
            self._changed.clear()
            with suppress(TimeoutError):
                await asyncio.wait_for(self._changed.wait(), left)

    async def _end_all(self) -> None:
        for writer in self._running:
            if not writer.outcome.done() and writer.verdict is None:
                writer.verdict = stopped_by(status.LOST, "stopped", f"runner {self.worker_id} was stopped")
            if writer in self._suspects:
                writer.end(Outcome(status.LOST))
        self._collect = tuple
        await self._host.close()
        await self._until_idle(self._policy.proxies.close_s)
