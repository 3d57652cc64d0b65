"""Automatic prompt optimisation: the shell around `search`. All candidates of a round are in flight at once."""

import asyncio
import logging
import statistics
import time
from collections.abc import AsyncIterator, Callable, Mapping, Sequence
from contextlib import asynccontextmanager
from dataclasses import asdict, dataclass, field, replace
from pathlib import Path
from typing import Any

from millstream.pipeline.prompts.search import Beam, Candidate, Proposal, Search, Work, check_template
from millstream.pipeline.prompts.texts import critique_of, edit_of, edited, experience, score
from millstream.pipeline.prompts.versions import Versions
from millstream.pipeline.prompts.writers import Budget, BudgetUsedUp, Spent, WriterFailed, WriterPolicy, Writers
from millstream.pipeline.training.groups import FinishedRollout
from millstream.pipeline.training.report import StepReport, failures
from millstream.pipeline.training.run import Run
from millstream.schemas.errors import ConfigError

logger = logging.getLogger(__name__)


class Apo:
    """An `Algorithm`: searches for a better prompt (see `search`), beginning with the run's. ``critic`` and ``editor``
    are the names of models that the proxy knows; ``request`` are further fields of their requests. A step is a round.
    It ends after ``beam.rounds``, or ``max_steps``, with ``stop_reward``, or when the budget is used up; the best
    candidate is then the run's current version.

    `run` raises `ConfigError` for a run without prompts, validation tasks or a proxy, and for one that goes on with
    another prompt or other options."""

    model: Path | None = None

    def __init__(
        self,
        *,
        critic: str,
        editor: str = "",
        beam: Beam = Beam(),
        budget: Budget = Budget(),
        request: Mapping[str, Any] | None = None,
        policy: WriterPolicy = WriterPolicy(),
    ) -> None:
        self.critic, self.editor = critic, editor or critic
        self.beam, self.budget, self.request, self.policy = beam, budget, dict(request or {}), policy
        self.steps = beam.rounds
        self.arguments = {
            "critic": self.critic,
            "editor": self.editor,
            **asdict(beam),
            "budget": asdict(budget),
            "request": self.request,
        }

    async def run(self, run: Run) -> None:
        async with writing(run, self.budget, self.request, self.policy) as writers:
            await _Searching(self, run, writers).run()


@asynccontextmanager
async def writing(run: Run, budget: Budget, request: Mapping[str, Any], policy: WriterPolicy) -> AsyncIterator[Writers]:
    """The writers of a search. Raises `ConfigError` for a run in which no prompt can be searched for."""
    _check(run)
    writers = Writers(run, budget, request, policy=policy)
    try:
        yield writers
    finally:
        await writers.close()


def _check(run: Run) -> None:
    if not run.prompts:
        raise ConfigError(
            "there is no prompt to begin with: give the trainer prompts, or the file a table [prompts.NAME]"
        )
    if not run.experiment.val_tasks:
        raise ConfigError("candidates are compared on validation tasks: give val_tasks")
    for name, template in run.prompts.items():
        check_template(name, template)


