"""The runner: claims tasks, has the agent run on them, and writes how each attempt ends.

    claim (preparing, acknowledged, committed) ─► host runs the agent: running, spans, heartbeats
        ─► agent is done ─► closed at the proxy ─► all spans acknowledged ─► terminal event

Stateless: what has been claimed lives in the log. Heartbeats come from here, not from the agent, so an agent that
blocks keeps its lease; a runner whose heartbeats are not acknowledged for a lease ends its own attempts, because by
then the adapter has given them to somebody else.
"""

import asyncio
import logging
import os
import time
from collections.abc import Callable, Iterable, Mapping, Sequence
from contextlib import suppress
from pathlib import Path

from prometheus_client import Metric

from millstream.consumers.control import ControlFollower
from millstream.consumers.log.port import Log
from millstream.consumers.runner.agent import AgentConfig, AgentFunction
from millstream.consumers.runner.attempt_writer import AttemptWriter
from millstream.consumers.runner.claims import ROLE, Claim, Claims, Starvation
from millstream.consumers.runner.hooks import Hook
from millstream.consumers.runner.hosts.port import AgentHost, HostOptions
from millstream.consumers.runner.hosts.processes import ProcessHost
from millstream.consumers.runner.hosts.threads import ThreadHost
from millstream.consumers.runner.outcome import Outcome, stopped_by
from millstream.consumers.runner.proxies import CLOSE_S, Proxies, ProxyNotClosed
from millstream.producers.agent.instrumentation import chosen, report
from millstream.producers.blob_store import Blobs
from millstream.producers.log.port import Producer
from millstream.producers.workers import new_worker_id, reporting
from millstream.schemas.config.settings import Settings
from millstream.schemas.errors import ConfigError, LogError, MillstreamError
from millstream.schemas.wire import codec, status
from millstream.schemas.wire.log import KIND_HEADER
from millstream.schemas.wire.records import Span

logger = logging.getLogger(__name__)

CLAIM_S = 0.2  # how long one poll for tasks waits; also how late a stop may be noticed
GATHER_S = 0.005  # slots that become free one after the other are filled by one claim, with one commit
STAY_S = 2.0  # between signs of life to the group while there is no free slot
CANCEL_GRACE_S = 5.0  # between asking an agent to end and ending it
HEARTBEATS = 3  # in a lease

# What every agent process gets of the environment; nothing else unless it is named: no settings of ours, no secrets.
ENVIRONMENT = ("PATH", "HOME", "USER", "LANG", "TZ", "TMPDIR", "VIRTUAL_ENV", "LD_LIBRARY_PATH", "SSL_CERT_FILE")
ENVIRONMENT_PREFIXES = ("LC_", "PYTHON")


def agent_environment(names: Sequence[str], environment: Mapping[str, str] | None = None) -> dict[str, str]:
    """The environment of an agent process: the basics and the variables named.

    Raises `ConfigError` for a name that is not set.
    """
    environment = os.environ if environment is None else environment
    for name in names:
        if name not in environment:
            raise ConfigError(f"--env {name}: there is no such environment variable here; set it, or leave it out")
    return {
        name: value
        for name, value in environment.items()
        if name in ENVIRONMENT or name in names or name.startswith(ENVIRONMENT_PREFIXES)
    }


def _cancelled(what: str) -> Outcome:
    return stopped_by(status.CANCELLED, "cancelled", f"{what} has been cancelled")


_Timers = dict[str, asyncio.TimerHandle]


