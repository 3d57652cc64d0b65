"""What an algorithm learns from: rows of tokens, made from the triplets of groups."""

import logging
from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import Final

import numpy as np
import torch
from torch import Tensor

from millstream.pipeline.algorithms.advantages import Turns, advantages, turn_rewards
from millstream.pipeline.training.groups import FinishedRollout, Group
from millstream.schemas.wire import status
from millstream.schemas.wire.prefixes import conversations
from millstream.schemas.wire.records import Triplet
from millstream.schemas.wire.trainable import bad_reward, bad_tokens

logger = logging.getLogger(__name__)

INCOMPLETE: Final = (
    "a trainable triplet needs prompt tokens, and as many log-probabilities as response tokens; does the model server "
    "return both?"
)


@dataclass(frozen=True, slots=True)
class Sample:
    """A row: one turn, or several merged turns of a conversation. For each token of ``response``: its log-probability
    when it was sampled, its advantage, and whether it is learnt from (what stands between two turns is not)."""

    prompt: list[int]
    response: list[int]
    logprobs: list[float]
    advantages: list[float]
    mask: list[bool]


def usable(groups: Sequence[Group], vocabulary: int) -> tuple[list[Group], int]:
    """The groups, and how many of their members this model can't learn from: those are no longer trainable, and their
    end and the log say why. ``vocabulary``: the model's number of tokens."""
    found, dropped = [], 0
    for group in groups:
        members = []
        for member in group.members:
            reason = next((why for t in _trainable(member) if (why := _unusable(t, vocabulary))), None)
            if reason is not None:
                dropped += 1
                logger.warning("rollout %s is not trained on: %s", member.end.rollout_id, reason)
                member = replace(member, end=replace(member.end, trainable=False, reason=reason))
            members.append(member)
        found.append(Group(group.group_id, tuple(members)))
    return found, dropped


def _unusable(triplet: Triplet, vocabulary: int) -> str | None:
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


def samples_of(groups: Sequence[Group], merge_turns: bool = False) -> tuple[list[Sample], int, int]:
    """The rows to learn from, the number of turns in them, and the number of groups that were dropped because fewer
    than two members are trainable. Raises ValueError naming rollout and turn if a trainable triplet lacks tokens or
    log-probabilities."""
    kept = []
    for group in groups:
        members = [member for member in group.members if _trainable(member)]
        if len(members) >= 2:
            kept.append(members)
    samples = [
        merged([_sample(triplet, credit) for triplet in turns])
        for members, earned in zip(kept, advantages([list(map(_earned, members)) for members in kept]), strict=True)
        for member, credit in zip(members, earned, strict=True)
        for turns in (conversations(_trainable(member)) if merge_turns else [[t] for t in _trainable(member)])
    ]
    turns = sum(len(_trainable(member)) for members in kept for member in members)
    return samples, turns, len(groups) - len(kept)


def merged(turns: Sequence[Sample]) -> Sample:
    """One row of several turns. Each prompt begins with all of the turn before it."""
    row = turns[0]
    for turn in turns[1:]:
        between = turn.prompt[len(row.prompt) + len(row.response) :]
        nothing = [0.0] * len(between)
        row = Sample(
            row.prompt,
            row.response + between + turn.response,
            row.logprobs + nothing + turn.logprobs,
            row.advantages + nothing + turn.advantages,
            row.mask + [False] * len(between) + turn.mask,
        )
    return row


def padded(samples: Sequence[Sample]) -> tuple[Tensor, Tensor, Tensor]:
    """Log-probabilities, advantages and mask of the responses: (samples, longest response), padded on the left."""
    longest = max(len(sample.response) for sample in samples)
    logprobs, advantage = torch.zeros(len(samples), longest), torch.zeros(len(samples), longest)
    mask = torch.zeros(len(samples), longest, dtype=torch.bool)
    for i, sample in enumerate(samples):
        place = (i, slice(longest - len(sample.response), None))
        logprobs[place] = torch.tensor(sample.logprobs)
        advantage[place] = torch.tensor(sample.advantages)
        mask[place] = torch.tensor(sample.mask)
    return logprobs, advantage, mask


def _trainable(member: FinishedRollout) -> list[Triplet]:
    if not member.end.trainable or member.end.status != status.SUCCEEDED:
        return []
    return [triplet for triplet in member.triplets if triplet.trainable]


def _earned(member: FinishedRollout) -> Turns:
    """The reward of each trainable turn. The reward of a turn that is not trainable counts for those before it."""
    rewards = turn_rewards([(triplet.turn, triplet.reward) for triplet in member.triplets])
    return {triplet.turn: rewards[triplet.turn] for triplet in _trainable(member)}


def _sample(triplet: Triplet, credit: Turns) -> Sample:
    parts = triplet.prompt_token_ids, triplet.response_token_ids, triplet.response_logprobs
    if not all(parts) or len(parts[1] or b"") != len(parts[2] or b""):
        raise ValueError(f"rollout {triplet.rollout_id}, turn {triplet.turn}: {INCOMPLETE}")
    prompt, response, logprobs = (
        np.frombuffer(part or b"", kind).tolist() for part, kind in zip(parts, ("<i4", "<i4", "<f4"), strict=True)
    )
    return Sample(prompt, response, logprobs, [credit[triplet.turn]] * len(response), [True] * len(response))