@dataclass
class _Searching:
    config: Apo
    on: Run
    writers: Writers
    asked: set[str] = field(default_factory=set)  # keys of rollouts that were surely published
    seen: list[FinishedRollout] = field(default_factory=list)  # of the round
    began: float = field(default_factory=time.monotonic)

    async def run(self) -> None:
        self.versions = Versions(self.on)
        self.search = self._restored() or self._begun()
        await self._save()
        await self.versions.write(self.search.candidates.values(), self.search.candidates)
        running: dict[asyncio.Task[Callable[[], None]], Work] = {}
        try:
            while not self.search.ended:
                for work in self.search.work():
                    if work not in running.values():
                        running[asyncio.create_task(self._done(work))] = work
                if not running:
                    await self._end_round()
                    continue
                with self.on.watch.phase("wait"):
                    done, _ = await asyncio.wait(running, return_when=asyncio.FIRST_COMPLETED)
                self.on.all_expected()
                for task in done:
                    task.result()()
                    del running[task]
                await self._save()
                await self.versions.write(self.search.of_round(self.search.round), self.search.candidates)
                await self.versions.write([self.search.candidates[0]], self.search.candidates)
        finally:
            for task in running:
                task.cancel()
            if running:
                await asyncio.wait(running)
        with self.on.watch.phase("publish"):
            await self.versions.settle(self.search.best)
        self.on.summary.validation_reward = self.search.best.score
        if self.search.over:
            logger.warning("the search has ended early: %s", self.search.over)

    @property
    def _beam(self) -> Beam:
        return replace(self.config.beam, rounds=min(self.config.beam.rounds, self.on.experiment.stop.max_steps))

    def _begun(self) -> Search:
        experiment = self.on.experiment
        return Search.begin(
            self._beam,
            self.on.prompts,
            tasks=len(experiment.tasks),
            val_tasks=len(experiment.val_tasks),
            seed=self.on.seed,
        )

    def _restored(self) -> Search | None:
        if self.on.restored is None:
            return None
        state, experiment = self.on.restored.extra["loop"], self.on.experiment
        options = {**asdict(self.config.beam), "rounds": None}
        if state["options"] != options:
            raise ConfigError(
                f"{self.on.restored.path} was made with other options of the search: give it a new run_dir"
            )
        search = Search.from_json(
            state["search"],
            self._beam,
            tasks=len(experiment.tasks),
            val_tasks=len(experiment.val_tasks),
            seed=self.on.seed,
        )
        if search.candidates[0].templates != self.on.prompts:
            raise ConfigError(f"{self.on.restored.path} was made with another prompt: give the new one a new run_dir")
        self.asked = set(state["asked"])
        self.writers.spent = Spent(**state["spent"])
        search.go_on(self._over(search))
        return search

    def _over(self, search: Search) -> str:
        """Why there is no further round; empty if there may be one."""
        best, stop = search.best, self.on.experiment.stop
        if best.score is not None and stop.good_enough(best.score):
            return f"candidate {best.number} has reached the stop_reward of {stop.reward:g}"
        return self.writers.over

    async def _done(self, work: Work) -> Callable[[], None]:
        """Does the work; what is returned writes the result down."""
        candidate = self.search.candidates[work.number]
        if work.stage == "propose":
            return await self._proposed(candidate, work)
        await self.versions.offer(candidate)
        tasks = self.on.experiment.val_tasks if work.stage == "validate" else self.on.experiment.tasks
        mode = "val" if work.stage == "validate" else "train"
        finished = await self._rollouts(candidate, work, [tasks[number] for number in work.tasks], mode)

        def write() -> None:
            self._release(finished)
            self.search.scored(work.number, work.stage, [score(each) for each in finished])

        return write

    async def _proposed(self, candidate: Candidate, work: Work) -> Callable[[], None]:
        """The parent's rollouts, a critique of them, and the edit."""
        assert candidate.parent is not None
        parent, over = self.search.candidates[candidate.parent], self.writers.over
        finished: list[FinishedRollout] = []
        if over:
            proposal = Proposal(parent_scores=(), failed=over)
        else:
            await self.versions.offer(parent)
            tasks = [self.on.experiment.tasks[number] for number in work.tasks]
            finished = await self._rollouts(parent, work, tasks, "train")
            seen = [experience(task, each) for task, each in zip(tasks, finished, strict=True)]
            proposal = await self._written(candidate, parent, seen, [score(each) for each in finished])

        def write() -> None:
            self._release(finished)
            self.search.proposed(work.number, proposal)

        return write

    async def _written(
        self, candidate: Candidate, parent: Candidate, seen: Sequence[str], scores: Sequence[float]
    ) -> Proposal:
        name, template = candidate.edited, parent.templates[candidate.edited]
        critique, rollout_id = "", ""
        try:
            what = {"candidate": candidate.number, "parent": parent.number, "template": name}
            async with self.writers.recorded(what) as (rollout_id, ask):
                critique = await ask(self.config.critic, critique_of(name, template, seen))
                text = edited(await ask(self.config.editor, edit_of(name, template, critique)))
                if text is None:
                    raise WriterFailed(f"model {self.config.editor!r} answered without <prompt> … </prompt>")
        except (WriterFailed, BudgetUsedUp) as error:
            if isinstance(error, WriterFailed):
                logger.warning("candidate %d: %s", candidate.number, error)
            return Proposal(parent_scores=scores, critique=critique, failed=str(error), rollout_id=rollout_id)
        return Proposal(parent_scores=scores, critique=critique, text=text, rollout_id=rollout_id)

    async def _rollouts(
        self, candidate: Candidate, work: Work, tasks: Sequence[str], mode: str
    ) -> list[FinishedRollout]:
        key = f"prompts/{work.number}/{work.stage}"
        return await self.on.each(
            tasks,
            key,
            mode=mode,
            resources_id=candidate.resources_id,
            published=self.on.continues and key in self.asked,
            on_published=lambda: self.asked.add(key),
        )

    def _release(self, finished: Sequence[FinishedRollout]) -> None:
        self.on.release_each(finished)
        self.on.count(finished)
        self.seen += finished

    async def _end_round(self) -> None:
        search, spent = self.search, self.writers.spent
        made, began = search.of_round(search.round), self.on.seconds
        scores = [score(each) for each in self.seen]
        search.over = self._over(search)
        search.next_round()
        report = StepReport(
            step=search.round - 1,
            model_version=self.on.lineage.version,
            reward=statistics.fmean(scores) if scores else 0.0,
            reward_std=statistics.pstdev(scores) if scores else 0.0,
            rollouts=len(self.seen),
            failed=failures(self.seen),
            rollouts_per_second=self.on.summary.rollouts / began if began else 0.0,
            spans=self.on.summary.spans,
            seconds=time.monotonic() - self.began,
            epoch=self.on.lineage.epoch,
            validation_reward=search.best.score,
            metrics={
                "candidates": len(made),
                "refused": sum(bool(each.refused) for each in made),
                "best": search.best.number,
                "writer_calls": spent.calls,
                "writer_tokens": spent.prompt_tokens + spent.answer_tokens,
                "writer_money": spent.money(self.config.budget),
            },
        )
        self.seen, self.began = [], time.monotonic()
        self.on.add(report)
        await self._save()
        await self.on.tell()
        self.on.lineage.step = search.round

    async def _save(self) -> None:
        state = {
            "options": {**asdict(self.config.beam), "rounds": None},
            "search": self.search.to_json(),
            "asked": sorted(self.asked),
            "spent": self.writers.to_json(),
        }
        await self.on.checkpoint(self.search.round, {}, state, keep=1)
