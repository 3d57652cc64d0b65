"""What `TripletMaker` makes of an attempt, and why, as rows for people and programs."""

from typing import Any

from millstream.consumers.adapter.triplets import Trace, TripletMaker, Verdict
from millstream.schemas.wire.prefixes import Link, links
from millstream.schemas.wire.records import RolloutEnd, Triplet


def explained(maker: TripletMaker, trace: Trace, end: RolloutEnd | None) -> dict[str, Any]:
    """The adapter's end, a row for each call and for each reward that is left out, and the counts."""
    explanation, triplets = maker.explain(trace), maker(trace)
    found = links(triplets)
    counts = dict(explanation.counts())
    counts["turns that go on from another"] = sum(link is not None and link.whole for link in found)
    counts["turns whose prompt broke off from another's"] = sum(link is not None and link.broken for link in found)
    return {
        "rollout_id": trace.task.rollout_id,
        "attempt_id": trace.attempt_id,
        "status": "open" if end is None else end.status,
        "reason": None if end is None else end.reason,
        "calls": [
            _row(verdict, triplet, link)
            for verdict, triplet, link in zip(explanation.verdicts, triplets, found, strict=True)
        ],
        "rewards_left_out": [
            {"name": reward.name, "value": str(reward.value), "why": why} for reward, why in explanation.left_out
        ],
        "counts": counts,
    }


def _row(verdict: Verdict, triplet: Triplet, link: Link | None) -> dict[str, Any]:
    going_on = None
    if link is not None and (link.whole or link.broken):
        going_on = str(link.turn) if link.whole else f"{link.turn}, broken after {link.tokens} tokens"
    return {
        "turn": triplet.turn,
        "agent": triplet.agent_name,
        "model": verdict.call.model,
        "prompt tokens": len(triplet.prompt_token_ids or b"") // 4,
        "response tokens": len(triplet.response_token_ids or b"") // 4,
        "goes on from": going_on,
        "rewards": ", ".join(f"{reward.name} {reward.value:g}" for reward in verdict.rewards),
        "earned": triplet.reward,
        "not trained on": triplet.reason,
    }
