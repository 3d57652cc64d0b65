"""Runs attempts: calls the user's agent, traced and with its hooks, many at a time, and reports how each one ended.

The same code runs in an agent process and in a thread of the runner (`hosts`).
"""

import asyncio
import inspect
import logging
import os
import threading
from collections.abc import Callable
from functools import partial
from typing import Any

from millstream.consumers.runner.agent import (
    AGENT_PARAMETERS,
    AgentConfig,
    AgentFunction,
    is_async,
    load_agent,
    load_hook,
    optional_parameters,
)
from millstream.consumers.runner.hooks import HookedAttempt, Hooks, RunnerInfo
from millstream.consumers.runner.outcome import Outcome, raised, returned, stopped_by
from millstream.producers.agent.attempt import AttemptContext, current_attempt
from millstream.producers.agent.process_tracer import ProcessTracer, adopt_global_provider
from millstream.schemas.wire import status

logger = logging.getLogger(__name__)

OnEnd = Callable[[Outcome], None]


def run_forever(loop: asyncio.AbstractEventLoop) -> None:
    """Runs ``loop`` until it is stopped. SystemExit and KeyboardInterrupt of a task end that task alone, and what
    awaits it; asyncio would end the loop, and with it every attempt that runs there."""
    while True:
        try:
            loop.run_forever()
        except (SystemExit, KeyboardInterrupt) as error:
            logger.warning("a task that an agent has started raised %r: it alone ends", error)
        else:
            return


class _LoopPolicy(asyncio.DefaultEventLoopPolicy):
    """Gives the thread of a sync attempt an event loop when it asks for one, as the main thread of a program has."""

    _own = threading.local()

    def get_event_loop(self) -> asyncio.AbstractEventLoop:
        try:
            return super().get_event_loop()
        except RuntimeError:
            if current_attempt() is None:
                raise
            self._own.loop = loop = self.new_event_loop()
            self.set_event_loop(loop)
            return loop

    @classmethod
    def close_own(cls) -> None:
        """Closes the loop that this thread was given."""
        if (loop := getattr(cls._own, "loop", None)) is not None:
            del cls._own.loop
            asyncio.set_event_loop(None)
            if not loop.is_running():
                loop.close()


def _in_thread(work: Callable[[], None], name: str) -> None:
    threading.Thread(target=work, name=name, daemon=True).start()


def open_agent(config: AgentConfig, loop: asyncio.AbstractEventLoop) -> "AttemptRunner":
    """Imports the agent and its hooks into this process and traces it. Raises `ConfigError` if that fails."""
    tracer = ProcessTracer(config.name, config.proxy_urls, config.instrument)
    agent = load_agent(config.agent, config.folder)
    hooks = [load_hook(hook, config.folder) for hook in config.hooks]
    adopt_global_provider()
    if type(asyncio.get_event_loop_policy()) is asyncio.DefaultEventLoopPolicy:  # else the agent has its own
        asyncio.set_event_loop_policy(_LoopPolicy())
    return AttemptRunner(agent, tracer, loop, Hooks(hooks, RunnerInfo(config.worker_id, config.name)))


