"""Runs attempts: calls the user's agent, traced and with its hooks, many at a time, and reports how each one ended.

The same code runs in an agent process and in a thread of the runner (`hosts`).
"""

import asyncio
import inspect
import logging
import os
import threading
from collections.abc import Callable
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
from millstream.consumers.runner.outcome import Outcome, raised, returned
from millstream.producers.agent.attempt import AttemptContext
from millstream.producers.agent.process_tracer import ProcessTracer, adopt_global_provider
from millstream.schemas.wire import status

logger = logging.getLogger(__name__)

OnEnd = Callable[[Outcome], None]


def open_agent(config: AgentConfig, loop: asyncio.AbstractEventLoop) -> "AttemptRunner":
    """Imports the agent and its hooks into this process and traces it. Raises `ConfigError` if that fails."""
    tracer = ProcessTracer(config.name, config.proxy_urls, config.instrument)
    agent = load_agent(config.agent, config.folder)
    hooks = [load_hook(hook, config.folder) for hook in config.hooks]
    adopt_global_provider()
    return AttemptRunner(agent, tracer, loop, Hooks(hooks, RunnerInfo(config.worker_id, config.name)))


class AttemptRunner:
    """Runs attempts at one agent: an async agent as tasks of ``loop``, a sync one in a thread for each attempt.

    Threads are not reused: they may carry what the last attempt left in them.
    """

    def __init__(
        self, agent: AgentFunction, tracer: ProcessTracer, loop: asyncio.AbstractEventLoop, hooks: Hooks
    ) -> None:
        self._agent = agent
        self._tracer = tracer
        self._loop = loop
        self._hooks = hooks
        self._is_async = is_async(agent)
        self._optional = optional_parameters(agent, AGENT_PARAMETERS)
        self._tasks: dict[str, asyncio.Task[None]] = {}
        self._pid = os.getpid()

    def start(self, attempt: AttemptContext, on_end: OnEnd) -> None:
        """Begins an attempt; call it on the loop's thread. ``on_end`` is called on the thread on which it ended."""
        try:
            _ = attempt.rollout
        except Exception as error:  # its input is not JSON
            on_end(raised(error, cancellable=False))
            return
        hooks = HookedAttempt(self._hooks, self._agent, attempt, self._loop)
        if self._is_async:
            task = self._loop.create_task(self._run_async(attempt, hooks, on_end))
            self._tasks[attempt.attempt_id] = task
            task.add_done_callback(lambda _: self._tasks.pop(attempt.attempt_id, None))
        else:
            name = f"attempt-{attempt.attempt_id}"
            threading.Thread(target=self._run_sync, args=(attempt, hooks, on_end), name=name, daemon=True).start()

    def cancel(self, attempt_id: str) -> None:
        """Asks an async attempt to end; it then ends as `status.CANCELLED`. A sync one can't be asked."""
        task = self._tasks.get(attempt_id)
        if task is not None:
            task.cancel()

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
                    trace.error, outcome = error, raised(error, cancellable=True)
                    if outcome.status == status.FAILED:
                        outcome = hooks.decided(outcome, await call("on_error", rollout, error))
                    raise
                finally:
                    trace.end(outcome)
                    await call("on_trace_end", trace, rollout)
        except BaseException as error:
            if error is not trace.error:
                outcome = raised(error, cancellable=True)
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
                    outcome = raised(error, cancellable=False)
                    outcome = hooks.decided(outcome, call("on_error", rollout, error))
                    raise
                finally:
                    trace.end(outcome)
                    call("on_trace_end", trace, rollout)
        except BaseException as error:
            if error is not trace.error:
                outcome = raised(error, cancellable=False)
        trace.status = outcome.status
        call("on_rollout_end", rollout, outcome.status)
        self._end(outcome, hooks, on_end)

    def _end(self, outcome: Outcome, hooks: HookedAttempt, on_end: OnEnd) -> None:
        hooks.trace.error = None  # its traceback refers to the attempt: a reference cycle
        if os.getpid() != self._pid:
            logger.warning("a process that the agent forked came back from it (%s) and ends here", outcome.status)
            os._exit(1)  # the attempt goes on in the process that forked it
        on_end(outcome)

    def _arguments(self, attempt: AttemptContext) -> dict[str, Any]:
        return {name: getattr(attempt, name) for name in self._optional}
