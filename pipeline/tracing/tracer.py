"""`ms.Tracer`: an agent with its reward functions, for a runner, a trainer, or traces without either."""

import inspect
from collections.abc import Awaitable, Callable
from dataclasses import replace
from functools import cached_property, update_wrapper
from typing import Any, Literal, TypeVar

from millstream.consumers.log.kafka_log import KafkaLog
from millstream.consumers.log.memory_log import MemoryLog
from millstream.consumers.log.port import Log
from millstream.consumers.runner.agent import AGENT_PARAMETERS, AgentFunction, agent_name, optional_parameters
from millstream.pipeline.tracing.reward_functions import RewardFunctions
from millstream.pipeline.tracing.traced_rollout import TracedRollout
from millstream.producers.agent.attempt import AttemptContext, current_attempt
from millstream.producers.agent.instrumentation import chosen
from millstream.producers.agent.process_tracer import ProcessTracer, adopt_global_provider
from millstream.producers.tasks import TaskLine, group_of
from millstream.schemas.config.settings import Settings, load_settings
from millstream.schemas.errors import ConfigError
from millstream.schemas.wire.records import RolloutTask

F = TypeVar("F", bound=Callable[..., Any])


class Tracer:
    """Takes the place of its agent (``Trainer(runner=tracer)``, ``millstream runner module:tracer``), and calls its
    reward functions with what the agent returns.

    `trace` needs no runner. It writes to ``log``: "memory" (its own), "kafka" (the settings'), or your log. With
    ``proxy_url``, model calls go through that proxy, which records their token ids; its ``proxy_secret`` is the
    settings'. ``instrument``: as ``millstream runner --instrument``.
    """

    def __init__(
        self,
        agent: AgentFunction,
        *,
        log: Log | Literal["memory", "kafka"] = "memory",
        settings: Settings | None = None,
        proxy_url: str = "",
        instrument: str | None = None,
    ) -> None:
        if not callable(agent):
            raise ConfigError(f"a tracer needs a callable agent, not {agent!r}")
        update_wrapper(self, agent)  # its name, its parameters, and whether it is async are the agent's
        self._agent = agent
        self._parameters = optional_parameters(agent, AGENT_PARAMETERS)
        self._reward_functions = RewardFunctions()
        self._log = log
        self._settings = settings
        self._proxy_url = proxy_url
        self._instrument = chosen(instrument)

    def on_completion(self, function: F) -> F:
        """Adds a reward function, sync or async. It gets the agent's result, and ``rollout`` and ``spans`` (those made
        in its process so far) if it has parameters of these names. It returns a number (a reward of the function's
        name), a dict of several by name, or None. An exception fails the attempt."""
        self._reward_functions.add(function)
        return function

    def __call__(self, *args: Any, **kwargs: Any) -> Any:
        """The agent's result, awaitable if the agent is async. Within an attempt, the agent gets ``rollout`` and
        ``resources`` if it has these parameters; outside of one, rewards are not recorded."""
        attempt = current_attempt()
        self._reward_functions.watch(attempt)
        if attempt is not None and len(args) == 1:
            kwargs = {name: getattr(attempt, name) for name in self._parameters} | kwargs
        result = self._agent(*args, **kwargs)
        if inspect.isawaitable(result):
            return self._awaited(attempt, result)
        self._reward_functions.reward(attempt, result)
        return result

    async def _awaited(self, attempt: AttemptContext | None, result: Awaitable[Any]) -> Any:
        answer = await result
        await self._reward_functions.reward_async(attempt, answer)
        return answer

    def trace(self, rollout: Any = None) -> TracedRollout:
        """A rollout to run the agent in. ``rollout`` is a `RolloutTask`, or the input of a new one::

        with tracer.trace({"question": "6 × 7?"}) as trace:
            tracer(trace.rollout.input)
        trace.rewards, trace.triplets
        """
        task = rollout if isinstance(rollout, RolloutTask) else self._new_task(rollout)
        return TracedRollout(task, self.log, self.settings, self._process, self._reward_functions, self._proxy_url)

    @cached_property
    def settings(self) -> Settings:
        return self._settings or load_settings()

    @cached_property
    def log(self) -> Log:
        """Where `trace` writes. An adapter or a sink can read it."""
        if self._log == "memory":
            return MemoryLog(self.settings.topics)
        return KafkaLog(self.settings) if self._log == "kafka" else self._log

    @cached_property
    def _process(self) -> ProcessTracer:
        """Created when needed: a runner has its own."""
        process = ProcessTracer(agent_name(self._agent), [self._proxy_url] if self._proxy_url else [], self._instrument)
        adopt_global_provider()
        return process

    def _new_task(self, given: Any) -> RolloutTask:
        (task,) = group_of(TaskLine.model_validate({"input": given}), self.settings)
        return replace(task, max_attempts=1, max_lost_attempts=0)  # no runner retries it
