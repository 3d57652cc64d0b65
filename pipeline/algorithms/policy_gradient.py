"""The loop of a policy that learns: asks for groups of rollouts, has the learner update the policy with those that have
ended, and publishes the new version. Synchronous with ``max_staleness`` 0; else rollouts go on while it learns."""

import asyncio
import logging
import time
from collections import Counter
from collections.abc import Callable, Sequence
from contextlib import AsyncExitStack
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Final

from millstream.pipeline.algorithms.guards import GUARDS, Diverged, Guard
from millstream.pipeline.algorithms.pacing import Pacing
from millstream.pipeline.tracing.rubric import NotScored, Rubric, Scoring
from millstream.pipeline.training.algorithm import Learner
from millstream.pipeline.training.groups import FinishedRollout, Group, checked, trainable_turns
from millstream.pipeline.training.report import StepReport, failures, flat_groups, mean_reward, reward_spread
from millstream.pipeline.training.reporting.steps import trained_rollouts, trained_tokens
from millstream.pipeline.training.run import Run, shuffled
from millstream.schemas.errors import LogError, MillstreamError
from millstream.schemas.wire import status

logger = logging.getLogger(__name__)

BEST, LAST, CANDIDATE = "best", "last", ".candidate"  # folders of the run: models as they are passed on
LEAVE_S: Final = 10.0  # for the log to take the cancellations of a run that ends
REMEMBERED: Final = 200  # steps whose metrics the guards see


class NothingToLearn(MillstreamError):
    """No rollout can be trained on. Says why most of them can't."""


@dataclass
class PolicyGradient:
    """An `Algorithm`.

    Each step trains on ``groups_per_step`` groups of ``group_size`` rollouts. With ``max_staleness`` above 0 so many
    steps' groups more are asked for in advance; those with a part that is older than ``drop_above`` versions (by
    default twice ``max_staleness``) are dropped. ``keep`` says which groups are worth training on (dynamic sampling);
    others are replaced, up to ``refill`` times ``groups_per_step`` a step. ``rubric`` scores the answers of each group
    that is trained on, in place of the rewards that agents emit; a
    group without scores is replaced, too. A step that ``guards`` find bad is undone;
    the run ends with `Diverged` when this has been necessary ``max_rollbacks`` times and is so again. Validates every
    ``validate_every`` steps (0: at the end alone). Writes a checkpoint every ``checkpoint_every`` steps, and keeps the
    last ``keep_checkpoints``.
    """

    learner: Learner
    groups_per_step: int = 16
    group_size: int = 8
    max_staleness: int = 0
    drop_above: int | None = None
    keep: Callable[[Group], bool] | None = None
    refill: int = 4
    guards: Sequence[Guard] = GUARDS
    max_rollbacks: int = 3
    validate_every: int = 0
    checkpoint_every: int = 1
    keep_checkpoints: int = 3
    rubric: Rubric | None = None

    @property
    def model(self) -> Path | None:
        return self.learner.model

    async def run(self, run: Run) -> None:
        """See `Algorithm.run`. Raises `Diverged`, `NothingToLearn`, `NotScored` if groups without scores may no longer
        be replaced, and what the run raises."""
        async with AsyncExitStack() as stack:
            scoring = None if self.rubric is None else await stack.enter_async_context(self.rubric.scoring(run))
            await _Loop(self, run, scoring).run()


