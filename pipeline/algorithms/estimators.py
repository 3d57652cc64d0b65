"""Estimators: from rewards to the advantage of each turn. Pure functions of numbers.

An `Estimator` takes ``groups[g][m]``, the rewards of member m of group g by turn, and returns advantages of the same
shape. Members of a group are compared turn by turn, so that a right first step is not blamed for a wrong second one;
for rollouts of one turn this is what the papers do. A turn that only one member reached has nothing to be compared
with: its advantage is 0 (verl keeps its reward). Whatever is averaged over a batch counts each turn once, however many
tokens it has (verl counts tokens).
"""

import math
from collections import defaultdict
from collections.abc import Callable, Sequence
from typing import Final

MIN_DEVIATION: Final = 0.05  # without it, the noise of a batch that nearly agrees would count as much as any difference
EPSILON: Final = 1e-6  # of the papers' reference code: keeps a group that agrees from dividing by 0

Turns = dict[int, float]  # turn → reward, or advantage
Estimator = Callable[[Sequence[Sequence[Turns]]], list[list[Turns]]]


def turn_rewards(given: Sequence[tuple[int, float | None]]) -> Turns:
    """The reward of each turn of a rollout, from ``(turn, reward or None)`` in order of turns.

    A turn without a reward gets the next one of its rollout, so a single final reward counts for every turn. Turns
    after the last reward get 0.
    """
    rewards: Turns = {}
    following = 0.0
    for turn, reward in reversed(given):
        if reward is not None:
            following = reward
        rewards[turn] = following
    return rewards


def overlong_penalty(tokens: int, limit: int, cache: int) -> float:
    """What an answer of ``tokens`` tokens loses for its length: 0 up to ``limit`` − ``cache``, then linearly down to −1
    at ``limit``, and −1 beyond. DAPO's soft overlong punishment (Yu et al., arXiv:2503.14476, eq. 13)."""
    return max(-1.0, min(0.0, (limit - cache - tokens) / cache))


def grpo(groups: Sequence[Sequence[Turns]], min_deviation: float = MIN_DEVIATION) -> list[list[Turns]]:
    """(r − mean of the group) / max(deviation of these differences in the whole batch, ``min_deviation``).

    GRPO (Shao et al., DeepSeekMath, arXiv:2402.03300, eq. 3), except for the deviation: dividing by each *group's*
    gives the most weight to groups that nearly agree (Liu et al., Dr. GRPO, arXiv:2503.20783, section 3.1), so it is
    that of the batch (Hu et al., REINFORCE++, arXiv:2501.03262). `grpo_group` is the original.
    """
    centred = dr_grpo(groups)
    differences = [value for members in centred for turns in members for value in turns.values()]
    if not differences:
        return centred
    deviation = max(math.sqrt(math.fsum(d * d for d in differences) / len(differences)), min_deviation)
    return _map(centred, lambda value: value / deviation)


def grpo_group(groups: Sequence[Sequence[Turns]]) -> list[list[Turns]]:
    """(r − mean of the group) / (deviation of the group + 1e-6): GRPO as published (Shao et al., DeepSeekMath,
    arXiv:2402.03300), with the sample deviation (n − 1), as in verl."""

    def scaled(values: Sequence[float]) -> list[float]:
        mean = math.fsum(values) / len(values)
        deviation = math.sqrt(math.fsum((v - mean) ** 2 for v in values) / max(len(values) - 1, 1))
        return [(value - mean) / (deviation + EPSILON) for value in values]

    return _within_groups(groups, scaled)


def dr_grpo(groups: Sequence[Sequence[Turns]]) -> list[list[Turns]]:
    """r − mean of the group, not divided by anything: Dr. GRPO (Liu et al., arXiv:2503.20783). Its loss is
    aggregated with "sequence-mean-token-sum-norm"."""

    def centred(values: Sequence[float]) -> list[float]:
        mean = math.fsum(values) / len(values)
        return [value - mean for value in values]

    return _within_groups(groups, centred)


