"""The advantage of each turn in a group. Pure functions of rewards.

GRPO (Shao et al., DeepSeekMath, arXiv:2402.03300, eq. 3) compares the members of a group with each other. Here this
happens turn by turn, so that a right first step is not blamed for a wrong second one. Dividing by each *group's*
deviation gives the most weight to groups that nearly agree (Liu et al., Dr. GRPO, arXiv:2503.20783, section 3.1), so
the deviation is that of the whole batch (Hu et al., REINFORCE++, arXiv:2501.03262), with a lower bound.
"""

import math
from collections import defaultdict
from collections.abc import Sequence

MIN_DEVIATION = 0.05  # without it, the noise of a batch that nearly agrees would count as much as any difference

Turns = dict[int, float]  # turn → reward, or advantage


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


def advantages(groups: Sequence[Sequence[Turns]], min_deviation: float = MIN_DEVIATION) -> list[list[Turns]]:
    """Reward − mean of the group's same turn, over the deviation of these differences in the whole batch.

    ``groups[g][m]`` are the rewards of member m of group g by turn; the result has the same shape.
    """
    centred: list[list[Turns]] = []
    for members in groups:
        by_turn: dict[int, list[float]] = defaultdict(list)
        for rewards in members:
            for turn, reward in rewards.items():
                by_turn[turn].append(reward)
        means = {turn: math.fsum(values) / len(values) for turn, values in by_turn.items()}
        centred.append([{turn: reward - means[turn] for turn, reward in rewards.items()} for rewards in members])
    differences = [value for members in centred for turns in members for value in turns.values()]
    if not differences:
        return centred
    deviation = max(math.sqrt(math.fsum(d * d for d in differences) / len(differences)), min_deviation)
    return [[{turn: value / deviation for turn, value in turns.items()} for turns in members] for members in centred]