class AttemptRunner:
    """Runs attempts at one agent: an async agent as tasks of ``loop``, a sync one in a thread for each attempt, or as
    ``run_sync`` does it.

    Threads are not reused: they may carry what the last attempt left in them.
    """

    def __init__(
        self, agent: AgentFunction, tracer: ProcessTracer, loop: asyncio.AbstractEventLoop, hooks: Hooks
    ) -> None:
        self._agent = agent
        self._tracer = tracer
        self._loop = loop
        self._hooks = hooks
        self.is_async = is_async(agent)
        # Runs a sync attempt, by default in a new thread of this name. It must not block the loop.
        self.run_sync: Callable[[Callable[[], None], str], None] = _in_thread
        self._optional = optional_parameters(agent, AGENT_PARAMETERS)
        self._tasks: dict[str, asyncio.Task[None]] = {}
        self._asked: set[str] = set()  # attempts that were asked to end
        self._pid = os.getpid()

    def start(self, attempt: AttemptContext, on_end: OnEnd) -> None:
        """Begins an attempt; call it on the loop's thread. ``on_end`` is called on the thread on which it ended."""
        try:
            _ = attempt.rollout
        except Exception as error:  # its input is not JSON
            on_end(raised(error))
            return
        hooks = HookedAttempt(self._hooks, self._agent, attempt, self._loop)
        if self.is_async:
            task = self._loop.create_task(self._run_async(attempt, hooks, on_end))
            self._tasks[attempt.attempt_id] = task
            task.add_done_callback(lambda _: self._forget(attempt.attempt_id))
            return
        try:
            self.run_sync(partial(self._run_sync, attempt, hooks, on_end), f"attempt-{attempt.attempt_id}")
        except RuntimeError as error:  # the machine has no room for another thread
            on_end(stopped_by(status.LOST, "thread", f"no thread can be started for the agent: {error}"))

    def cancel(self, attempt_id: str) -> None:
        """Asks an async attempt to end; it then ends as `status.CANCELLED`. A sync one can't be asked."""
        task = self._tasks.get(attempt_id)
        if task is not None:
            self._asked.add(attempt_id)
            task.cancel()

    def _forget(self, attempt_id: str) -> None:
        self._tasks.pop(attempt_id, None)
        self._asked.discard(attempt_id)

    async def _run_async(self, attempt: AttemptContext, hooks: HookedAttempt, on_end: OnEnd) -> None:
        rollout, trace, call = attempt.rollout, hooks.trace, hooks.call
        try:
            await call("on_rollout_start", rollout)
            with self._tracer.attempt(attempt):
                try:
                    await call("on_trace_start", trace, rollout)
                    trace.begin()
                    # Called here and not in a coroutine of its own, which would change a StopIteration.
                    outcome = returned(attempt, await self._agent(rollout.input, **self._arguments(attempt)))
                except BaseException as error:  # an agent's sys.exit() ends its own attempt only
                    trace.error, outcome = error, raised(error, asked=attempt.attempt_id in self._asked)
                    if outcome.status == status.FAILED:
                        outcome = hooks.decided(outcome, await call("on_error", rollout, error))
                    raise
                finally:
                    trace.end(outcome)
                    await call("on_trace_end", trace, rollout)
        except BaseException as error:
            if error is not trace.error:
                outcome = raised(error, asked=attempt.attempt_id in self._asked)
        trace.status = outcome.status
        await call("on_rollout_end", rollout, outcome.status)
        self._end(outcome, hooks, on_end)

    def _run_sync(self, attempt: AttemptContext, hooks: HookedAttempt, on_end: OnEnd) -> None:
        """The same in a thread, which waits while the loop calls the hooks."""
        rollout, trace, call = attempt.rollout, hooks.trace, hooks.call_blocking
        try:
            call("on_rollout_start", rollout)
            with self._tracer.attempt(attempt):
                try:
                    call("on_trace_start", trace, rollout)
                    trace.begin()
                    result = self._agent(rollout.input, **self._arguments(attempt))
                    if inspect.iscoroutine(result):  # a sync wrapper around an async agent
                        result = asyncio.run(result)
                    outcome = returned(attempt, result)
                except BaseException as error:
                    trace.error = error
                    outcome = raised(error)
                    outcome = hooks.decided(outcome, call("on_error", rollout, error))
                    raise
                finally:
                    trace.end(outcome)
                    call("on_trace_end", trace, rollout)
        except BaseException as error:
            if error is not trace.error:
                outcome = raised(error)
        trace.status = outcome.status
        call("on_rollout_end", rollout, outcome.status)
        self._end(outcome, hooks, on_end)

    def _end(self, outcome: Outcome, hooks: HookedAttempt, on_end: OnEnd) -> None:
        _LoopPolicy.close_own()
        hooks.trace.error = None  # its traceback refers to the attempt: a reference cycle
        if os.getpid() != self._pid:
            logger.warning("a process that the agent forked came back from it (%s) and ends here", outcome.status)
            os._exit(1)  # the attempt goes on in the process that forked it
        on_end(outcome)

    def _arguments(self, attempt: AttemptContext) -> dict[str, Any]:
        return {name: getattr(attempt, name) for name in self._optional}
