"""Reflective evolution of prompts with a Pareto front (GEPA: Agrawal et al., arXiv:2507.19457), by the package `gepa`:
it decides in a thread, which candidate runs which tasks; the run has them run."""

import asyncio
import io
import logging
import pickle
import statistics
import time
from collections.abc import Coroutine, Mapping, Sequence
from concurrent.futures import Future
from dataclasses import asdict, dataclass, field, replace
from importlib import import_module
from pathlib import Path
from typing import Any, Final, TypeVar

from millstream.pipeline.prompts.apo import writing
from millstream.pipeline.prompts.search import Candidate, unusable
from millstream.pipeline.prompts.texts import experience, reviewed, score
from millstream.pipeline.prompts.versions import Versions
from millstream.pipeline.prompts.writers import Budget, BudgetUsedUp, Spent, WriterPolicy, Writers
from millstream.pipeline.training.report import StepReport, failures
from millstream.pipeline.training.run import Run
from millstream.schemas.errors import ConfigError
from millstream.schemas.ids import new_id

logger = logging.getLogger(__name__)
T = TypeVar("T")

FOLDER: Final = "gepa"  # within a run's folder: the package's state
STATE: Final = "gepa_state.bin"  # in it: a pickle


class Gepa:
    """An `Algorithm`: begins with the run's prompts. ``critic`` is the model that reflects and rewrites, by a name that
    the proxy knows. It ends after ``max_rollouts`` (of one candidate's validation more, at most), or when the budget is
    used up; the best candidate is then the run's current version. A step is a validation.

    Raises `ConfigError` without the package; `run` as `apo.Apo.run`."""

    model: Path | None = None

    def __init__(
        self,
        *,
        critic: str,
        max_rollouts: int = 400,
        batch: int = 3,
        budget: Budget = Budget(),
        request: Mapping[str, Any] | None = None,
        policy: WriterPolicy = WriterPolicy(),
    ) -> None:
        try:
            gepa = import_module("gepa")
        except ImportError as error:
            raise ConfigError(f'type "gepa" needs the package gepa: install millstream[prompts] ({error})') from error
        self.optimize, self.batch_type = gepa.optimize, gepa.EvaluationBatch
        self.critic, self.max_rollouts, self.batch = critic, max_rollouts, batch
        self.budget, self.request, self.policy = budget, dict(request or {}), policy
        self.arguments = {
            "critic": critic,
            "max_rollouts": max_rollouts,
            "batch": batch,
            "budget": asdict(budget),
            "request": self.request,
        }

    async def run(self, run: Run) -> None:
        async with writing(run, self.budget, self.request, self.policy) as writers:
            await _Evolving(self, run, writers).run()


@dataclass(slots=True)
class Reflection:
    """What led to the next candidate."""

    parent: Candidate
    component: str  # name of the template
    parent_score: float  # on the minibatch
    answer: str = ""
    rollout_id: str = ""  # that it was recorded as

    def led_to(self, texts: Mapping[str, str]) -> bool:
        """Whether these are the parent's templates with one that the answer holds."""
        new = {name: text for name, text in texts.items() if text != self.parent.templates[name].template}
        return [*new] == [self.component] and new[self.component] in self.answer


