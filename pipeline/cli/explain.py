"""``millstream explain``: why a rollout's calls are trained on or not."""

import json
from typing import Annotated

import typer
from rich.table import Table

from millstream.consumers.adapter.explanation import explained
from millstream.consumers.adapter.read_trace import read_trace
from millstream.consumers.adapter.triplets import TripletMaker
from millstream.pipeline.cli.open import with_log
from millstream.pipeline.cli.output import Json, out
from millstream.schemas.config.settings import load_settings

app = typer.Typer(no_args_is_help=True, help="Explain what the adapter makes of a rollout.")


@app.command("rollout", epilog="Example: millstream explain rollout 0199a3c4-…")
def explain_rollout(
    rollout_id: Annotated[str, typer.Argument(help="As `millstream rollouts` prints it.")],
    attempt: Annotated[str | None, typer.Option(help="Another attempt than the deciding one.")] = None,
    as_json: Json = False,
) -> None:
    """Show which calls of a rollout are trained on, what each earned, and what is left out, by these settings."""
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
