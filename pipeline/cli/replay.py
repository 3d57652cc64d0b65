"""``millstream replay``."""

from collections.abc import Iterator
from pathlib import Path
from statistics import fmean
from typing import Annotated

import typer

from millstream.consumers.adapter.replay import Replay, ToReward
from millstream.consumers.adapter.triplets import TripletMaker
from millstream.consumers.log.port import Log
from millstream.pipeline.cli.open import open_store, with_log
from millstream.pipeline.cli.output import Json, print_rows
from millstream.schemas.config.settings import load_settings
from millstream.schemas.import_path import load_object
from millstream.schemas.wire.log import LogRecord

app = typer.Typer()


@app.command(epilog="Example: millstream replay --experiment my-run --reward rewards:strict --to runs/strict/")
def replay(
    experiment: Annotated[str, typer.Option(help="Its id; of no other a rollout is replayed.")],
    to: Annotated[str, typer.Option(help="A new topic; or a new folder for Parquet files, with a / in its name.")],
    start: Annotated[
        str, typer.Option("--from", help="partition:offset,… on events, or a time (ISO 8601); else all there is.")
    ] = "",
    function: Annotated[str, typer.Option("--adapter", help="module:attribute of your own Trace → triplets.")] = "",
    reward: Annotated[
        str, typer.Option(help="module:attribute of a Trace → float or None, in place of what agents emitted.")
    ] = "",
    as_json: Json = False,
) -> None:
    """Make triplets anew from what was recorded, with another adapter or reward function. Changes nothing else."""
    # pyarrow takes as long to import as all else that commands need.
    from millstream.pipeline.replay import ReplaySummary, Start, run_replay
    from millstream.pipeline.replay_output import open_output

    settings = load_settings()
    folder = str(Path.cwd())
    chosen = load_object("adapter", function, folder) if function else TripletMaker(settings.triplets)
    rewarded: ToReward | None = load_object("reward", reward, folder) if reward else None

    def stored(done: set[str]) -> Iterator[LogRecord]:
        from millstream.pipeline.store.stored_events import stored_events

        with open_store(settings) as store:
            yield from stored_events(store, experiment, done)

    begin = Start.parse(start) if start else None

    async def work(log: Log) -> ReplaySummary:
        output = await open_output(to, log, settings)
        return await run_replay(log, settings.topics, Replay(experiment, chosen, rewarded), output, stored, begin)

    done = with_log(settings, work)
    columns = ("rollouts", "from_store", "triplets", "trainable", "reward_mean", "incomplete", "open", "unreadable")
    mean = fmean(done.rewards) if done.rewards else None
    row = [mean if name == "reward_mean" else getattr(done, name) for name in columns]
    print_rows(columns, [row], as_json)