def rloo(groups: Sequence[Sequence[Turns]]) -> list[list[Turns]]:
    """r − mean of the group's *other* members: REINFORCE leave-one-out (Ahmadian et al., arXiv:2402.14740)."""

    def against_others(values: Sequence[float]) -> list[float]:
        if len(values) == 1:
            return [0.0]
        total = math.fsum(values)
        return [value - (total - value) / (len(values) - 1) for value in values]

    return _within_groups(groups, against_others)


def reinforce_pp(groups: Sequence[Sequence[Turns]]) -> list[list[Turns]]:
    """(r − mean of the batch) / deviation of the batch: REINFORCE++ (Hu et al., arXiv:2501.03262). It does
    not look at groups. Its KL penalty belongs to the loss here."""
    return _whitened_batch(groups)


def reinforce_pp_baseline(groups: Sequence[Sequence[Turns]]) -> list[list[Turns]]:
    """r − mean of the group, then whitened over the batch: the baseline form of REINFORCE++ (Hu et al.,
    arXiv:2501.03262). Unlike `grpo` it has no lower bound for the deviation."""
    return _whitened_batch(dr_grpo(groups))


def plain(groups: Sequence[Sequence[Turns]]) -> list[list[Turns]]:
    """The reward itself: REINFORCE without a baseline (Williams, 1992). For a learner with a critic, which computes
    advantages of its own."""
    return [[dict(turns) for turns in members] for members in groups]


def gae(
    rewards: Sequence[float], values: Sequence[float], discount: float = 1.0, decay: float = 0.95
) -> tuple[list[float], list[float]]:
    """Generalised advantage estimates, and returns (advantage + value), of the tokens of one rollout.

    δ(t) = r(t) + γ V(t+1) − V(t);  A(t) = δ(t) + γ λ A(t+1), with γ = ``discount``, λ = ``decay``, and V = 0 after the
    last token (Schulman et al., arXiv:1506.02438, eq. 16). ``rewards`` and ``values`` are by token: those that were
    sampled, without what stands between turns.
    """
    advantages: list[float] = []
    advantage = following = 0.0
    for reward, value in zip(reversed(rewards), reversed(values), strict=True):
        advantage = reward + discount * following - value + discount * decay * advantage
        following = value
        advantages.append(advantage)
    advantages.reverse()
    return advantages, [advantage + value for advantage, value in zip(advantages, values, strict=True)]


def whitened(values: Sequence[float]) -> list[float]:
    """(v − mean) / √(variance + 1e-8), with the sample variance (n − 1), as in verl's ``masked_whiten``. A single value
    becomes 0."""
    if not values:
        return []
    mean = math.fsum(values) / len(values)
    variance = math.fsum((value - mean) ** 2 for value in values) / max(len(values) - 1, 1)
    return [(value - mean) / math.sqrt(variance + 1e-8) for value in values]


def _whitened_batch(groups: Sequence[Sequence[Turns]]) -> list[list[Turns]]:
    found = iter(whitened([value for members in groups for turns in members for value in turns.values()]))
    return _map(groups, lambda value: next(found))


def _within_groups(
    groups: Sequence[Sequence[Turns]], estimate: Callable[[Sequence[float]], list[float]]
) -> list[list[Turns]]:
    """``estimate`` applied to the rewards of each turn of each group."""
    result = []
    for members in groups:
        by_turn: dict[int, list[float]] = defaultdict(list)
        for rewards in members:
            for turn, reward in rewards.items():
                by_turn[turn].append(reward)
        found = {turn: iter(estimate(values)) for turn, values in by_turn.items()}
        result.append([{turn: next(found[turn]) for turn in rewards} for rewards in members])
    return result


def _map(groups: Sequence[Sequence[Turns]], change: Callable[[float], float]) -> list[list[Turns]]:
    return [[{turn: change(value) for turn, value in turns.items()} for turns in members] for members in groups]
