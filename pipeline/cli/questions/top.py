"""``millstream top``: a deployment at a glance, live."""

import time
from collections.abc import Sequence
from typing import TYPE_CHECKING, Annotated, Any, Final

import typer
from rich.console import Group, RenderableType
from rich.text import Text

from millstream.pipeline.cli.open import open_settings, open_store, with_log
from millstream.pipeline.cli.output import out, show_again
from millstream.pipeline.cli.tables import Grid
from millstream.schemas.errors import MillstreamError

if TYPE_CHECKING:
    from millstream.consumers.log.port import Log
    from millstream.pipeline.services.fleet_load import FleetLoad
    from millstream.schemas.config.settings import Settings
    from millstream.schemas.wire.records import Worker

app = typer.Typer()

SHOWN: Final = 10  # workers, and rollouts
RECENT: Final = """
SELECT status, count() AS rollouts, avg(reward) AS reward, quantile(0.5)(duration_s) AS median_s
FROM rollouts WHERE created_at > now() - INTERVAL 10 MINUTE GROUP BY status ORDER BY status
"""
SLOWEST: Final = """
SELECT rollout_id, status, attempts, dateDiff('second', created_at, now()) AS seconds, error_message AS error
FROM rollouts WHERE ended_at IS NULL AND created_at > now() - INTERVAL 7 DAY ORDER BY created_at LIMIT {shown:UInt32}
"""


@app.command(epilog="Example: millstream top")
def top(
    once: Annotated[bool, typer.Option("--once", help="Print it once, and end.")] = False,
) -> None:
    """Show the deployment, live: rollouts of the last ten minutes, workers, load, and the slowest rollouts."""
    settings = open_settings()
    if once or not out.is_terminal:
        out.print(_view(settings))
    else:
        show_again(lambda: _view(settings))


def _view(settings: "Settings") -> RenderableType:
    """What can't be asked is said, and the rest shown."""
    parts: list[RenderableType] = [Text(time.strftime("%H:%M:%S"), style="bold")]
    for ask in (_of_the_log, _of_the_store):
        try:
            parts += ask(settings)
        except MillstreamError as error:
            parts.append(Text(str(error), style="red"))
    return Group(*parts)


def _of_the_log(settings: "Settings") -> Sequence[RenderableType]:
    from millstream.consumers.unclaimed import UnclaimedTasks
    from millstream.consumers.workers import is_alive, read_workers
    from millstream.pipeline.services.fleet_load import read_load

    async def ask(log: "Log") -> "tuple[FleetLoad, list[Worker]]":
        topics = settings.topics
        return await read_load(log, topics, UnclaimedTasks(log, topics)), list(await read_workers(log, topics))

    fleet, known = with_log(settings, ask)
    now = time.time_ns()
    alive = [worker for worker in known if is_alive(worker, now)]
    rows = [[w.role, w.host, w.slots, w.running, (now - w.last_seen) // 1_000_000_000, w.worker_id] for w in alive]
    waiting = sum(fleet.unclaimed.tasks.values())
    return [
        Text(f"{waiting} tasks wait, {fleet.running} attempts run in {fleet.slots} slots"),
        Grid(["role", "host", "slots", "running", "seen s ago", "worker_id"], rows[:SHOWN], texts=("worker_id",)),
    ]


def _of_the_store(settings: "Settings") -> Sequence[RenderableType]:
    with open_store(settings) as store:
        recent, slowest = store.sql(RECENT), store.sql(SLOWEST, {"shown": SHOWN})
    return [
        Grid(recent.columns, [_rounded(row) for row in recent.rows], title="rollouts of the last ten minutes"),
        Grid(slowest.columns, slowest.rows, texts=("error",), title="open rollouts, the oldest first"),
    ]


def _rounded(row: Sequence[Any]) -> list[Any]:
    return [f"{value:.4g}" if isinstance(value, float) else value for value in row]
