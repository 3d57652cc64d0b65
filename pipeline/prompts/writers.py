"""Asks models on behalf of a run: those that criticise and edit prompts, and those that compare the answers of a group.
Their calls go through the proxy, under a name of their own, and are recorded as rollouts of the run that nothing is
trained on; a budget limits them."""

import asyncio
import time
from collections.abc import AsyncIterator, Awaitable, Callable, Mapping
from contextlib import asynccontextmanager
from dataclasses import asdict, dataclass, field
from typing import Any, Final

import aiohttp
from tenacity import AsyncRetrying, retry_if_exception_type, stop_after_attempt, wait_random_exponential

from millstream.consumers.runner.outcome import Outcome, raised
from millstream.pipeline.prompts.texts import Messages, answer_text
from millstream.pipeline.tracing.own_attempts import OwnAttempt, OwnAttempts
from millstream.pipeline.training.run import Run
from millstream.schemas.errors import ConfigError, MillstreamError
from millstream.schemas.ids import new_id, rank
from millstream.schemas.spans import semconv
from millstream.schemas.spans.text import json_text
from millstream.schemas.wire import status
from millstream.schemas.wire.records import RolloutTask

MILLION: Final = 1e6


@dataclass(frozen=True, slots=True)
class WriterPolicy:
    tries: int = 4  # of a call that the proxy could not make; it has tried all replicas by then
    wait_s: float = 2.0  # before the second, at most
    longest_wait_s: float = 30.0  # a proxy is back after a restart by then
    call_s: float = 900.0  # for an answer; a little more than an upstream may take


@dataclass(frozen=True, slots=True, kw_only=True)
class Budget:
    """What may be spent on these calls; None: no limit. Prices are of a million tokens, in any currency. It is checked
    before each call, so that those under way may exceed it."""

    tokens: int | None = None
    money: float | None = None
    prompt_price: float = 0.0
    answer_price: float = 0.0


@dataclass(slots=True)
class Spent:
    """``unknown``: calls whose answer did not say how many tokens it took."""

    calls: int = 0
    prompt_tokens: int = 0
    answer_tokens: int = 0
    unknown: int = 0

    def money(self, budget: Budget) -> float:
        return (self.prompt_tokens * budget.prompt_price + self.answer_tokens * budget.answer_price) / MILLION

    def over(self, budget: Budget) -> str:
        """Why nothing more may be spent; empty if it may."""
        tokens, money = self.prompt_tokens + self.answer_tokens, self.money(budget)
        if budget.tokens is not None and tokens >= budget.tokens:
            return f"the budget of {budget.tokens:,} tokens is used up: {tokens:,} in {self.calls} calls"
        if budget.money is not None and money >= budget.money:
            return f"the budget of {budget.money:g} is used up: {money:.4g} for {tokens:,} tokens"
        return ""


class WriterFailed(MillstreamError):
    """A model gave no usable answer. The message says which, and why."""


class BudgetUsedUp(MillstreamError):
    """Nothing more may be spent."""


class _Passing(Exception):
    """The same call may succeed later."""


Ask = Callable[[str, Messages], Awaitable[str]]
"""The answer of a model, by name. Raises `WriterFailed`, `BudgetUsedUp`."""


