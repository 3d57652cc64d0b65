"""AutoGen: an agent whose turns are recorded with their input and output."""

from collections.abc import AsyncGenerator, Awaitable, Callable, Iterator, Sequence
from contextlib import aclosing, contextmanager
from functools import partial
from typing import Any

import wrapt
from autogen_agentchat.base import ChatAgent
from opentelemetry import context as otel

from millstream.producers.agent.attempt import current_attempt
from millstream.producers.agent.client_binding import OutsideRollout
from millstream.producers.agent.operation import Operation, operation
from millstream.producers.agent.shared_threads import running_attempt
from millstream.schemas.spans import semconv


class AutoGenTracer(wrapt.ObjectProxy):  # type: ignore[type-arg]
    """Takes the place of its agent, in a team or alone. Everything that the agent does in a turn (model calls, tools)
    is below a span ``turn NAME``, which has the turn's input and output messages, including thoughts.

    ``rollout_id`` names the rollout of this process that the agent works for, needed if AutoGen's runtime was started
    elsewhere and serves several rollouts; the default is the rollout whose code runs the agent. Outside of a rollout
    the agent works unrecorded. A turn raises `OutsideRollout` if the named rollout does not run in this process.
    """

    def __init__(self, agent: ChatAgent, *, rollout_id: str | None = None) -> None:
        super().__init__(agent)
        self._self_rollout_id = rollout_id  # ``_self_``: the wrapper's own, for wrapt

    async def on_messages(self, messages: Sequence[Any], *args: Any, **kwargs: Any) -> Any:
        return await self._turn(partial(self.__wrapped__.on_messages, messages, *args, **kwargs), messages)

    async def run(self, *, task: Any = None, **kwargs: Any) -> Any:
        return await self._turn(partial(self.__wrapped__.run, task=task, **kwargs), task)

    def on_messages_stream(self, messages: Sequence[Any], *args: Any, **kwargs: Any) -> AsyncGenerator[Any, None]:
        return self._stream(partial(self.__wrapped__.on_messages_stream, messages, *args, **kwargs), messages)

    def run_stream(self, *, task: Any = None, **kwargs: Any) -> AsyncGenerator[Any, None]:
        return self._stream(partial(self.__wrapped__.run_stream, task=task, **kwargs), task)

    async def _turn(self, work: Callable[[], Awaitable[Any]], messages: Any) -> Any:
        with self._working(), self._operation() as turn:
            turn.set_input(messages=messages)
            answer = await work()
            turn.set_output(answer)
            return answer

    async def _stream(self, work: Callable[[], AsyncGenerator[Any, None]], messages: Any) -> AsyncGenerator[Any, None]:
        async def turn(messages: Any) -> AsyncGenerator[Any, None]:
            async with aclosing(work()) as answers:
                async for answer in answers:
                    yield answer

        answers = self._operation()(turn)(messages)
        try:
            while True:
                with self._working():  # not around the yield: what the caller does with an answer is not the agent's
                    try:
                        answer = await anext(answers)
                    except StopAsyncIteration:
                        return
                yield answer
        finally:
            with self._working():
                await answers.aclose()

    def _operation(self) -> Operation:
        name = self.__wrapped__.name
        return operation(f"turn {name}", {semconv.AGENT_NAME: name})

    @contextmanager
    def _working(self) -> Iterator[None]:
        """Its body belongs to the agent's rollout."""
        rollout_id, here = self._self_rollout_id, current_attempt()
        attempt = here if rollout_id is None else running_attempt(rollout_id)
        if attempt is here:
            yield
            return
        if attempt is None:
            raise OutsideRollout(f"agent {self.__wrapped__.name!r}: rollout {rollout_id} does not run in this process")
        token = otel.attach(attempt.context)
        try:
            yield
        finally:
            otel.detach(token)