class Runner:
    """Runs one agent: ``module:attribute``, found from ``folder`` (the current one), or a callable.

    With ``processes`` 0, and for a callable, attempts run in threads of this process, ``concurrency`` at a time; else
    in child processes, ``concurrency`` in each, which see the environment variables named by ``env`` besides the
    basics, hold ``memory_limit`` MiB at most, and are replaced after ``max_attempts_per_process``.
    ``hooks``: ``module:attribute``, or objects where attempts run in threads. ``instrument``: see `chosen`.
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
        hooks: Sequence[Hook | str] = (),
        instrument: str | None = None,
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
        self._memory_limit = memory_limit
        self._max_attempts = max_attempts_per_process
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
        )
        self._proxies = Proxies(settings.proxy_urls, settings.proxy_secret.get_secret_value())
        self._running: dict[AttemptWriter, _Timers] = {}  # until their terminal event is written
        self._finishing: set[asyncio.Task[None]] = set()
        self._changed = asyncio.Event()
        self._starvation = Starvation()
        self._collect: Callable[[], Iterable[Metric]] = tuple

    async def run(self, stop: asyncio.Event) -> None:
        """Works until ``stop`` is set, then lets running attempts end for ``drain_s``; the rest ends as lost.

        Raises `ConfigError` if the agent can't be imported, `MillstreamError` if its processes no longer start.
        """
        self._loop = asyncio.get_running_loop()
        report(self._config.instrument)
        self._producer: Producer = self._log.producer()
        self._blobs = Blobs(self._settings.blob_url)
        self._host = self._make_host()
        self._collect = self._host.collect
        control = ControlFollower(self._log, self._topics, lambda: self._end_cancelled(control))
        claims = Claims(self._log, self._topics, self._producer, control, self.worker_id)
        self._starvation = claims.starvation
        try:
            await self._host.start()
            await control.start()
            await claims.start()
            logger.info("runner %s is ready: %d slots", self.worker_id, self._host.free)
            stopping = asyncio.create_task(stop.wait())
            stopping.add_done_callback(lambda _: self._changed.set())
            try:
                async with reporting(self._producer, self._topics, ROLE, self.worker_id, self.load):
                    while not stop.is_set():
                        await self._claim(claims, stopping)
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
    def silent_s(self) -> float:
        """How long ago the oldest of the last acknowledged heartbeats of the running attempts was sent."""
        return time.monotonic() - min((w.last_acknowledged for w in self._running), default=time.monotonic())

    @property
    def starving_s(self) -> float:
        """How long tasks have become more and more, slots have been free, and none has been got."""
        return self._starvation.seconds

    def collect(self) -> Iterable[Metric]:
        """Prometheus' collector, from any thread: what hooks count where the agent runs."""
        return self._collect()

    def load(self) -> tuple[int, int]:
        """Slots, and attempts that run."""
        return self._concurrency * (self._processes or 1), len(self._running)

    def _make_host(self) -> AgentHost:
        options = HostOptions(self._concurrency, self._changed.set, self._late_span, self._blobs.put)
        if self._processes == 0:
            if self._memory_limit or self._max_attempts:
                raise ConfigError("--memory-limit and --max-attempts-per-process need agent processes (--processes)")
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
        )

    async def _claim(self, claims: Claims, stopping: "asyncio.Task[bool]") -> None:
        """Claims as many tasks as there are free slots; waits for the one or the other."""
        if self._host.lost is not None:
            raise self._host.lost
        self._changed.clear()
        if self._running:
            await asyncio.sleep(GATHER_S)
        free = self._host.free
        if free > 0:
            for claim in await claims.claim(free, CLAIM_S):
                self._begin(claim)
            return
        try:
            await asyncio.wait_for(self._changed.wait(), STAY_S)
        except TimeoutError:
            await claims.stay(0)

    def _begin(self, claim: Claim) -> None:
        writer = AttemptWriter(claim, self._producer, self._topics, self.worker_id, self._blobs)
        self._running[writer] = {}
        writer.outcome.add_done_callback(lambda outcome: self._finish_soon(writer, outcome.result()))
        if claim.cancelled is not None:
            writer.verdict = _cancelled(claim.cancelled)
            writer.end(writer.verdict)
        elif claim.resources is None:
            message = f"resources {claim.task.resources_id} do not exist on {self._topics.control}"
            writer.verdict = stopped_by(status.FAILED, "resources", message)
            writer.end(writer.verdict)
        elif self._host.free <= 0:  # the process that this one was claimed for has died
            writer.verdict = stopped_by(status.LOST, "exit", "there is no agent process left to run it")
            writer.end(writer.verdict)
        else:
            writer.proxy_url = self._proxies.choose(claim)
            if writer.proxy_url or self._settings.gateway_url:
                writer.proxy_key = self._proxies.key(claim)
            self._later(writer, "timeout", claim.task.timeout_s, self._time_out)
            self._later(writer, "beat", claim.task.lease_s / HEARTBEATS, self._beat)
            if claim.task.unresponsive_s is not None:
                self._later(writer, "silence", claim.task.unresponsive_s, self._check_silence)
            self._host.run(writer)

    def _later(self, writer: AttemptWriter, name: str, seconds: float, call: Callable[[AttemptWriter], None]) -> None:
        self._running[writer][name] = self._loop.call_later(seconds, call, writer)

    def _beat(self, writer: AttemptWriter) -> None:
        lease_s = writer.claim.task.lease_s
        silent_s = time.monotonic() - writer.last_acknowledged
        if silent_s > lease_s and not writer.outcome.done():
            message = f"no heartbeat was acknowledged for {silent_s:.1f} s, longer than its lease of {lease_s:g} s"
            logger.error("%s is ended: %s", writer.name, message)
            writer.verdict = stopped_by(status.LOST, "lease", message)
            self._host.kill(writer)
            return
        writer.heartbeat()
        # The next one, or the end of the lease if that comes first.
        seconds = min(lease_s / HEARTBEATS, max(lease_s - silent_s, 0.0) + 0.01)
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
        """Asks the agent to end, and after a while sees to it. The first verdict holds."""
        if writer.outcome.done() or writer.verdict is not None:
            return
        writer.verdict = verdict
        self._host.cancel(writer)
        self._later(writer, "kill", CANCEL_GRACE_S, self._kill)

    def _kill(self, writer: AttemptWriter) -> None:
        if not writer.outcome.done():
            logger.warning("%s does not end when asked to, it is killed", writer.name)
            self._host.kill(writer)

    def _finish_soon(self, writer: AttemptWriter, outcome: Outcome) -> None:
        task = self._loop.create_task(self._finish(writer, outcome))
        self._finishing.add(task)
        task.add_done_callback(self._finishing.discard)

    async def _finish(self, writer: AttemptWriter, outcome: Outcome) -> None:
        proxy_spans: int | None = None
        try:
            if writer.proxy_url:
                try:
                    proxy_spans = await self._proxies.close_attempt(writer.claim, writer.proxy_url, writer.proxy_key)
                except ProxyNotClosed as error:
                    outcome = stopped_by(status.LOST, "proxy", str(error))
            final = await writer.finish(outcome, proxy_spans)
            if final.error is not None:
                logger.warning("%s: %s, %s: %s", writer.name, final.status, final.error.type, final.error.message)
        except LogError as error:
            logger.error("%s: its end can't be written, its lease will run out: %s", writer.name, error)
        finally:
            for timer in self._running.pop(writer).values():
                timer.cancel()
            self._changed.set()

    def _late_span(self, encoded: bytes) -> None:
        """Of an attempt that is over: it reaches the store, nobody trains on it."""
        try:
            span = codec.decode_as(Span, encoded)
            headers = {KIND_HEADER: span.kind.encode()}
            self._producer.send(self._topics.events, encoded, key=span.rollout_id, headers=headers)
        except MillstreamError as error:
            logger.warning("a late span is not recorded: %s", error)

    async def _until_idle(self, seconds: float) -> None:
        """Waits for the attempts that run, at most so long."""
        deadline = time.monotonic() + seconds
        while self._running and (left := deadline - time.monotonic()) > 0:
            self._changed.clear()
            with suppress(TimeoutError):
                await asyncio.wait_for(self._changed.wait(), left)

    async def _end_all(self) -> None:
        for writer in self._running:
            if not writer.outcome.done() and writer.verdict is None:
                writer.verdict = stopped_by(status.LOST, "stopped", f"runner {self.worker_id} was stopped")
        self._collect = tuple
        await self._host.close()
        await self._until_idle(CLOSE_S)
