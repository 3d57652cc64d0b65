"""Beam search over prompt templates by textual gradients (APO: Pryzant et al., arXiv:2305.03495). Pure: results go in,
the work that may be done now comes out, and the state between the two is JSON.

A round makes ``branch_factor`` candidates of each template in the beam, all at once:

    the parent runs a minibatch of tasks ─► a critique of what it earned ─► an edit: the candidate
        ─► the same minibatch: dropped if it earns less than its parent there
        ─► the validation batch, one and the same for all candidates of a run

The ``beam_width`` candidates that earned the most there are the beam of the next round; older ones keep their scores.
"""

import random
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import asdict, dataclass, field, replace
from typing import Any, Final, Literal

from millstream.schemas.control import PromptTemplate
from millstream.schemas.errors import ConfigError
from millstream.schemas.ids import new_id

LONGEST: Final = 32_768  # characters of a template: more leaves too little of a small model's context

Stage = Literal["propose", "screen", "validate"]


@dataclass(frozen=True, slots=True, kw_only=True)
class Beam:
    """What a search may do."""

    beam_width: int = 4
    branch_factor: int = 4
    rounds: int = 3
    batch: int = 4  # tasks of a minibatch
    validation_batch: int = 16


@dataclass(frozen=True, slots=True, kw_only=True)
class Candidate:
    """Templates by name, where they come from, and what they earned. Number 0 is the one that a search begins with;
    others are numbered by their round and place, whichever is finished first."""

    number: int
    resources_id: str
    templates: Mapping[str, PromptTemplate]
    round: int = 0
    parent: int | None = None
    edited: str = ""  # name of the template that differs from the parent's
    batch: tuple[int, ...] = ()  # tasks of its minibatch
    critique: str = ""
    rollout_id: str = ""  # that its critique and edit were recorded as
    stage: Literal["propose", "screen", "validate", "done"] = "propose"
    refused: str = ""  # why it was not run, or not validated
    parent_score: float | None = None  # on the minibatch
    batch_score: float | None = None
    score: float | None = None  # on the validation batch

    def to_json(self) -> dict[str, Any]:
        return asdict(self)

    @classmethod
    def from_json(cls, value: Mapping[str, Any]) -> "Candidate":
        templates = {name: PromptTemplate(**template) for name, template in value["templates"].items()}
        return cls(**{**value, "templates": templates, "batch": tuple(value["batch"])})


@dataclass(frozen=True, slots=True)
class Work:
    """Something to do for a candidate. ``tasks``: numbers of training tasks, of validation tasks to validate."""

    number: int
    stage: Stage
    tasks: tuple[int, ...]


@dataclass(frozen=True, slots=True, kw_only=True)
class Proposal:
    """The result of `propose`. ``text`` is None if there is none, for the reason ``failed``."""

    parent_scores: Sequence[float]
    critique: str = ""
    text: str | None = None
    failed: str = ""
    rollout_id: str = ""


