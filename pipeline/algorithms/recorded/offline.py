"""Reinforcement learning from recorded groups of rollouts."""

import hashlib
from collections.abc import Sequence
from functools import partial
from typing import Any

from millstream.pipeline.algorithms.policy_gradient import NothingToLearn, why_none
from millstream.pipeline.algorithms.recorded.loop import FromRecords, Lesson
from millstream.pipeline.algorithms.rows import usable
from millstream.pipeline.algorithms.torch_learner import TorchLearner
from millstream.pipeline.training.datasets import Rollout
from millstream.pipeline.training.groups import FinishedRollout, Group, trainable_turns
from millstream.pipeline.training.report import mean_reward
from millstream.pipeline.training.reporting.steps import trained_tokens
from millstream.schemas.wire import status
from millstream.schemas.wire.records import RolloutEnd


class Offline(FromRecords[Group]):
    """An `Algorithm`: updates ``learner`` with groups of ``rollouts``, as `PolicyGradient` does with its own; see
    `FromRecords`. A step trains on ``groups_per_step`` of them. What another policy sampled needs a learner with
    ``correction`` "decoupled", which weights tokens by their recorded log-probabilities (`losses.importance_weights`).

    Raises `NothingToLearn` with the commonest reason if no group has two rollouts to compare, such as rollouts without
    recorded log-probabilities."""

    def __init__(
        self,
        learner: TorchLearner,
        rollouts: Sequence[Rollout],
        *,
        epochs: int = 1,
        groups_per_step: int = 16,
        **loop: Any,
    ) -> None:
        groups, _ = usable(groups_of(rollouts), learner.vocabulary)
        kept = [group for group in groups if sum(bool(trainable_turns(member)) for member in group.members) > 1]
        if not kept:
            members = [member for group in groups for member in group.members]
            if any(map(trainable_turns, members)):
                raise NothingToLearn(f"none of {len(groups)} recorded groups has two rollouts that can be trained on")
            raise NothingToLearn(why_none(members, "recorded rollouts"))
        super().__init__(learner, kept, _digest(kept), epochs=epochs, items_per_step=groups_per_step, **loop)
        self.arguments = {
            "learner": learner,
            "groups": len(kept),
            "epochs": epochs,
            "groups_per_step": groups_per_step,
            "validate_every": self.validate_every,
        }

    def lesson(self, items: Sequence[Group]) -> Lesson:
        members = [member for group in items for member in group.members]
        return Lesson(
            learn=partial(self.learner.update, items),
            reward=mean_reward(members),
            rollouts=len(members),
            tokens=trained_tokens(items),
        )


def groups_of(rollouts: Sequence[Rollout]) -> list[Group]:
    """Recorded rollouts, which have succeeded, as a trainer collects them."""
    members: dict[str, list[FinishedRollout]] = {}
    for turns in rollouts:
        first, rewards = turns[0], [turn.reward for turn in turns if turn.reward is not None]
        end = RolloutEnd(
            rollout_id=first.rollout_id,
            group_id=first.group_id,
            group_size=1,
            experiment_id=first.experiment_id,
            mode=first.mode,
            status=status.SUCCEEDED,
            attempt_id=first.attempt_id,
            attempts=1,
            turns=len(turns),
            reward=sum(rewards) if rewards else None,
            created_at=0,
            ended_at=0,
        )
        members.setdefault(first.group_id, []).append(FinishedRollout(end, tuple(turns)))
    return [Group(group_id, tuple(found)) for group_id, found in members.items()]


def _digest(groups: Sequence[Group]) -> str:
    """SHA-256 of what is learnt from."""
    found = hashlib.sha256()
    for group in groups:
        for member in group.members:
            for turn in member.triplets:
                tokens = turn.prompt_token_ids, turn.response_token_ids, turn.response_logprobs
                found.update(f"{group.group_id} {turn.rollout_id} {turn.turn} {turn.reward} {tokens}\n".encode())
    return found.hexdigest()
