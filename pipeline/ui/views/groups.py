"""A group: its members side by side, their advantages, and where they part."""

from dataclasses import dataclass
from typing import Any, Final

from starlette.exceptions import HTTPException
from starlette.requests import Request
from starlette.responses import Response
from starlette.routing import Route

from millstream.pipeline.algorithms.estimators import Turns, grpo_group, turn_rewards
from millstream.pipeline.store import pages
from millstream.pipeline.store.queries import OPEN, Ask, read_newest, read_spans
from millstream.pipeline.store.rollout_diff import Step, steps
from millstream.pipeline.ui.render import page
from millstream.pipeline.ui.source import Source
from millstream.schemas.wire.records import Span

MEMBERS: Final = 64  # in the table
SIDE_BY_SIDE: Final = 8  # with their steps; more don't fit, and cost their spans
STEPS: Final = 60  # of each


@dataclass(frozen=True, slots=True)
class Member:
    """``same``: how many steps it has in common with the first member; None if it has no steps that are shown."""

    row: dict[str, Any]
    advantages: Turns
    steps: list[Step]
    more: int
    same: int | None


def group(request: Request) -> Response:
    source: Source = request.app.state.source
    ask, group_id = source.store.sql, request.path_params["id"]
    ids = members_of(ask, group_id)
    rows = ask(pages.MEMBERS, {"ids": ids}).records() if ids else []
    if not rows:
        raise HTTPException(404, f"The store has no group {group_id!r}.")
    rewards = [row["reward"] for row in rows if row["reward"] is not None]
    advantages = advantages_of(ask, ids)
    walks = _walks(ask, [row["rollout_id"] for row in rows[:SIDE_BY_SIDE]])
    first = walks.get(rows[0]["rollout_id"], [])
    members = []
    for row in rows:
        walk = walks.get(row["rollout_id"], [])
        same = None if not walk else _common(first, walk)
        shown = dict(sorted(advantages.get(row["rollout_id"], {}).items()))
        members.append(Member(row, shown, walk[:STEPS], max(len(walk) - STEPS, 0), same))
    values = {
        "group_id": group_id,
        "members": members,
        "shown": SIDE_BY_SIDE,
        "mean": sum(rewards) / len(rewards) if rewards else None,
        "no_signal": len(rewards) > 1 and max(rewards) == min(rewards),
        "open": sum(row["status"] in OPEN for row in rows),
        "parts_at": min((m.same for m in members[1:] if m.same is not None), default=None),
    }
    return page(request, "group.html", values)


def members_of(ask: Ask, group_id: str) -> list[str]:
    """Ids of the rollouts of a group, at most `MEMBERS`."""
    return read_newest(ask, {"group_id": group_id}, "ASC", MEMBERS)


def advantages_of(ask: Ask, ids: list[str]) -> dict[str, Turns]:
    """The advantage of each turn of each member of a group, as GRPO computes it (see `grpo_group`)."""
    given: dict[str, list[tuple[int, float | None]]] = {}
    for rollout_id, turn, reward in ask(pages.TURN_REWARDS, {"ids": ids}).rows:
        given.setdefault(rollout_id, []).append((turn, reward))
    (found,) = grpo_group([[turn_rewards(turns) for turns in given.values()]])
    return dict(zip(given, found, strict=True))


def _walks(ask: Ask, ids: list[str]) -> dict[str, list[Step]]:
    """The steps of each rollout's attempt that succeeded, else of its latest."""
    deciding = [row["attempt_id"] for row in ask(pages.DECIDING, {"ids": ids}).records()]
    spans: dict[str, list[Span]] = {}
    if deciding:
        for span in read_spans(ask, {"rollout_id": ids, "attempt_id": deciding}):
            spans.setdefault(span.rollout_id, []).append(span)
    return {rollout_id: steps(found) for rollout_id, found in spans.items()}


def _common(a: list[Step], b: list[Step]) -> int:
    return next(
        (n for n, (x, y) in enumerate(zip(a, b, strict=False)) if x.identity != y.identity), min(len(a), len(b))
    )


ROUTES: Final = [Route("/groups/{id:path}", group)]
