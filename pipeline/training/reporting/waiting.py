"""Says which role of a deployment is missing while a trainer waits in vain for its rollouts."""

import asyncio
import logging
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Final

from millstream.consumers.log.port import Log
from millstream.consumers.workers import is_alive, read_workers
from millstream.schemas.errors import LogError
from millstream.schemas.wire.records import Worker
from millstream.schemas.wire.topics import Topics

logger = logging.getLogger(__name__)

COMMANDS: Final[Mapping[str, str]] = {
    "runner": "millstream runner MODULE:AGENT",
    "proxy": "millstream proxy",
    "adapter": "millstream adapter",
}


@dataclass(frozen=True, slots=True)
class WaitPolicy:
    look_s: float = 5.0
    patience_s: float = 15.0  # without an end of a rollout; with `look_s` well below the 30 s in which people ask why


def missing(workers: Sequence[Worker], roles: Sequence[str], now_ns: int) -> list[str]:
    """Those of these roles of which no process is alive."""
    alive = {worker.role for worker in workers if is_alive(worker, now_ns)}
    return [role for role in roles if role not in alive]


async def watch(
    log: Log,
    topics: Topics,
    outstanding: Callable[[], frozenset[str]],
    roles: Sequence[str],
    policy: WaitPolicy = WaitPolicy(),
) -> None:
    """Runs until it is cancelled. Logs a warning, once, that names each of ``roles`` that is not alive and the command
    that starts it, if none of the ``outstanding`` rollouts ends for a while."""
    before: frozenset[str] = frozenset()
    since, said = time.monotonic(), [""]
    while True:
        await asyncio.sleep(policy.look_s)
        now = outstanding()
        if not now or now != before:
            before, since, said = now, time.monotonic(), [""]
            continue
        waited = time.monotonic() - since
        if waited < policy.patience_s:
            continue
        try:
            gone = missing(await read_workers(log, topics), roles, time.time_ns())
        except LogError as error:
            logger.warning("waiting for %d rollouts; the log does not say which roles are alive: %s", len(now), error)
            continue
        if gone and gone != said:
            starts = "; ".join(f"no {role} is alive: start one with `{COMMANDS[role]}`" for role in gone)
            logger.warning("waiting for %d rollouts, none of which has ended for %.0f s; %s", len(now), waited, starts)
        said = gone