@dataclass
class _Loop:
    config: PolicyGradient
    on: Run
    scoring: Scoring | None
    rewards: list[float] = field(default_factory=list)  # of the steps since the last failed validation
    metrics: list[dict[str, float]] = field(default_factory=list)  # of all steps that count
    rollbacks: int = 0
    asked: dict[int, str] = field(default_factory=dict)  # open group → resources version that it was asked for with
    published: set[int] = field(default_factory=set)
    running: dict[asyncio.Task[Group], int] = field(default_factory=dict)
    ended: dict[int, Group] = field(default_factory=dict)
    dropped: Counter[str] = field(default_factory=Counter)  # since the last step, by reason
    validation: asyncio.Task[float] | None = None
    best: float | None = None  # validation so far
    validated: float | None = None  # what a validation found since the last step

    def __post_init__(self) -> None:
        config = self.config
        cap = 2 * config.max_staleness if config.drop_above is None else config.drop_above
        self.pacing = Pacing(config.groups_per_step, config.max_staleness, cap)
        self._order = shuffled(self.on.experiment.tasks, self.on.seed)
        self._tasks: list[str] = []

    async def run(self) -> None:
        stop = self.on.experiment.stop
        try:
            await self._begin()
            while True:
                good = stop.reached(self.rewards)
                if good or self.pacing.step >= stop.max_steps:
                    if not self.on.experiment.val_tasks:
                        break
                    reward = await self._validate()
                    if self.pacing.step >= stop.max_steps or stop.good_enough(reward):
                        break
                    self.rewards.clear()
                await self._step()
            await self._export(LAST)
        finally:
            await self._end_tasks()
            await self._leave()

    # Beginning, and beginning again

    async def _begin(self) -> None:
        restored = self.on.restored
        if restored is None:
            if self.on.experiment.stop.max_steps > 0:
                await self._checkpoint(wait=True)  # also what the first update can be rolled back to
        else:
            await asyncio.to_thread(self.config.learner.load_state, restored.algorithm_state)
            self._load(restored.extra["loop"])
            self.pacing.step = restored.step
            logger.info("going on after step %d, in epoch %d", restored.step, self.on.lineage.epoch)
        await self.on.publish_weights(self.config.learner.weights(), self.pacing.step)
        for group, resources_id in self.asked.items():
            self.asked[group] = resources_id or self.on.resources_id
            self._ask(group)

    def _state(self) -> dict[str, Any]:
        return {
            "next": self.pacing.next,
            "open": [
                {"group": group, "step": step, "resources_id": self.asked[group], "published": group in self.published}
                for group, step in self.pacing.open.items()
            ],
            "rewards": self.rewards,
            "metrics": self.metrics,
            "rollbacks": self.rollbacks,
            "best": self.best,
        }

    def _load(self, state: dict[str, Any]) -> None:
        self.pacing.next = state["next"]
        self.pacing.open = {each["group"]: each["step"] for each in state["open"]}
        # Of groups that were cancelled, or whose log is gone, nothing is left: they are asked for as new ones.
        self.asked = {each["group"]: each["resources_id"] * self.on.continues for each in state["open"]}
        if self.on.continues:
            self.published = {each["group"] for each in state["open"] if each["published"]}
        self.rewards, self.metrics, self.rollbacks = state["rewards"], state["metrics"], state["rollbacks"]
        self.best = state["best"]

    async def _checkpoint(self, *, wait: bool) -> None:
        learner, keep = self.config.learner, self.config.keep_checkpoints
        await self.on.checkpoint(self.pacing.step, learner.state(), self._state(), keep=keep, wait=wait)

    # A step

    async def _step(self) -> None:
        began, watch = time.monotonic(), self.on.watch
        with watch.phase("wait"):
            groups, staleness = await self._batch()
        batch = list(groups.values())
        members = [member for group in batch for member in group.members]
        if self.config.model is not None and not any(map(trainable_turns, members)):
            raise NothingToLearn(why_none(members))
        try:
            with watch.phase("update"):
                metrics = await asyncio.to_thread(self.config.learner.update, batch)
        except FloatingPointError as error:
            await self._roll_back(str(error), gradual=False)
            return
        metrics |= {"reward": mean_reward(members), "staleness": sum(staleness) / len(staleness)}
        for guard in self.config.guards:
            fault = guard([*self.metrics, metrics])
            if fault is not None:
                await self._roll_back(*fault)
                return
        self.metrics = [*self.metrics[1 - REMEMBERED :], metrics]
        self.rewards.append(metrics["reward"])
        self.on.count(members)
        report = StepReport(
            step=self.pacing.step,
            model_version=self.on.lineage.version,
            reward=metrics["reward"],
            rollouts=len(members),
            failed=failures(members),
            rollouts_per_second=self.on.summary.rollouts / self.on.seconds,
            spans=self.on.summary.spans,
            seconds=time.monotonic() - began,
            metrics=metrics,
            epoch=self.on.lineage.epoch,
            reward_std=reward_spread(members),
            validation_reward=self.validated,
            groups=len(groups),
            flat_groups=flat_groups(groups.values()),
            dropped=dict(self.dropped),
            staleness_mean=metrics["staleness"],
            staleness_max=max(staleness),
            tokens=trained_tokens(batch),
        )
        self.on.add(report, trained_rollouts(batch))
        self.dropped.clear()
        self.validated = None
        self._forget(groups)
        self.on.all_expected()
        self.pacing.trained(list(groups))
        if self.pacing.step % self.config.checkpoint_every == 0:
            await self._checkpoint(wait=self.config.checkpoint_every == 1)
        await self.on.tell()
        await self.on.publish_weights(self.config.learner.weights(), self.pacing.step)
        if self.config.validate_every and self.pacing.step % self.config.validate_every == 0:
            # Without staleness, rollouts and training take turns.
            await (self._validate_meanwhile() if self.config.max_staleness else self._validate())

    async def _batch(self) -> tuple[dict[int, Group], list[int]]:
        """The groups of the next step, by ordinal, and their staleness."""
        while True:
            for old in self.pacing.too_old():
                self._drop(old, "too_old")
            if (ready := self.pacing.ready()) is not None:
                return {group: self.ended[group] for group in ready}, [self.pacing.staleness(g) for g in ready]
            for new in self.pacing.admit():
                self.asked[new] = self.on.resources_id
                self._ask(new)
            done, _ = await asyncio.wait(set(self.running), return_when=asyncio.FIRST_COMPLETED)
            for task in sorted(done, key=self.running.__getitem__):
                ordinal = self.running.pop(task)
                try:
                    self._take(ordinal, task.result())
                except NotScored as error:
                    self._leave_out(ordinal, error)

    def _ask(self, group: int) -> None:
        while len(self._tasks) <= group:
            self._tasks.append(next(self._order))

        async def ask() -> Group:
            ended = await self.on.group(
                self._tasks[group],
                self.config.group_size,
                _key(group),
                resources_id=self.asked[group],
                published=group in self.published,
                on_published=lambda: self.published.add(group),
            )
            return ended if self.scoring is None else await self.scoring(self._tasks[group], ended)

        self.running[asyncio.create_task(ask())] = group

    def _take(self, ordinal: int, group: Group) -> None:
        group, oldest = checked(group, self.on.lineage)
        self.ended[ordinal] = group
        self.pacing.end(ordinal, oldest)
        keep = self.config.keep
        if keep is not None and not keep(group) and self._refills():
            self._drop(ordinal, "no_signal")

    def _leave_out(self, ordinal: int, error: NotScored) -> None:
        """Another group takes its place, unless the judge scores none of them."""
        if not self._refills():
            raise error
        logger.warning("%s; another one takes its place", error)
        self.ended[ordinal] = error.group
        self.pacing.end(ordinal, None)
        self._drop(ordinal, "not_scored")

    def _refills(self) -> bool:
        """Whether the step may replace one more group."""
        return sum(self.dropped.values()) < self.config.refill * self.pacing.batch

    def _drop(self, group: int, reason: str) -> None:
        self.dropped[reason] += 1
        self.on.count(self.ended[group].members)
        self.pacing.drop(group)
        self._forget({group: self.ended[group]})

    def _forget(self, groups: dict[int, Group]) -> None:
        self.on.release(groups.values())
        for group in groups:
            del self.ended[group], self.asked[group]
            self.published.discard(group)

    # Validation

    async def _validate(self) -> float:
        with self.on.watch.phase("wait"):
            await self._validate_meanwhile()
            assert self.validation is not None
            return await self.validation

    async def _validate_meanwhile(self) -> None:
        """Starts a validation of the current policy once the one before has ended."""
        if self.validation is not None:
            await self.validation
        await self._export(CANDIDATE)

        async def validate() -> float:
            self.validated = await self.on.validate()
            if self.best is None or self.validated > self.best:
                self.best = self.validated
                await self.on.keep(CANDIDATE, BEST)
            return self.validated

        self.validation = asyncio.create_task(validate())

    # What goes wrong

    async def _roll_back(self, reason: str, gradual: bool) -> None:
        step = self.pacing.step + 1
        if self.rollbacks >= self.config.max_rollbacks:
            raise Diverged(f"step {step} was bad: {reason}; {self.rollbacks} rollbacks did not help")
        await self._end_tasks()
        await self._give_up()
        found = await self.on.roll_back(reason, gradual)
        logger.error("step %d was bad: %s; going on after step %d", step, reason, found.step)
        await asyncio.to_thread(self.config.learner.load_state, found.algorithm_state)
        upcoming, rollbacks = self.pacing.next, self.rollbacks + 1
        self._load({**found.extra["loop"], "open": []})
        # What the abandoned steps saw is not asked for again, and what they asked for is not used.
        self.pacing.next, self.pacing.step, self.rollbacks = upcoming, found.step, rollbacks
        self.dropped.clear()
        await self.on.publish_weights(self.config.learner.weights(), self.pacing.step)

    async def _export(self, name: str) -> None:
        if self.config.model is not None:
            await self.on.export(self.config.learner.weights(), self.config.model, name)

    async def _end_tasks(self) -> None:
        tasks = [*self.running, *([self.validation] if self.validation is not None else [])]
        self.running.clear()
        self.validation = None
        for task in tasks:
            task.cancel()
        if tasks:
            await asyncio.wait(tasks)

    async def _leave(self) -> None:
        """Nothing that was asked for runs on without a trainer. A trainer that is killed can't see to it: its successor
        goes on with what it finds."""
        if not self.asked:
            return
        self.on.note_abandoned()
        try:
            await asyncio.wait_for(self._give_up(), LEAVE_S)
        except (LogError, TimeoutError) as error:
            logger.warning("the run's open rollouts could not be cancelled: %s", error or "the log did not answer")

    async def _give_up(self) -> None:
        """Cancels the rollouts of open groups."""
        for group, resources_id in self.asked.items():
            await self.on.give_up(self.config.group_size, _key(group), resources_id)
        self.asked.clear()
        self.ended.clear()
        self.published.clear()
        self.pacing.open.clear()
        self.pacing.ended.clear()


def why_none(members: Sequence[FinishedRollout], which: str = "rollouts of a step") -> str:
    """Why none of these rollouts can be trained on: what most of them say."""
    reasons = Counter(reason for member in members for reason in _reasons(member))
    (reason, count), *_ = reasons.most_common()
    return f"none of the {len(members)} {which} can be trained on; {count} say: {reason}"


def _reasons(member: FinishedRollout) -> set[str]:
    if member.end.reason is not None or member.end.status != status.SUCCEEDED:
        return {member.end.reason or member.end.status}
    refused = {triplet.reason or "no reason" for triplet in member.triplets if not triplet.trainable}
    return refused or {"it has made no call through the proxy; does the agent use OPENAI_BASE_URL?"}


def _key(group: int) -> str:
    return f"train/{group}"
