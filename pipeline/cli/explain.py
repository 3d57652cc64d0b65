"""``millstream explain``: what the adapter made of something, and why."""

import json
from typing import Annotated, Any

import typer
from rich.table import Table

from millstream.consumers.adapter.read_trace import read_trace
from millstream.consumers.adapter.triplets import Trace, TripletMaker, Verdict
from millstream.pipeline.cli.open import with_log
from millstream.pipeline.cli.output import Json, out
from millstream.schemas.config.settings import load_settings
from millstream.schemas.wire.prefixes import Link, links
from millstream.schemas.wire.records import RolloutEnd, Triplet

app = typer.Typer(no_args_is_help=True, help="What was made of a rollout, and why.")


@app.command("rollout", epilog="Example: millstream explain rollout 0199a3c4-…")
def explain_rollout(
    rollout_id: Annotated[str, typer.Argument(help="As `millstream rollouts` prints it.")],
    attempt: Annotated[str | None, typer.Option(help="Another attempt than the one that decided.")] = None,
    as_json: Json = False,
) -> None:
    """Show which of a rollout's calls train, what each earned, and what was left out: by this deployment's settings."""
    settings = load_settings()
    maker = TripletMaker(settings.triplets)
    trace, end = with_log(settings, lambda log: read_trace(log, settings.topics, rollout_id, attempt))
    found = explained(maker, trace, end)
    if as_json:
        out.print_json(json.dumps(found))
        return
    out.print(f"rollout {rollout_id}, attempt {trace.attempt_id}: {found['status']}", highlight=False)
    if found["reason"]:
        out.print(found["reason"], highlight=False, markup=False)
    for title, rows in (("calls", found["calls"]), ("rewards left out", found["rewards_left_out"])):
        if rows:
            table = Table(*rows[0], title=title, title_justify="left")
            for row in rows:
                table.add_row(*("" if value is None else str(value) for value in row.values()))
            out.print(table)
    for what, count in found["counts"].items():
        out.print(f"{count:6d}  {what}", highlight=False, markup=False)


def explained(maker: TripletMaker, trace: Trace, end: RolloutEnd | None) -> dict[str, Any]:
    """What the command shows: the adapter's end, a row for each call and for each reward left out, and the counts."""
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
