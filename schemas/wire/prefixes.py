"""Conversations: turns whose prompts continue an earlier turn's prompt and response, token by token.

Such turns can be trained as one sequence. In the log a `Triplet` refers to the turn that it continues and holds only
what is new, so a conversation takes bytes in proportion to its length, not to its square. `share` and `expand` are
inverse to each other.
"""

from collections.abc import Iterator, Sequence
from dataclasses import dataclass, replace
from typing import Final

from millstream.schemas.wire.records import Triplet

TOKEN_BYTES: Final = 4
OPEN: Final = 8  # conversations to compare a prompt with, the latest first: bounds the cost of a call
WORTH_BYTES: Final = 64  # a shorter common prefix is not worth a reference
# A template ends a prompt with the beginning of the answer (role, thinking). A prompt that contains all of an earlier
# one except for these tokens continues it, with the response in other tokens.
OPENING_TOKENS: Final = 8


@dataclass(frozen=True, slots=True)
class Link:
    """What a turn's prompt shares with the start of an earlier turn's prompt and response. ``whole``: it contains both
    completely; ``broken``: it continues that turn, but the response's tokens have changed."""

    turn: int  # index of the earlier one
    tokens: int
    whole: bool
    broken: bool


def links(triplets: Sequence[Triplet]) -> list[Link | None]:
    """For each triplet (expanded, in order) the earlier one that its prompt continues, or shares the longest start
    with, among the last `OPEN` conversations; None without one."""
    found: list[Link | None] = []
    tails: list[int] = []  # last turns of the conversations, the latest first
    for at, triplet in enumerate(triplets):
        link = next((whole for tail in tails if (whole := _whole(triplet, triplets[tail], tail))), None)
        if link is None:
            shared = [part for tail in tails if (part := _part(triplet, triplets[tail], tail))]
            link = max(shared, key=lambda part: part.tokens, default=None)
        found.append(link)
        if link is not None and (link.whole or link.broken):
            tails.remove(link.turn)
        tails = [at, *tails[: OPEN - 1]]
    return found


def share(triplets: Sequence[Triplet]) -> list[Triplet]:
    """The triplets of an attempt as they are written: without what earlier ones contain already."""
    turns = [triplet.turn for triplet in triplets]
    if turns != sorted(set(turns)):  # a custom adapter's own numbers: references would be ambiguous
        return list(triplets)
    shared = []
    for triplet, link in zip(triplets, links(triplets), strict=True):
        if link is None:
            shared.append(triplet)
            continue
        earlier = triplets[link.turn]
        characters = common(triplet.prompt, earlier.prompt)
        shared.append(
            replace(
                triplet,
                prefix_turn=earlier.turn,
                prefix_tokens=link.tokens,
                prefix_characters=characters,
                prompt=triplet.prompt[characters:],
                prompt_token_ids=triplet.prompt_token_ids and triplet.prompt_token_ids[link.tokens * TOKEN_BYTES :],
                tools=None if triplet.tools == earlier.tools else triplet.tools or "[]",
            )
        )
    return shared


def expand(triplets: Sequence[Triplet]) -> list[Triplet]:
    """The triplets of one attempt with their whole prompts, by turn. Raises ValueError naming rollout and turn if one
    refers to a turn that is missing or too short."""
    triplets = sorted(triplets, key=lambda t: t.turn)
    if all(triplet.prefix_turn is None for triplet in triplets):
        return triplets
    whole: dict[int, Triplet] = {}
    for triplet in triplets:
        if triplet.prefix_turn is not None:
            earlier = whole.get(triplet.prefix_turn)
            tokens = b"" if earlier is None else (earlier.prompt_token_ids or b"") + (earlier.response_token_ids or b"")
            size = triplet.prefix_tokens * TOKEN_BYTES
            if earlier is None or size > len(tokens) or triplet.prefix_characters > len(earlier.prompt):
                raise ValueError(
                    f"rollout {triplet.rollout_id}, turn {triplet.turn}: it continues turn {triplet.prefix_turn}, "
                    "which is missing or shorter; all triplets of an attempt belong together"
                )
            triplet = replace(
                triplet,
                prefix_turn=None,
                prefix_tokens=0,
                prefix_characters=0,
                prompt=earlier.prompt[: triplet.prefix_characters] + triplet.prompt,
                prompt_token_ids=None if triplet.prompt_token_ids is None else tokens[:size] + triplet.prompt_token_ids,
                tools=earlier.tools if triplet.tools is None else None if triplet.tools == "[]" else triplet.tools,
            )
        whole[triplet.turn] = triplet
    return list(whole.values())


def conversations(triplets: Sequence[Triplet]) -> Iterator[list[Triplet]]:
    """The turns (expanded, in order) in runs that can each be trained as one sequence: every turn's prompt begins with
    all tokens of the turn before it in its run."""
    runs: list[list[Triplet]] = []
    run_of: dict[int, list[Triplet]] = {}
    for at, (triplet, link) in enumerate(zip(triplets, links(triplets), strict=True)):
        if link is not None and link.whole:
            run_of[at] = run_of[link.turn]
        else:
            run_of[at] = []
            runs.append(run_of[at])
        run_of[at].append(triplet)
    yield from runs


def _whole(triplet: Triplet, earlier: Triplet, turn: int) -> Link | None:
    prompt, before, answer = triplet.prompt_token_ids, earlier.prompt_token_ids, earlier.response_token_ids
    if not prompt or not before or answer is None:
        return None
    if not (prompt.startswith(before) and prompt.startswith(answer, len(before))):
        return None
    return Link(turn, (len(before) + len(answer)) // TOKEN_BYTES, whole=True, broken=False)


def _part(triplet: Triplet, earlier: Triplet, turn: int) -> Link | None:
    prompt, before = triplet.prompt_token_ids or b"", earlier.prompt_token_ids or b""
    if prompt and before:
        if prompt[:WORTH_BYTES] != before[:WORTH_BYTES]:
            return None
        tokens = common(prompt, before + (earlier.response_token_ids or b"")) // TOKEN_BYTES
        longer = len(prompt) > len(before)
        broken = longer and tokens >= max(len(before) // TOKEN_BYTES - OPENING_TOKENS, 1)
        worth = broken or tokens * TOKEN_BYTES >= WORTH_BYTES
        return Link(turn, tokens, whole=False, broken=broken) if worth else None
    start = triplet.prompt[:WORTH_BYTES]
    worth = len(start) == WORTH_BYTES and earlier.prompt.startswith(start)
    return Link(turn, 0, whole=False, broken=False) if worth else None


def common(one: str | bytes, other: str | bytes) -> int:
    """Length of the common prefix; compares in ever smaller pieces, at most twice the shorter length in all."""
    at, step = 0, min(len(one), len(other))
    while step:
        if one[at : at + step] == other[at : at + step]:
            at += step
            step = min(step, len(one) - at, len(other) - at)
        else:
            step //= 2
    return at
