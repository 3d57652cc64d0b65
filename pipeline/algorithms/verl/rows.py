"""Our groups as verl's rows: keys, fields and tags of its replay buffer, and the advantage of each token. Pure.

The contract is that of verl 0.9 (`verl.trainer.ppo.v1.replay_buffer.ReplayBuffer`): a row's key is
``{uid}_{session}_{index}``, so a uid holds no "_"; the tags ``min_global_steps`` and ``max_global_steps`` are
mandatory. verl's own GRPO takes the last row of a session for all of it, which loses the credit of single turns. So
each row's tag says which of its tokens belong to which turn and what that turn has earned, and `token_advantages` gives
each token the advantage of its turn. Tags are part of verl's checkpoints.
"""

from collections import defaultdict
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any, Final

import numpy as np

from millstream.pipeline.algorithms.estimators import Estimator, Turns, turn_rewards
from millstream.pipeline.training.groups import FinishedRollout, Group, Lineage, steps_of
from millstream.schemas.wire import status
from millstream.schemas.wire.prefixes import conversations
from millstream.schemas.wire.records import Triplet
from millstream.schemas.wire.trainable import bad_reward, bad_tokens

SEPARATOR: Final = "_"  # of the parts of a row's key


@dataclass(frozen=True, slots=True)
class Row:
    """A row of verl's batch: one turn, or the turns of a conversation. ``fields`` are plain data; lists of numbers
    become tensors."""

    key: str
    fields: Mapping[str, Any]
    tag: Mapping[str, Any]


@dataclass(frozen=True, slots=True)
class RowRules:
    """``vocabulary``: the model's number of tokens. ``least``: how many members have to be trainable; the mean of one
    alone says nothing about it."""

    vocabulary: int
    merge_turns: bool = True
    least: int = 2


@dataclass(frozen=True, slots=True)
class GroupRows:
    """The rows of a group; none if it can't be trained on. ``reasons``: why members were left out."""

    rows: tuple[Row, ...]
    reasons: tuple[str, ...]


def uid_of(attempt: str, asked: int, draw: int) -> str:
    """The uid of the draw-th prompt (from 0) of a run. ``attempt`` names the start of the job that has drawn it, and
    ``asked`` the updates that its policy had then: both are needed to ask for the same rollouts once more."""
    if not attempt.isalnum():
        raise ValueError(f"attempt {attempt!r}: verl splits keys at {SEPARATOR!r}, and we at hyphens")
    return f"{attempt}-{asked}-{draw}"


def asked_with(uid: str) -> tuple[str, int]:
    """``attempt`` and ``asked`` of a uid."""
    attempt, asked, _ = uid.split("-")
    return attempt, int(asked)


def rows_of(group: Group, uid: str, step: int, lineage: Lineage, rules: RowRules) -> GroupRows:
    """The rows of a group that has ended. ``uid`` is verl's, ``step`` the training step that has asked for it,
    ``lineage`` says which model versions may be trained on."""
    members: list[tuple[int, list[Triplet]]] = []
    reasons = []
    for session, member in enumerate(group.members):
        turns, reason = _trainable(member, lineage, rules)
        if reason is None:
            members.append((session, turns))
        else:
            reasons.append(f"rollout {member.end.rollout_id}: {reason}")
    if len(members) < rules.least:
        return GroupRows((), tuple(reasons))
    rows = []
    for session, turns in members:
        credit = turn_rewards([(t.turn, t.reward) for t in group.members[session].triplets])
        parts = list(conversations(turns)) if rules.merge_turns else [[turn] for turn in turns]
        for index, part in enumerate(parts):
            rows.append(_row(f"{uid}{SEPARATOR}{session}{SEPARATOR}{index}", part, credit, len(turns), step, lineage))
    return GroupRows(tuple(rows), tuple(reasons))


def token_advantages(
    keys: Sequence[str], tags: Sequence[Mapping[str, Any]], advantages: Estimator
) -> list[list[float]]:
    """For each row of a batch the advantages of its response's tokens; 0 between turns and in verl's padding.

    A group is compared turn by turn, as everywhere in Millstream; its rows may lie anywhere in the batch.
    """
    members: dict[str, dict[str, Turns]] = defaultdict(lambda: defaultdict(dict))
    for key, tag in zip(keys, tags, strict=True):
        if not tag.get("is_padding"):
            uid, session, _ = key.split(SEPARATOR)
            members[uid][session].update({turn: reward for turn, _, _, reward in tag["credit"]})
    groups = [list(sessions.values()) for sessions in members.values()]
    earned = {
        (uid, session): turns
        for (uid, sessions), of_group in zip(members.items(), advantages(groups), strict=True)
        for session, turns in zip(sessions, of_group, strict=True)
    }
    found = []
    for key, tag in zip(keys, tags, strict=True):
        row = [0.0] * tag["response_len"]
        if not tag.get("is_padding"):
            uid, session, _ = key.split(SEPARATOR)
            for turn, start, stop, _ in tag["credit"]:
                row[start:stop] = [earned[uid, session][turn]] * (stop - start)
        found.append(row)
    return found


