"""A model as a reward function: it reads what an agent returned, and gives a score."""

import hashlib
import re
from collections import OrderedDict
from typing import Any, Final

from millstream.producers.agent.attempt import RolloutInfo, current_attempt
from millstream.producers.agent.clients import async_openai_client
from millstream.schemas.control import PromptTemplate
from millstream.schemas.errors import MillstreamError
from millstream.schemas.spans import semconv
from millstream.schemas.spans.text import json_text

SCORE: Final = re.compile(r"score[^\w-]*(-?\d+(?:\.\d+)?)", re.I)
KEPT: Final = 10_000  # verdicts of a process; some MB
DEFAULT: Final = PromptTemplate(
    template="Task:\n{task}\n\nAnswer:\n{answer}\n\nHow good is the answer? Say why in one sentence, then end with a "
    "line 'Score: N', where N is a number from 0 (useless) to 1 (perfect)."
)


class NoVerdict(MillstreamError):
    """A judge's answer holds no score within its bounds. It fails the attempt, which is retried within its budget."""


class Judge:
    """A reward function for `Tracer.on_completion`. Asks ``model``, by the name that the proxy knows, and reads the
    last ``Score: N`` of its answer, from ``lowest`` to ``highest``.

    The question is the rollout's resource ``prompt``, a `PromptTemplate` with ``{task}`` and ``{answer}``, or `DEFAULT`
    if its resources have none. The call is recorded with the rollout, and is neither trained on nor rewarded. A process
    asks the same question once. Needs the package openai. Raises `NoVerdict`, and the errors of the call.
    """

    def __init__(
        self, *, model: str, prompt: str = "judge", name: str = "judge", lowest: float = 0.0, highest: float = 1.0
    ) -> None:
        self.model, self.prompt, self.lowest, self.highest = model, prompt, lowest, highest
        self.__name__ = name  # of the reward
        self._verdicts: OrderedDict[bytes, float] = OrderedDict()  # by the question; the one used last is last

    async def __call__(self, result: Any, rollout: RolloutInfo | None) -> float:
        question = self._template().format(task=_text(rollout.input if rollout else ""), answer=_text(result))
        key = hashlib.sha256(f"{self.model}\0{question}".encode("utf-8", "surrogateescape")).digest()
        if key not in self._verdicts:
            self._verdicts[key] = self._score(await self._ask(question))
            if len(self._verdicts) > KEPT:
                self._verdicts.popitem(last=False)
        self._verdicts.move_to_end(key)
        return self._verdicts[key]

    def _template(self) -> PromptTemplate:
        attempt = current_attempt()
        found = None if attempt is None else attempt.resources.get(self.prompt)
        return found if isinstance(found, PromptTemplate) else DEFAULT

    async def _ask(self, question: str) -> str:
        async with async_openai_client() as client:
            answer = await client.chat.completions.create(
                model=self.model,
                messages=[{"role": "user", "content": question}],
                temperature=0.0,
                extra_headers={semconv.ASIDE_HEADER: "judge"},
            )
        return answer.choices[0].message.content or ""

    def _score(self, answer: str) -> float:
        found = SCORE.findall(answer)
        if not found:
            raise NoVerdict(f"judge {self.model!r} gave no 'Score: N': {answer[-200:]!r}")
        score = float(found[-1])
        if not self.lowest <= score <= self.highest:
            raise NoVerdict(
                f"judge {self.model!r} gave {score:g}, which is not from {self.lowest:g} to {self.highest:g}"
            )
        return score


def _text(value: Any) -> str:
    return value if isinstance(value, str) else json_text(value, str)
