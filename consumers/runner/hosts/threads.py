"""Runs agents in threads of the runner."""

import asyncio
from collections.abc import Iterable, Sequence
from contextlib import suppress
from dataclasses import replace
from threading import Thread

from prometheus_client import REGISTRY, Metric

from millstream.consumers.runner.agent import AgentConfig
from millstream.consumers.runner.attempt import AttemptRunner, open_agent, run_forever
from millstream.consumers.runner.attempt_writer import AttemptWriter
from millstream.consumers.runner.hosts.port import HostOptions
from millstream.consumers.runner.outcome import Outcome
from millstream.producers.agent.attempt import AttemptContext
from millstream.producers.supervisor import supervisor
from millstream.schemas.wire import status


class ThreadHost:
    """Async agents run on an event loop in a thread of its own, so that an agent that blocks delays neither claims nor
    heartbeats; sync agents run in a thread each. Spans are not encoded here."""

    lost: Exception | None = None
    starving_s = 0.0

    def __init__(self, config: AgentConfig, options: HostOptions) -> None:
        self._config = config
        self._options = options
        self._running: set[AttemptWriter] = set()
        self._loop = asyncio.new_event_loop()
        self._thread: Thread | None = None
        self._closing = False
        self._home = asyncio.get_running_loop()
        self._attempts: AttemptRunner | None = None

    @property
    def free(self) -> int:
        return self._options.concurrency - len(self._running)

    @property
    def free_alone(self) -> int:
        return self.free

    async def start(self) -> None:
        self._attempts = open_agent(self._config, self._loop)
        self._thread = supervisor().thread("millstream-agents", self._run_loop)

    @property
    def pids(self) -> Sequence[int]:
        return ()

    def collect(self) -> Iterable[Metric]:
        # The runner's registry has the process's own metrics; Prometheus refuses a page that holds a series twice.
        return (metric for metric in REGISTRY.collect() if not metric.name.startswith("process_"))

    def run(self, writer: AttemptWriter, *, alone: bool = False) -> None:
        assert self._attempts is not None, "start() first"
        claim = writer.claim
        attempt = AttemptContext(
            claim.task,
            claim.attempt_id,
            writer.emit,
            writer.save_state,
            resources={} if claim.resources is None else claim.resources.items,
            on_calling=writer.calling,
            proxy_url=writer.proxy_url,
            proxy_key=writer.proxy_key,
            gateway_url=self._config.gateway_url,
        )
        self._running.add(writer)
        self._loop.call_soon_threadsafe(self._begin, self._attempts, attempt, writer)

    def cancel(self, writer: AttemptWriter) -> None:
        if self._attempts is not None:
            self._loop.call_soon_threadsafe(self._attempts.cancel, writer.claim.attempt_id)

    def kill(self, writer: AttemptWriter) -> None:
        """A thread can't be killed: the attempt ends, and its thread runs on."""
        self._end(writer, Outcome(status.LOST))

    async def close(self) -> None:
        idle, policy, self._closing = True, self._options.policy, True
        running = self._thread is not None and self._thread.is_alive()
        if running:
            ending = asyncio.run_coroutine_threadsafe(_cancel_all(policy.cancel_s), self._loop)
            try:
                idle = await asyncio.wait_for(asyncio.wrap_future(ending), policy.stop_s)
            except TimeoutError:  # an agent blocks the loop
                idle = False
        for writer in list(self._running):
            self.kill(writer)
        if idle:
            if running:
                assert self._thread is not None
                self._loop.call_soon_threadsafe(self._loop.stop)
                await asyncio.to_thread(self._thread.join)
            self._loop.close()

    def _run_loop(self) -> None:
        run_forever(self._loop)
        if not self._closing:
            raise RuntimeError("an agent has stopped the event loop that all async agents of this runner share")

    def _begin(self, attempts: AttemptRunner, attempt: AttemptContext, writer: AttemptWriter) -> None:
        """On the agents' loop."""
        writer.started()

        def on_end(outcome: Outcome) -> None:
            sealed = replace(outcome, spans=writer.seal())
            with suppress(RuntimeError):  # the runner has ended, and its loop is closed
                self._home.call_soon_threadsafe(self._end, writer, sealed)

        attempts.start(attempt, on_end)

    def _end(self, writer: AttemptWriter, outcome: Outcome) -> None:
        self._running.discard(writer)
        writer.end(outcome)
        self._options.on_free()


async def _cancel_all(seconds: float) -> bool:
    """Whether all tasks of this loop have ended. An agent that ignores its cancellation keeps the loop running."""
    tasks = asyncio.all_tasks() - {asyncio.current_task()}
    for task in tasks:
        task.cancel()
    return not tasks or not (await asyncio.wait(tasks, timeout=seconds))[1]