def rollouts_of(keys: Sequence[str], tags: Sequence[Mapping[str, Any]]) -> dict[str, list[str]]:
    """The ids of the rollouts of a batch's rows, by uid. verl's padding has none."""
    found: dict[str, set[str]] = defaultdict(set)
    for key, tag in zip(keys, tags, strict=True):
        if not tag.get("is_padding"):
            found[key.split(SEPARATOR)[0]].add(tag["rollout_id"])
    return {uid: sorted(ids) for uid, ids in sorted(found.items())}


def _trainable(member: FinishedRollout, lineage: Lineage, rules: RowRules) -> tuple[list[Triplet], str | None]:
    """The turns that can be trained on, and why there are none."""
    if not member.end.trainable or member.end.status != status.SUCCEEDED:
        return [], member.end.reason or member.end.status
    turns = [triplet for triplet in member.triplets if triplet.trainable]
    for turn in turns:
        if (reason := _unusable(turn, lineage, rules)) is not None:
            return [], f"turn {turn.turn}: {reason}"
    return turns, None if turns else "none of its turns is trainable"


def _unusable(triplet: Triplet, lineage: Lineage, rules: RowRules) -> str | None:
    prompt, response, logprobs = triplet.prompt_token_ids, triplet.response_token_ids, triplet.response_logprobs
    if not (prompt and response and logprobs) or len(response) != len(logprobs):
        return (
            "it needs prompt tokens, and a log-probability of each response token; does the model server return both?"
        )
    if (reason := bad_tokens(prompt, response, logprobs)) is not None:
        return reason
    largest = int(np.frombuffer(prompt + response, "<i4").max())
    if largest >= rules.vocabulary:
        return f"token id {largest} is none of the model's {rules.vocabulary} tokens; was it sampled by another model?"
    if triplet.reward is not None and bad_reward(triplet.reward):
        return f"its reward is {triplet.reward:g}"
    try:
        steps_of(triplet, lineage)
    except ValueError as error:
        return str(error)
    return None


def _row(key: str, turns: Sequence[Triplet], credit: Turns, num_turns: int, step: int, lineage: Lineage) -> Row:
    prompt = _ints(turns[0].prompt_token_ids)
    response: list[int] = []
    mask: list[int] = []
    logprobs: list[float] = []
    rewards: list[float] = []
    spans = []
    for turn in turns:
        between = _ints(turn.prompt_token_ids)[len(prompt) + len(response) :]
        answer = _ints(turn.response_token_ids)
        start = len(response) + len(between)
        spans.append([turn.turn, start, start + len(answer), credit[turn.turn]])
        response += between + answer
        mask += [0] * len(between) + [1] * len(answer)
        logprobs += [0.0] * len(between) + np.frombuffer(turn.response_logprobs or b"", "<f4").tolist()
        # What a critic sums up: what each turn was given itself. The last turn of a row is credited with what follows.
        reward = credit[turn.turn] if turn is turns[-1] else turn.reward or 0.0
        rewards += [0.0] * (len(between) + len(answer) - 1) + [reward]
    made = [step for turn in turns for step in steps_of(turn, lineage)]
    oldest, newest = min(made), max(made)
    uid, session, _ = key.split(SEPARATOR)
    fields = {
        "prompts": prompt,
        "responses": response,
        "response_mask": mask,
        "loss_mask": mask,
        "rollout_log_probs": logprobs,
        "rm_scores": rewards,
        "input_ids": prompt + response,
        "position_ids": list(range(len(prompt) + len(response))),
        "uid": uid,
        "session_id": int(session),
        "global_steps": step,
        "num_turns": num_turns,
        "multi_modal_inputs": {},
        "data_source": "millstream",  # verl's dumps and validation read these two
        "reward_model": {"ground_truth": ""},
        "extra_fields": {"min_global_steps": oldest, "max_global_steps": newest, "reward_extra_info": {}},
    }
    tag = {
        "status": "success",
        "prompt_len": len(prompt),
        "response_len": len(response),
        "seq_len": len(prompt) + len(response),
        "global_steps": step,
        "min_global_steps": oldest,
        "max_global_steps": newest,
        "credit": spans,
        "rollout_id": turns[0].rollout_id,
    }
    return Row(key, fields, tag)


def _ints(ids: bytes | None) -> list[int]:
    numbers: list[int] = np.frombuffer(ids or b"", "<i4").tolist()
    return numbers
