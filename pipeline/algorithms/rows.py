"""What a learner learns from: rows of tokens, made from the triplets of groups."""

import logging
from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import Final

import numpy as np

from millstream.pipeline.algorithms.estimators import Estimator, Turns, grpo, overlong_penalty, turn_rewards
from millstream.pipeline.training.groups import FinishedRollout, Group, trainable_turns
from millstream.producers.log_lines import rollout_fields
from millstream.schemas.errors import ConfigError
from millstream.schemas.wire.prefixes import conversations
from millstream.schemas.wire.records import Triplet
from millstream.schemas.wire.trainable import bad_reward, bad_tokens

logger = logging.getLogger(__name__)

INCOMPLETE: Final = (
    "a trainable triplet needs prompt tokens, and as many log-probabilities as response tokens; does the model server "
    "return both?"
)


@dataclass(frozen=True, slots=True)
class Row:
    """One turn, or several merged turns of a conversation, with everything that a learner needs to know of them.

    The lists have one entry for each token of ``response``. ``rl``, ``ce`` and ``ref_kl`` are the token's weights in
    the policy loss, the cross-entropy and the divergence from the reference; a token of weight 0 in all of them (what
    stands between two turns) is read and not learnt from.
    """

    prompt: list[int]
    response: list[int]
    logprobs: list[float]  # of the policy that sampled the tokens
    advantages: list[float]
    rewards: list[float]  # what a turn earned, at its last token; for a critic
    rl: list[float]
    ce: list[float]
    ref_kl: list[float]
    rollout_id: str = ""
    versions: tuple[str | None, ...] = ()  # of the model, one a turn


@dataclass(frozen=True, slots=True)
class Overlong:
    """The soft punishment of long answers: see `overlong_penalty`. Both are tokens of one answer. Raises `ConfigError`
    for a range that is none."""

    limit: int  # the max_tokens that answers are asked for with
    cache: int  # the last ones of these, over which the punishment grows

    def __post_init__(self) -> None:
        if not 0 < self.cache <= self.limit:
            raise ConfigError(f"overlong: 0 < cache <= limit must hold, not cache {self.cache}, limit {self.limit}")


def usable(groups: Sequence[Group], vocabulary: int) -> tuple[list[Group], int]:
    """The groups, and how many of their members this model can't learn from: those are no longer trainable, and their
    end and the log say why. ``vocabulary``: the model's number of tokens."""
    found, dropped = [], 0
    for group in groups:
        members = []
        for member in group.members:
            reason = next((why for t in trainable_turns(member) if (why := unusable(t, vocabulary))), None)
            if reason is not None:
                dropped += 1
                rollout_id = member.end.rollout_id
                logger.warning("rollout %s is not trained on: %s", rollout_id, reason, extra=rollout_fields(rollout_id))
                member = replace(member, end=replace(member.end, trainable=False, reason=reason))
            members.append(member)
        found.append(Group(group.group_id, tuple(members)))
    return found, dropped


def unusable(triplet: Triplet, vocabulary: int) -> str | None:
    """Why a model with so many tokens can't learn from a turn; None if it can."""
    prompt, response, logprobs = triplet.prompt_token_ids, triplet.response_token_ids, triplet.response_logprobs
    if not (prompt and response and logprobs) or len(response) != len(logprobs):
        why: str | None = INCOMPLETE
    elif (why := bad_tokens(prompt, response, logprobs)) is None:
        largest = int(np.frombuffer(prompt + response, "<i4").max())
        if largest >= vocabulary:
            why = f"token id {largest} is none of the model's {vocabulary} tokens; was it sampled by another model?"
        elif triplet.reward is not None and bad_reward(triplet.reward):
            why = f"its reward is {triplet.reward:g}"
    return None if why is None else f"turn {triplet.turn}: {why}"


