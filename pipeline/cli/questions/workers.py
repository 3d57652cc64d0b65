"""Commands that list the processes of a deployment and the tasks that wait for them."""

import time
from collections.abc import Sequence
from typing import TYPE_CHECKING, Annotated, Any

import typer

from millstream.pipeline.cli.open import open_settings, with_log
from millstream.pipeline.cli.output import Json, date, print_rows, say

if TYPE_CHECKING:
    from millstream.consumers.log.port import Log
    from millstream.pipeline.services.fleet_load import FleetLoad
    from millstream.schemas.wire.records import Control

app = typer.Typer()


@app.command(epilog="Example: millstream workers --all")
def workers(
    ended: Annotated[bool, typer.Option("--all", help="Include processes that have ended.")] = False,
    as_json: Json = False,
) -> None:
    """List running processes, their slots and their running attempts."""
    from millstream.consumers.workers import is_alive, read_workers

    settings = open_settings()
    now = time.time_ns()
    rows = [
        [w.worker_id, w.role, w.host, w.version, w.slots, w.running, date(w.started), date(w.last_seen)]
        for w in with_log(settings, lambda log: read_workers(log, settings.topics))
        if ended or is_alive(w, now)
    ]
    print_rows(
        ["worker_id", "role", "host", "version", "slots", "running", "started", "last_seen"],
        rows,
        as_json,
        main=("worker_id", "role", "slots", "running", "last_seen"),
        texts=("worker_id",),
    )


@app.command(epilog="Example: millstream lag --json")
def lag(as_json: Json = False) -> None:
    """Show waiting tasks and the load, (unclaimed + running) / slots. Above 1, more runners would help."""
    from millstream.consumers.control import read_pauses
    from millstream.consumers.unclaimed import UnclaimedTasks
    from millstream.pipeline.services.fleet_load import load_of, read_load

    settings = open_settings()

    async def ask(log: "Log") -> "tuple[FleetLoad, list[Control]]":
        topics = settings.topics
        return await read_load(log, topics, UnclaimedTasks(log, topics)), await read_pauses(log, topics)

    fleet, pauses = with_log(settings, ask)
    waiting, slots, running = fleet.unclaimed.tasks, fleet.slots, fleet.running
    # Running attempts are known for all priorities together only.
    rows: list[list[Any]] = [[priority, n, None, None, load_of(n, slots)] for priority, n in waiting.items()]
    total = sum(waiting.values())
    print_rows(
        ["priority", "unclaimed", "running", "slots", "load"],
        [*rows, ["all", total, running, slots, load_of(total + running, slots)]],
        as_json,
    )

    for reason in waits(total, slots, running, [pause.name for pause in pauses]) if not as_json else ():
        say(reason)


def waits(unclaimed_tasks: int, slots: int, running: int, paused: Sequence[str]) -> list[str]:
    """Why tasks wait, as far as that can be seen from outside the runners."""
    if not unclaimed_tasks:
        return []
    reasons = [
        f"experiment {name} is paused: its tasks wait, and what is behind them on their partitions" for name in paused
    ]
    if not slots:
        reasons.append("no runner is alive: start one with `millstream runner MODULE:AGENT`")
    elif running >= slots:
        reasons.append(f"all {slots} slots are in use: start another runner, or raise --concurrency")
    return reasons