@dataclass
class _Evolving:
    config: Gepa
    on: Run
    writers: Writers
    candidates: dict[str, Candidate] = field(default_factory=dict)  # by their texts
    starts: int = 0  # of trainers: a rollout of an earlier one that has not been read is asked for as another
    evaluations: int = 0  # of this trainer
    validations: int = 0
    reflection: Reflection | None = None
    futures: set["Future[Any]"] = field(default_factory=set)
    ended: bool = False

    async def run(self) -> None:
        self.loop, self.versions = asyncio.get_running_loop(), Versions(self.on)
        if (restored := self.on.restored) is not None:
            state = restored.extra["loop"]
            found = [Candidate.from_json(each) for each in state["candidates"]]
            self.candidates = {_key(each): each for each in found}
            self.starts, self.validations = state["starts"] + 1, restored.step
            self.writers.spent = Spent(**state["spent"])
        self.on.all_expected()
        await self._save()
        try:
            result = await asyncio.to_thread(self._optimize)
        finally:
            self.ended = True
            for future in tuple(self.futures):
                future.cancel()
        accepted = [self.candidates[_text(texts)] for texts in result.candidates]
        for candidate, parents in zip(accepted, result.parents, strict=True):
            if parents and parents[0] is not None:
                await self._write(replace(candidate, parent=accepted[parents[0]].number))
        best = self.candidates[_text(result.best_candidate)]
        best = replace(best, score=result.val_aggregate_scores[result.best_idx])
        self.on.summary.validation_reward = best.score
        await self.versions.settle(best)

    def _optimize(self) -> Any:
        experiment = self.on.experiment
        check_state(self.on.run_dir / FOLDER)
        return self.config.optimize(
            seed_candidate={name: each.template for name, each in self.on.prompts.items()},
            trainset=list(experiment.tasks),
            valset=list(experiment.val_tasks),
            adapter=self,
            reflection_lm=self._reflect,
            reflection_minibatch_size=min(self.config.batch, len(experiment.tasks)),
            max_metric_calls=self.config.max_rollouts,
            stop_callbacks=[lambda state: self.ended or bool(self.writers.over)],
            run_dir=str(self.on.run_dir / FOLDER),
            seed=self.on.seed,
            display_progress_bar=False,
            logger=_Log(),
        )

    # What the package calls, in its thread.

    propose_new_texts = None

    def evaluate(self, batch: Sequence[str], candidate: Mapping[str, str], capture_traces: bool = False) -> Any:
        scores, seen = self._wait(self._evaluated(list(batch), dict(candidate), validate=not capture_traces))
        return self.config.batch_type(outputs=seen, scores=scores, trajectories=seen if capture_traces else None)

    def make_reflective_dataset(
        self, candidate: Mapping[str, str], evaluation: Any, components: Sequence[str]
    ) -> dict[str, list[dict[str, str]]]:
        parent = self.candidates[_text(candidate)]
        self.reflection = Reflection(parent, components[0], statistics.fmean(evaluation.scores))
        return {name: [{"Rollout": text} for text in evaluation.trajectories] for name in components}

    def _reflect(self, prompt: Any) -> str:
        kept = ", ".join(sorted({p for each in self.on.prompts.values() for p in each.placeholders()})) or "none"
        messages = [{"role": "user", "content": prompt}] if isinstance(prompt, str) else list(prompt)
        rule = f"Keep each placeholder exactly as it is written, and add none: {kept}"
        return self._wait(self._answered([{"role": "system", "content": rule}, *messages]))

    def _wait(self, work: Coroutine[Any, Any, T]) -> T:
        future = asyncio.run_coroutine_threadsafe(work, self.loop)
        self.futures.add(future)
        try:
            if self.ended:
                future.cancel()
            return future.result()
        finally:
            self.futures.discard(future)

    # The same on the run's loop.

    async def _answered(self, messages: list[dict[str, str]]) -> str:
        seen = self.reflection
        what = {"reflection": self.writers.spent.calls, "parent": seen.parent.number if seen else None}
        try:
            async with self.writers.recorded(what) as (rollout_id, ask):
                answer = await ask(self.config.critic, messages)
        except BudgetUsedUp:
            return ""  # the search ends before it asks again
        if seen is not None:
            seen.answer, seen.rollout_id = answer, rollout_id
        return answer

    async def _evaluated(
        self, tasks: list[str], texts: dict[str, str], *, validate: bool
    ) -> tuple[list[float], list[str]]:
        began, candidate = time.monotonic(), self._candidate(texts)
        if candidate.refused:
            await self._write(candidate)
            return [0.0] * len(tasks), [candidate.refused] * len(tasks)
        await self.versions.offer(candidate)
        whole = validate and tasks == list(self.on.experiment.val_tasks)
        key = f"gepa/{self.starts}/{self.evaluations}"
        self.evaluations += 1
        with self.on.watch.phase("wait"):
            finished = await self.on.each(
                tasks, key, mode="val" if whole else "train", resources_id=candidate.resources_id
            )
        self.on.release_each(finished)
        self.on.count(finished)
        scores = [score(each) for each in finished]
        mean = statistics.fmean(scores)
        await self._write(replace(candidate, score=mean) if whole else replace(candidate, batch_score=mean))
        if whole:
            best = max(each.score for each in self.candidates.values() if each.score is not None)
            self.on.add(
                StepReport(
                    step=self.validations,
                    model_version=self.on.lineage.version,
                    reward=mean,
                    reward_std=statistics.pstdev(scores),
                    rollouts=len(finished),
                    failed=failures(finished),
                    rollouts_per_second=self.on.summary.rollouts / max(self.on.seconds, 1e-9),
                    spans=self.on.summary.spans,
                    seconds=time.monotonic() - began,
                    epoch=self.on.lineage.epoch,
                    validation_reward=best,
                    metrics={"candidates": len(self.candidates), "writer_calls": self.writers.spent.calls},
                )
            )
            self.validations += 1
        await self._save()
        if whole:
            await self.on.tell()
            self.on.lineage.step = self.validations
        return scores, [experience(task, each) for task, each in zip(tasks, finished, strict=True)]

    def _candidate(self, texts: Mapping[str, str]) -> Candidate:
        key = _text(texts)
        if key not in self.candidates:
            first = self.on.prompts
            templates = {name: replace(first[name], template=text) for name, text in texts.items()}
            whys = [why for name, each in templates.items() if (why := unusable(each, first[name]))]
            made = Candidate(
                number=len(self.candidates),
                resources_id=new_id(),
                templates=templates,
                round=self.validations,
                stage="done",
                refused="; ".join(whys),
            )
            if (seen := self.reflection) is not None and seen.led_to(texts):  # else two candidates were merged
                made = replace(
                    made,
                    parent=seen.parent.number,
                    edited=seen.component,
                    critique=reviewed(seen.answer),
                    rollout_id=seen.rollout_id,
                    parent_score=seen.parent_score,
                )
            self.candidates[key] = made
        return self.candidates[key]

    async def _write(self, candidate: Candidate) -> None:
        self.candidates[_key(candidate)] = candidate
        await self.versions.write([candidate], {each.number: each for each in self.candidates.values()})

    async def _save(self) -> None:
        state = {
            "candidates": [each.to_json() for each in self.candidates.values()],
            "starts": self.starts,
            "spent": self.writers.to_json(),
        }
        await self.on.checkpoint(self.validations, {}, state, keep=1)


class _PlainData(pickle.Unpickler):
    """Knows no classes and functions: it builds numbers, texts, lists, dicts and sets, and can't call anything."""

    def find_class(self, module: str, name: str) -> Any:
        raise pickle.UnpicklingError(f"it names {module}.{name}")


def check_state(folder: Path) -> None:
    """Raises `ConfigError` for a state of the package that is not plain data: it could run code when it is loaded."""
    file = folder / STATE
    try:
        _PlainData(io.BytesIO(file.read_bytes())).load()
    except FileNotFoundError:
        return
    except Exception as error:  # of a damaged pickle it may be any
        raise ConfigError(
            f"{file} is no state of a search, and is not loaded: {error}. Remove the folder to search anew"
        ) from error


class _Log:
    """The package's lines, as ours."""

    def log(self, message: object) -> None:
        logger.debug("%s", message)


def _key(candidate: Candidate) -> str:
    return _text({name: each.template for name, each in candidate.templates.items()})


def _text(texts: Mapping[str, str]) -> str:
    return repr(sorted(texts.items()))