def rows_of(
    groups: Sequence[Group], estimator: Estimator = grpo, merge_turns: bool = False, overlong: Overlong | None = None
) -> tuple[list[Row], int, int]:
    """The rows to learn from, the number of turns in them, and the number of groups that were dropped because fewer
    than two members are trainable. ``merge_turns`` makes one row of turns that continue each other token by token.
    Rows of a rollout follow each other in the order of its turns.

    Raises ValueError naming rollout and turn if a trainable triplet lacks tokens or log-probabilities.
    """
    kept = []
    for group in groups:
        members = [member for member in group.members if trainable_turns(member)]
        if len(members) >= 2:
            kept.append(members)
    earned = estimator([[_earned(member, overlong) for member in members] for members in kept])
    rows = [
        merged([row_of(triplet, credit, rewards) for triplet in turns])
        for members, of_group in zip(kept, earned, strict=True)
        for member, credit in zip(members, of_group, strict=True)
        for rewards in [_own(member, overlong)]
        for turns in (conversations(trainable_turns(member)) if merge_turns else [[t] for t in trainable_turns(member)])
    ]
    turns = sum(len(trainable_turns(member)) for members in kept for member in members)
    return rows, turns, len(groups) - len(kept)


def varied(group: Group) -> bool:
    """Whether any two trainable members earned something different at the same turn. Without a difference a group has
    no advantages to learn from: DAPO's dynamic sampling draws another one (arXiv:2503.14476, eq. 11)."""
    seen: dict[int, float] = {}
    return any(
        seen.setdefault(turn, reward) != reward
        for member in group.members
        if trainable_turns(member)
        for turn, reward in _earned(member).items()
    )


def merged(turns: Sequence[Row]) -> Row:
    """One row of several turns. Each prompt begins with all of the turn before it."""
    row = turns[0]
    for turn in turns[1:]:
        between = turn.prompt[len(row.prompt) + len(row.response) :]
        nothing = [0.0] * len(between)
        row = Row(
            prompt=row.prompt,
            response=row.response + between + turn.response,
            logprobs=row.logprobs + nothing + turn.logprobs,
            advantages=row.advantages + nothing + turn.advantages,
            rewards=row.rewards + nothing + turn.rewards,
            rl=row.rl + nothing + turn.rl,
            ce=row.ce + nothing + turn.ce,
            ref_kl=row.ref_kl + nothing + turn.ref_kl,
            rollout_id=row.rollout_id,
            versions=row.versions + turn.versions,
        )
    return row


def _earned(member: FinishedRollout, overlong: Overlong | None = None) -> Turns:
    """The reward of each trainable turn. The reward of a turn that is not trainable counts for those before it."""
    rewards = turn_rewards([(triplet.turn, triplet.reward) for triplet in member.triplets])
    return {triplet.turn: rewards[triplet.turn] + _penalty(triplet, overlong) for triplet in trainable_turns(member)}


def _own(member: FinishedRollout, overlong: Overlong | None) -> Turns:
    """What was earned at each trainable turn, and at the untrainable ones that follow it: each reward once."""
    rewards: Turns = {}
    last = None
    trainable = {triplet.turn for triplet in trainable_turns(member)}
    for triplet in member.triplets:
        if triplet.turn in trainable:
            last = triplet.turn
            rewards[last] = _penalty(triplet, overlong)
        if last is not None:
            rewards[last] += triplet.reward or 0.0
    return rewards


def _penalty(triplet: Triplet, overlong: Overlong | None) -> float:
    if overlong is None:
        return 0.0
    return overlong_penalty(len(triplet.response_token_ids or b"") // 4, overlong.limit, overlong.cache)


def row_of(triplet: Triplet, credit: Turns, rewards: Turns) -> Row:
    """Of one turn. Raises ValueError if it lacks tokens or log-probabilities."""
    parts = triplet.prompt_token_ids, triplet.response_token_ids, triplet.response_logprobs
    if not all(parts) or len(parts[1] or b"") != len(parts[2] or b""):
        raise ValueError(f"rollout {triplet.rollout_id}, turn {triplet.turn}: {INCOMPLETE}")
    prompt, response, logprobs = (
        np.frombuffer(part or b"", kind).tolist() for part, kind in zip(parts, ("<i4", "<i4", "<f4"), strict=True)
    )
    length = len(response)
    return Row(
        prompt=prompt,
        response=response,
        logprobs=logprobs,
        advantages=[credit[triplet.turn]] * length,
        rewards=[0.0] * (length - 1) + [rewards[triplet.turn]],
        rl=[1.0] * length,
        ce=[0.0] * length,
        ref_kl=[1.0] * length,
        rollout_id=triplet.rollout_id,
        versions=(triplet.model_version,),
    )