@dataclass(slots=True)
class Search:
    """``tasks`` and ``val_tasks``: how many there are. Every choice follows from ``seed`` and the results."""

    beam_options: Beam
    tasks: int
    val_tasks: int
    seed: int
    round: int = 0
    beam: list[int] = field(default_factory=list)
    candidates: dict[int, Candidate] = field(default_factory=dict)
    over: str = ""  # why there is no further round, if there might have been one
    new_id: Callable[[], str] = new_id  # for resources versions

    @classmethod
    def begin(
        cls,
        options: Beam,
        templates: Mapping[str, PromptTemplate],
        *,
        tasks: int,
        val_tasks: int,
        seed: int,
        new_id: Callable[[], str] = new_id,
    ) -> "Search":
        search = cls(options, tasks, val_tasks, seed, new_id=new_id)
        first = Candidate(number=0, resources_id=new_id(), templates=dict(templates), stage="validate")
        search.candidates[0], search.beam = first, [0]
        search._branch()
        return search

    @property
    def validation(self) -> tuple[int, ...]:
        """The validation batch."""
        return self._drawn("validation", self.val_tasks, self.beam_options.validation_batch)

    @property
    def open(self) -> list[Candidate]:
        return [each for each in self.candidates.values() if each.stage != "done"]

    @property
    def ended(self) -> bool:
        """No round is under way, and none begins."""
        return not self.of_round(self.round)

    @property
    def best(self) -> Candidate:
        """Of those that are validated, the first of those with the highest score; else the one that it began with."""
        scored = [each for each in self.candidates.values() if each.score is not None]
        return max(scored, key=lambda each: (each.score, -each.number), default=self.candidates[0])

    @property
    def refused(self) -> list[Candidate]:
        """Those of the round that were not validated."""
        return [each for each in self.of_round(self.round) if each.refused]

    def of_round(self, number: int) -> list[Candidate]:
        return [each for each in self.candidates.values() if each.round == number and each.number]

    def work(self) -> list[Work]:
        """What may be done now, at once and in any order. Each is to be answered by `proposed` or `scored`."""
        return [
            Work(each.number, each.stage, self.validation if each.stage == "validate" else each.batch)
            for each in self.open
            if each.stage != "done"  # for the type checker
        ]

    def proposed(self, number: int, proposal: Proposal) -> Candidate:
        """A candidate's template is written; the placeholders are checked before anything runs with it."""
        found = self.candidates[number]
        mean = _mean(proposal.parent_scores)
        found = replace(
            found,
            parent_score=mean,
            critique=proposal.critique,
            rollout_id=proposal.rollout_id,
        )
        if proposal.text is None:
            return self._done(found, refused=proposal.failed)
        parent = self._parent(found)
        template = replace(parent.templates[found.edited], template=proposal.text)
        found = replace(found, templates={**parent.templates, found.edited: template})
        if why := self._unusable(found):
            return self._done(found, refused=why)
        self.candidates[number] = replace(found, stage="screen")
        return self.candidates[number]

    def scored(self, number: int, stage: Stage, scores: Sequence[float]) -> Candidate:
        """A candidate has run its minibatch ("screen"), or the validation batch ("validate")."""
        found, mean = self.candidates[number], _mean(scores)
        if stage == "validate":
            return self._done(replace(found, score=mean))
        found = replace(found, batch_score=mean)
        assert found.parent_score is not None
        if mean < found.parent_score:
            why = f"it earned {mean:.3g} on its minibatch, its parent {found.parent_score:.3g}"
            return self._done(found, refused=why)
        self.candidates[number] = replace(found, stage="validate")
        return self.candidates[number]

    def go_on(self, over: str) -> None:
        """A search that had ended begins its next round, if it has one and is not ``over`` for that reason."""
        self.over = over
        if self.ended:
            self._branch()

    def next_round(self) -> None:
        """Ends a round in which nothing is open."""
        assert not self.open, "work is under way"
        living = [self.candidates[number] for number in self.beam] + self.of_round(self.round)
        scored = [each for each in living if each.score is not None]
        scored.sort(key=lambda each: (-(each.score or 0.0), each.number))
        self.beam = []
        for each in scored:
            if all(each.templates != self.candidates[number].templates for number in self.beam):
                self.beam.append(each.number)
        del self.beam[self.beam_options.beam_width :]
        self.round += 1
        self._branch()

    def _branch(self) -> None:
        """Begins the candidates of the round, if there is one."""
        options = self.beam_options
        if self.over or self.round >= options.rounds:
            return
        for place, parent in enumerate(self.beam):
            for branch in range(options.branch_factor):
                slot = place * options.branch_factor + branch
                number = 1 + self.round * options.beam_width * options.branch_factor + slot
                names = sorted(self.candidates[parent].templates)
                self.candidates[number] = Candidate(
                    number=number,
                    resources_id=self.new_id(),
                    templates=self.candidates[parent].templates,
                    round=self.round,
                    parent=parent,
                    edited=names[(self.round + branch) % len(names)],
                    batch=self._drawn(f"{self.round}/{slot}", self.tasks, options.batch),
                )

    def _drawn(self, what: str, of: int, size: int) -> tuple[int, ...]:
        rng = random.Random(f"{self.seed}/{what}")  # noqa: S311 - a choice of tasks, not a secret
        return tuple(rng.sample(range(of), min(size, of)))

    def _parent(self, candidate: Candidate) -> Candidate:
        assert candidate.parent is not None
        return self.candidates[candidate.parent]

    def _unusable(self, candidate: Candidate) -> str:
        """Why its edited template can't take the place of the one that the search began with; empty if it can."""
        template = candidate.templates[candidate.edited]
        if why := unusable(template, self.candidates[0].templates[candidate.edited]):
            return why
        twin = next((e for e in self._earlier(candidate) if e.templates == candidate.templates and not e.refused), None)
        return "" if twin is None else f"candidate {twin.number} has the same text"

    def _earlier(self, candidate: Candidate) -> Iterable[Candidate]:
        """Those of earlier rounds: which of this one are written depends on who is faster."""
        return (e for e in self.candidates.values() if e.round < candidate.round or not e.number)

    def _done(self, candidate: Candidate, refused: str = "") -> Candidate:
        self.candidates[candidate.number] = replace(candidate, stage="done", refused=refused)
        return self.candidates[candidate.number]

    def to_json(self) -> dict[str, Any]:
        """What `from_json` makes the same search of, with the same options."""
        return {
            "round": self.round,
            "beam": list(self.beam),
            "over": self.over,
            "candidates": [each.to_json() for each in self.candidates.values()],
        }

    @classmethod
    def from_json(cls, value: Mapping[str, Any], options: Beam, *, tasks: int, val_tasks: int, seed: int) -> "Search":
        found = [Candidate.from_json(each) for each in value["candidates"]]
        by_number = {each.number: each for each in found}
        return cls(options, tasks, val_tasks, seed, value["round"], list(value["beam"]), by_number, value["over"])


def check_template(name: str, template: PromptTemplate) -> None:
    """Raises `ConfigError` if it is no template."""
    try:
        template.placeholders()
    except ValueError as error:
        raise ConfigError(f"prompts.{name} is no {template.engine} template: {error}") from error


def unusable(template: PromptTemplate, first: PromptTemplate) -> str:
    """Why a template can't take the place of another; empty if it can. It must have the same placeholders: without one
    the agent's data would be missing, and the data of another is given by nobody."""
    if not template.template.strip():
        return "it is empty"
    if len(template.template) > LONGEST:
        return f"it has {len(template.template):,} characters, {LONGEST:,} are allowed"
    try:
        found, wanted = template.placeholders(), first.placeholders()
    except ValueError as error:
        return f"it is no {template.engine} template: {error}"
    lost, invented = sorted(wanted - found), sorted(found - wanted)
    problems = [f"it lost {', '.join(lost)}"] * bool(lost) + [f"it invented {', '.join(invented)}"] * bool(invented)
    return "; ".join(problems)


def _mean(scores: Sequence[float]) -> float:
    return sum(scores) / len(scores) if scores else 0.0
