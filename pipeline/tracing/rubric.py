"""A rubric for groups: a model reads the answers of one group together, and scores them relative to each other, as an
algorithm will compare them (RULER: OpenPipe's Relative Universal LLM-Elicited Rewards)."""

import re
from collections.abc import AsyncIterator, Awaitable, Callable, Sequence
from contextlib import asynccontextmanager
from dataclasses import dataclass, field, replace
from typing import Final

from millstream.pipeline.prompts.texts import shortened
from millstream.pipeline.prompts.writers import Budget, WriterFailed, WriterPolicy, Writers
from millstream.pipeline.store.conversation import Line, lines_of
from millstream.pipeline.tracing.judge import NoVerdict, Verdicts, asked, fenced
from millstream.pipeline.training.groups import FinishedRollout, Group, trainable_turns
from millstream.pipeline.training.run import Run
from millstream.schemas.control import PromptTemplate
from millstream.schemas.errors import ConfigError, MillstreamError
from millstream.schemas.wire import status

SCORES: Final = re.compile(r"^\W*score\s+(\d+)\W*?[:=]\W*?(-?\d+(?:\.\d+)?)", re.I | re.M)
DEFAULT: Final = PromptTemplate(
    template="Task:\n{task}\n\nSeveral agents have tried it:\n\n{answers}\n\nCompare them. One that solves the task "
    "scores more than one that does not; one that gets closer, or takes fewer detours, scores more than one that gets "
    "less far. Equally good ones score the same. Write one line for each: 'Score K: N - why', where K is the number of "
    "the answer and N is from 0 (useless) to 1 (perfect)."
)

Scoring = Callable[[str, Group], Awaitable[Group]]
"""Takes a task (JSON) and the group that has tried it; returns the group with its scores as rewards. Raises
`NotScored`."""


class NotScored(MillstreamError):
    """The judge did not answer, or not with a score from 0 to 1 for each answer. Names the group."""

    def __init__(self, group: Group, reason: str) -> None:
        super().__init__(f"group {group.group_id} was not scored: {reason}")
        self.group = group


@dataclass(frozen=True, slots=True, kw_only=True)
class Rubric:
    """Rewards for whole groups, by ``model``, a name that the proxy knows: one call a group, whose scores are from 0 to
    1.

    The question is the run's prompt ``prompt``, a `PromptTemplate` with ``{task}`` and ``{answers}``, or `DEFAULT` if
    the run has none. Each answer is a rollout's last conversation, `fenced`; what all have in common is shown once, and
    answers that are alike are one. The call is recorded as a rollout of the mode ``test``, whose input names group and
    rollouts, and whose output are the scores with their reasons; nothing is trained on it.
    """

    model: str
    prompt: str = "rubric"
    policy: WriterPolicy = WriterPolicy()

    @asynccontextmanager
    async def scoring(self, run: Run) -> AsyncIterator[Scoring]:
        """Scores groups of ``run``. Raises `ConfigError` without a proxy, and for a prompt without ``{answers}``."""
        template = run.prompts.get(self.prompt, DEFAULT)
        if "answers" not in template.template:
            raise ConfigError(f"prompts.{self.prompt}: a rubric needs the placeholder answers in it")
        writers = Writers(run, Budget(), {"temperature": 0.0}, policy=self.policy, asked_by="rubric")
        try:
            yield _Scoring(self.model, template, writers)
        finally:
            await writers.close()


@dataclass(slots=True)
class _Scoring:
    model: str
    template: PromptTemplate
    writers: Writers
    verdicts: Verdicts[list[float]] = field(default_factory=Verdicts)

    async def __call__(self, task: str, group: Group) -> Group:
        shown = {m.end.rollout_id: m for m in group.members if m.end.status == status.SUCCEEDED and m.triplets}
        if not shown:
            return group
        context, texts = conversations([shown[each] for each in shown])
        distinct = list(dict.fromkeys(texts))
        answers = "\n\n".join(fenced(text, number) for number, text in enumerate(distinct, 1))
        if context:
            answers = f"All begin with:\n{fenced(context, 0)}\n\n{answers}"
        numbers = {each: distinct.index(text) for each, text in zip(shown, texts, strict=True)}
        try:
            scores = await self._scores(self.template.format(task=task, answers=answers), len(distinct), group, numbers)
        except (WriterFailed, NoVerdict) as error:
            raise NotScored(group, str(error)) from error
        given = {rollout_id: scores[number] for rollout_id, number in numbers.items()}
        return Group(group.group_id, tuple(_scored(m, given.get(m.end.rollout_id)) for m in group.members))

    async def _scores(self, question: str, count: int, group: Group, numbers: dict[str, int]) -> list[float]:
        if (known := self.verdicts.get(self.model, question)) is not None:
            return known
        what = {"group": group.group_id, "answers": {each: number + 1 for each, number in numbers.items()}}
        async with self.writers.recorded(what) as (_, ask):
            scores = scores_in(await ask(self.model, asked(question)), count)
        return self.verdicts.keep(self.model, question, scores)


def scores_in(answer: str, count: int) -> list[float]:
    """The last score of each of ``count`` answers, from lines ``Score K: N``. Raises `NoVerdict` naming what is missing
    or out of bounds."""
    found = {int(number): float(score) for number, score in SCORES.findall(answer)}
    for number in range(1, count + 1):
        if number not in found:
            raise NoVerdict(f"the judge gave no 'Score {number}: N': {answer[-200:]!r}")
        if not 0 <= found[number] <= 1:
            raise NoVerdict(f"the judge gave answer {number} the score {found[number]:g}, which is not from 0 to 1")
    return [found[number] for number in range(1, count + 1)]


def conversations(members: Sequence[FinishedRollout]) -> tuple[str, list[str]]:
    """What the last conversations of rollouts begin with in common, and how each goes on."""
    lines = [
        [*lines_of(last.prompt, "user"), *lines_of(last.response, "assistant")]
        for last in ((trainable_turns(member) or member.triplets)[-1] for member in members)
    ]
    same = 0
    while all(same < len(each) - 1 for each in lines) and len({each[same] for each in lines}) == 1:
        same += 1
    return _text(lines[0][:same]), [_text(each[same:]) for each in lines]


def _text(lines: Sequence[Line]) -> str:
    return shortened("\n".join(f"{line.who}: {line.text}" for line in lines))


def _scored(member: FinishedRollout, score: float | None) -> FinishedRollout:
    """With ``score`` at its last turn, of those that can be trained on if there are any, and no other reward."""
    if member.end.status != status.SUCCEEDED:
        return member
    last = max((turn.turn for turn in trainable_turns(member) or member.triplets), default=None)
    triplets = tuple(replace(turn, reward=score if turn.turn == last else None) for turn in member.triplets)
    return FinishedRollout(replace(member.end, reward=score), triplets)