@dataclass(slots=True)
class Writers:
    """For one run. ``fields``: of each request, such as ``temperature``. ``asked_by``: what the calls are for, in their
    rollouts' metadata. Raises `ConfigError` without a proxy."""

    run: Run
    budget: Budget
    fields: Mapping[str, Any] = field(default_factory=dict)
    spent: Spent = field(default_factory=Spent)
    policy: WriterPolicy = WriterPolicy()
    asked_by: str = "prompts"
    _own: OwnAttempts = field(init=False)
    _http: aiohttp.ClientSession | None = None

    def __post_init__(self) -> None:
        settings = self.run.settings
        if not settings.proxy_urls:
            raise ConfigError(
                "models that write prompts or judge groups are called through a proxy: set proxy_url, or, for a run in "
                "memory, an upstream of kind openai or anthropic and a route to it"
            )
        self._own = OwnAttempts(self.run.log, settings, settings.proxy_urls)

    @property
    def over(self) -> str:
        """Why nothing more may be spent; empty if it may."""
        return self.spent.over(self.budget)

    async def close(self) -> None:
        await self._own.close()
        if self._http is not None:
            await self._http.close()

    @asynccontextmanager
    async def recorded(self, what: Mapping[str, Any]) -> AsyncIterator[tuple[str, Ask]]:
        """The id of a rollout, whose input is ``what``, and what its body asks models with."""
        rollout_id, settings = new_id(), self.run.settings
        task = RolloutTask(
            rollout_id=rollout_id,
            group_id=rollout_id,
            group_size=1,
            input=json_text(dict(what)),
            mode="test",
            max_attempts=1,
            max_lost_attempts=0,
            timeout_s=2 * self.policy.tries * self.policy.call_s,
            lease_s=settings.lease_s,
            seed=rank(str(self.run.seed), json_text(dict(what))) >> 1,
            experiment_id=self.run.experiment.experiment_id,
            created_at=time.time_ns(),
            metadata={"asked_by": self.asked_by},
        )
        attempt, answers = OwnAttempt(task, self._own), list[str]()

        async def ask(model: str, messages: Messages) -> str:
            answers.append(await self._ask(attempt, model, messages))
            return answers[-1]

        attempt.begin()
        outcome = Outcome(status.SUCCEEDED)
        try:
            yield rollout_id, ask
            outcome = Outcome(status.SUCCEEDED, output=json_text(answers))
        except BaseException as error:
            outcome = raised(error, asked=True)
            raise
        finally:
            await asyncio.shield(attempt.finish(outcome))

    async def _ask(self, attempt: OwnAttempt, model: str, messages: Messages) -> str:
        if over := self.over:
            raise BudgetUsedUp(over)
        body = {**self.fields, "model": model, "messages": messages}
        try:
            async for each in AsyncRetrying(
                retry=retry_if_exception_type(_Passing),
                wait=wait_random_exponential(self.policy.wait_s, self.policy.longest_wait_s),
                stop=stop_after_attempt(self.policy.tries),
                reraise=True,
            ):
                with each:
                    answer = await self._post(attempt, body)
        except _Passing as error:
            raise WriterFailed(f"model {model!r} did not answer: {error}") from error
        text = answer_text(answer)
        if text is None:
            raise WriterFailed(f"model {model!r} answered without a text")
        return text

    async def _post(self, attempt: OwnAttempt, body: Mapping[str, Any]) -> Any:
        headers = {"Authorization": f"Bearer {attempt.proxy_key}", semconv.ASIDE_HEADER: self.asked_by}
        if self._http is None:
            self._http = aiohttp.ClientSession(timeout=aiohttp.ClientTimeout(total=self.policy.call_s))
        url = f"{attempt.base_url}/v1/chat/completions"
        try:
            async with self._http.post(url, json=body, headers=headers) as response:
                if response.status == 429 or response.status >= 500:
                    raise _Passing(f"{response.status} {(await response.text())[:300]}")
                if response.status != 200:
                    text = (await response.text())[:300]
                    raise WriterFailed(f"model {body['model']!r} refused the call: {response.status} {text}")
                answer = await response.json()
        except (aiohttp.ClientError, TimeoutError, ValueError) as error:
            raise _Passing(str(error) or type(error).__name__) from error
        self._count(answer)
        return answer

    def _count(self, answer: Any) -> None:
        usage = answer.get("usage") if isinstance(answer, dict) else None
        usage = usage if isinstance(usage, dict) else {}
        counts = [usage.get(name) for name in ("prompt_tokens", "completion_tokens")]
        known = [count for count in counts if isinstance(count, int) and count >= 0]
        self.spent.calls += 1
        if len(known) < 2:
            self.spent.unknown += 1
            return
        self.spent.prompt_tokens += known[0]
        self.spent.answer_tokens += known[1]

    def to_json(self) -> dict[str, Any]:
        """What has been spent, for a checkpoint."""
        return asdict(self.spent)
