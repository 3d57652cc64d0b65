"""``millstream replay`` and ``millstream explain``: the adapter's rules over recorded events."""

from math import fsum
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

from millstream.pipeline.cli.open import completed_id, open_settings, with_log
from millstream.pipeline.cli.output import Json, out, print_json, print_rows, working
from millstream.pipeline.cli.tables import Grid

if TYPE_CHECKING:
    from millstream.consumers.adapter.replay import ToReward
    from millstream.consumers.log.port import Log
    from millstream.pipeline.store.replay import ReplaySummary

app = typer.Typer()
explain_app = typer.Typer(no_args_is_help=True, help="Explain what the adapter makes of a rollout.")


@app.command(epilog="Example: millstream replay --experiment my-run --reward rewards:strict --to my-run.strict")
def replay(
    experiment: Annotated[str, typer.Option(help="Experiment to replay: its id, or the name of its run.")],
    to: Annotated[str, typer.Option(help="New topic to write to.")],
    start: Annotated[
        str, typer.Option("--from", help="partition:offset,… on events, or a time (ISO 8601); default: the beginning.")
    ] = "",
    function: Annotated[
        str, typer.Option("--adapter", help="module:attribute of a function from a Trace to triplets.")
    ] = "",
    reward: Annotated[
        str,
        typer.Option(
            help="module:attribute of a function from a Trace to a reward or None; replaces what agents emitted."
        ),
    ] = "",
    as_json: Json = False,
) -> None:
    """Make triplets again from recorded events, with another adapter or reward function. Changes nothing else."""
    from millstream.consumers.adapter.replay import Replay
    from millstream.consumers.adapter.triplets import TripletMaker
    from millstream.consumers.control import find_experiment
    from millstream.pipeline.store.replay import Start, open_output, run_replay
    from millstream.schemas.import_path import load_object

    settings = open_settings()
    folder = str(Path.cwd())
    chosen = load_object("adapter", function, folder) if function else TripletMaker(settings.triplets)
    rewarded: ToReward | None = load_object("reward", reward, folder) if reward else None

    begin = Start.parse(start) if start else None

    async def work(log: "Log") -> "ReplaySummary":
        found = await find_experiment(log, settings.topics, experiment)
        output = await open_output(to, log, settings)
        return await run_replay(log, settings.topics, Replay(found, chosen, rewarded), output, begin, show)

    with working("reading recorded events", "records") as show:
        done = with_log(settings, work)
    columns = ("rollouts", "triplets", "trainable", "reward_mean", "incomplete", "open", "unreadable")
    mean = fsum(done.rewards) / len(done.rewards) if done.rewards else None
    row = [mean if name == "reward_mean" else getattr(done, name) for name in columns]
    print_rows(columns, [row], as_json)


@explain_app.command("rollout", epilog="Example: millstream explain rollout 0199a3c4-…")
def explain_rollout(
    rollout_id: Annotated[str, typer.Argument(help="Id, or the end or beginning of one.")],
    attempt: Annotated[str | None, typer.Option(help="Another attempt than the deciding one.")] = None,
    as_json: Json = False,
) -> None:
    """Show which calls of a rollout are trained on, what each earned, and what is left out, by these settings."""
    from millstream.consumers.adapter.explanation import explained
    from millstream.consumers.adapter.read_trace import read_trace
    from millstream.consumers.adapter.triplets import TripletMaker

    settings = open_settings()
    rollout_id = completed_id(settings, rollout_id)
    maker = TripletMaker(settings.triplets)
    trace, end = with_log(settings, lambda log: read_trace(log, settings.topics, rollout_id, attempt))
    found = explained(maker, trace, end)
    if as_json:
        print_json(found)
        return
    out.print(f"rollout {rollout_id}, attempt {trace.attempt_id}: {found['status']}", highlight=False)
    if found["reason"]:
        out.print(found["reason"], highlight=False, markup=False)
    for title, rows in (("calls", found["calls"]), ("rewards left out", found["rewards_left_out"])):
        if rows:
            out.print(Grid(list(rows[0]), [list(row.values()) for row in rows], title=title))
    for what, count in found["counts"].items():
        out.print(f"{count:6d}  {what}", highlight=False, markup=False)
