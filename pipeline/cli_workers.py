"""Commands about the processes of a deployment: who works, and how much waits for them."""

import asyncio
import time
from datetime import UTC, datetime
from typing import Annotated, Any

import typer

from millstream.consumers.workers import is_alive, read_workers, unclaimed
from millstream.pipeline.cli_output import Json, print_rows
from millstream.pipeline.kafka_log import KafkaLog
from millstream.schemas.records import Worker
from millstream.schemas.settings import load_settings

app = typer.Typer()


@app.command(epilog="Example: millstream workers --all")
def workers(
    everybody: Annotated[bool, typer.Option("--all", help="Those that have ended, too.")] = False,
    as_json: Json = False,
) -> None:
    """List the processes that work now, and what they do."""
    settings = load_settings()

    async def ask() -> list[Worker]:
        log = KafkaLog(settings)
        await log.check()
        return await read_workers(log, settings.topics)

    now = time.time_ns()
    rows = [
        [w.worker_id, w.role, w.host, w.version, w.slots, w.running, _date(w.started), _date(w.last_seen)]
        for w in asyncio.run(ask())
        if everybody or is_alive(w, now)
    ]
    print_rows(["worker_id", "role", "host", "version", "slots", "running", "started", "last_seen"], rows, as_json)


@app.command(epilog="Example: millstream lag --json")
def lag(as_json: Json = False) -> None:
    """Show how many tasks wait, and (unclaimed + running) / slots: above 1, more runners would help."""
    settings = load_settings()

    async def ask() -> tuple[dict[str, int], list[Worker]]:
        log = KafkaLog(settings)
        await log.check()
        return await unclaimed(log, settings.topics), await read_workers(log, settings.topics)

    waiting, found = asyncio.run(ask())
    now = time.time_ns()
    alive = [w for w in found if is_alive(w, now)]
    slots, running = sum(w.slots for w in alive), sum(w.running for w in alive)
    # What runs is known of all priorities together.
    rows: list[list[Any]] = [[priority, n, None, None, _load(n, slots)] for priority, n in waiting.items()]
    total = sum(waiting.values())
    print_rows(
        ["priority", "unclaimed", "running", "slots", "load"],
        [*rows, ["all", total, running, slots, _load(total + running, slots)]],
        as_json,
    )


def _load(work: int, slots: int) -> float | None:
    return round(work / slots, 2) if slots else None


def _date(ns: int) -> str:
    return datetime.fromtimestamp(ns / 1e9, UTC).strftime("%Y-%m-%d %H:%M:%S")
