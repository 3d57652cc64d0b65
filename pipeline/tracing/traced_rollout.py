"""One rollout without a runner: its body is recorded as an attempt, and can be inspected afterwards."""

import logging
from collections.abc import AsyncIterator, Iterator, Sequence
from contextlib import asynccontextmanager, contextmanager
from types import TracebackType
from typing import Any

from millstream.consumers.adapter.read_trace import read_attempts
from millstream.consumers.adapter.reward_matching import Reward, rewards_of
from millstream.consumers.adapter.triplets import Trace, TripletMaker
from millstream.consumers.log.port import Log
from millstream.consumers.runner.outcome import Outcome, raised, returned
from millstream.pipeline.tracing.blocking import run_blocking
from millstream.pipeline.tracing.own_attempts import OwnAttempt, OwnAttempts
from millstream.pipeline.tracing.reward_functions import RewardFunctions
from millstream.producers.agent.attempt import AttemptContext, RolloutInfo
from millstream.producers.agent.process_tracer import ProcessTracer
from millstream.schemas.config.settings import Settings
from millstream.schemas.errors import MillstreamError
from millstream.schemas.wire import status
from millstream.schemas.wire.records import RolloutTask, Span, Triplet

logger = logging.getLogger(__name__)


class TracedRollout:
    """A rollout of `Tracer.trace`. Enter it once, by ``with``, or by ``async with`` if the event loop must not wait.

    An exception ends it as failed and propagates. After it has been left, ``status`` is how it ended, and ``spans`` are
    all its spans in the log's order, the proxy's among them.
    """

    def __init__(
        self,
        task: RolloutTask,
        log: Log,
        settings: Settings,
        process: ProcessTracer,
        reward_functions: RewardFunctions,
        proxy_url: str = "",
    ) -> None:
        self.status = ""
        self._log = log
        self._settings = settings
        self._process = process
        self._reward_functions = reward_functions
        self._proxy_url = proxy_url
        self._shared = OwnAttempts(log, settings, [proxy_url] if proxy_url else [])
        self._own = OwnAttempt(task, self._shared)
        self._claim, self._writer = self._own.claim, self._own.writer
        self._entered = False
        self._outcome = Outcome(status.SUCCEEDED)
        self._attempt = AttemptContext(
            self._claim.task,
            self._claim.attempt_id,
            self._writer.emit,
            self._writer.save_state,
            on_calling=self._writer.calling,
            proxy_url=proxy_url,
            proxy_key=self._own.proxy_key,
        )
        self._seen = reward_functions.watch(self._attempt)
        self.spans: Sequence[Span] = self._seen.spans

    @property
    def rollout(self) -> RolloutInfo:
        """The ``rollout`` argument of agents."""
        return self._attempt.rollout

    @property
    def result(self) -> Any:
        """What the agent returned. A body that does not call the tracer may set it; the reward functions are then
        called at the end."""
        return self._seen.result

    @result.setter
    def result(self, result: Any) -> None:
        self._seen.result = result

    @property
    def rewards(self) -> list[Reward]:
        """With ``name`` and ``value``, in the order in which they were emitted."""
        return rewards_of(self.spans)

    @property
    def triplets(self) -> list[Triplet]:
        """One for each model call, by the settings' rules; ``reason`` is why one is not trainable."""
        return TripletMaker(self._settings.triplets)(Trace(self._claim.task, self._claim.attempt_id, self.spans))

    def __enter__(self) -> "TracedRollout":
        self._sync = self._running()
        self._sync.__enter__()
        return self

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None, tb: TracebackType | None) -> None:
        self._sync.__exit__(kind, error, tb)

    async def __aenter__(self) -> "TracedRollout":
        self._async = self._running_async()
        await self._async.__aenter__()
        return self

    async def __aexit__(
        self, kind: type[BaseException] | None, error: BaseException | None, tb: TracebackType | None
    ) -> None:
        await self._async.__aexit__(kind, error, tb)

    @contextmanager
    def _running(self) -> Iterator[None]:
        self._begin()
        try:
            with self._recorded():
                yield
                if self._reward_is_due():
                    self._reward_functions.reward(self._attempt, self.result)
        finally:
            run_blocking(self._finish())

    @asynccontextmanager
    async def _running_async(self) -> AsyncIterator[None]:
        self._begin()
        try:
            with self._recorded():
                yield
                if self._reward_is_due():
                    await self._reward_functions.reward_async(self._attempt, self.result)
        finally:
            await self._finish()

    def _begin(self) -> None:
        if self._entered:
            raise MillstreamError("a trace can be entered only once; call Tracer.trace for another")
        self._entered = True
        self._own.begin()

    @contextmanager
    def _recorded(self) -> Iterator[None]:
        """Its body runs as the attempt, as in a runner."""
        try:
            with self._process.attempt(self._attempt):
                yield
                self._outcome = returned(self._attempt, self.result)
        except BaseException as error:
            self._outcome = raised(error, asked=True)
            raise

    def _reward_is_due(self) -> bool:
        if self._seen.rewarded or not self._reward_functions:
            return False
        if self.result is None:
            logger.warning(
                "there is no result for the reward functions: call the tracer instead of the agent, or set the "
                "trace's result",
                extra=self._writer.fields,
            )
        return self.result is not None

    async def _finish(self) -> None:
        """Writes the attempt's end after everything else, and reads its spans. Raises `LogError` if the log fails."""
        try:
            final = await self._own.finish(self._outcome)
            task, topics = self._claim.task, self._settings.topics
            logged, _ = await read_attempts(self._log, topics, task.rollout_id, self._own.start)
            self.spans = logged[self._claim.attempt_id].spans
        finally:
            await self._shared.close()
        self.status = final.status
        if final.error is not None and final.status != self._outcome.status:  # else the caller has the exception
            said = (final.status, final.error.type, final.error.message)
            logger.warning("attempt %s: %s: %s", *said, extra=self._writer.fields)
