"""What a chaos run does to its deployment: one function for each kind.

Each returns whether it has hit something. What has to be undone is undone by `Chaos.later`, while the run goes on.
"""

import asyncio
import json
import os
import shutil
import signal
from collections.abc import Awaitable, Callable
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Final

from confluent_kafka.admin import AclOperation, AclPermissionType, ResourceType
from deployment import DISK_MB, LEASE_S, RUNNERS, Process, acl

from millstream.schemas.wire.topics import PRIORITIES

if TYPE_CHECKING:
    from harness import Chaos

RESTART_S = (0.2, 2.0)  # until what was killed is started again
BROKER_REST_S = 15.0  # between two of its deaths: all work has to come back before the next one counts
FREEZE_S = (LEASE_S + 1.5, LEASE_S + 4.0)  # longer than the lease: what thaws is a zombie
DENIED_S = 30.0
SHORT_S = (8.0, 15.0)  # of a limit, a throttle, a full disk, a wrong clock
OVER_S = 25.0  # by then, what a silent runner held has been given up, retried elsewhere, and has ended
SLOW_BYTES = 1 << 20  # a second
BURST = 10  # heavy rollouts


@dataclass(frozen=True)
class Kind:
    weight: int
    strike: "Callable[[Chaos], Awaitable[bool]]"


KINDS: Final[dict[str, Kind]] = {}


def kind(name: str, weight: int) -> "Callable[[Callable[[Chaos], Awaitable[bool]]], None]":
    def register(strike: "Callable[[Chaos], Awaitable[bool]]") -> None:
        KINDS[name] = Kind(weight, strike)

    return register


async def kill(chaos: "Chaos", process: Process | None) -> bool:
    if process is None:
        return False
    chaos.kill(process)
    await asyncio.sleep(chaos.rng.uniform(*RESTART_S))
    return True


def freeze(chaos: "Chaos", process: Process) -> None:
    chaos.freeze(process)
    chaos.later(chaos.rng.uniform(*FREEZE_S), chaos.thaw, process)


def busy_runner(chaos: "Chaos") -> tuple[Process | None, list[int]]:
    """One that has work, and its agent processes that do it."""
    found = [(process, agents) for process in chaos.of("runner") if (agents := busy_agents(process, chaos.ledger))]
    return chaos.rng.choice(found) if found else (None, [])


def busy_agents(runner: Process, ledger: Path) -> list[int]:
    """Agent processes with an attempt that has started and not ended."""
    open_attempts: dict[str, int] = {}
    for line in ledger.read_text().splitlines():
        entry = json.loads(line)
        if entry["event"] == "start" and entry["runner"] == runner.popen.pid:
            open_attempts[entry["attempt"]] = entry["pid"]
        elif entry["event"] == "end":
            open_attempts.pop(entry["attempt"], None)
    return [pid for pid in sorted(set(open_attempts.values())) if Path(f"/proc/{pid}").exists()]


def one_of(chaos: "Chaos", *roles: str) -> Process | None:
    found = [process for role in roles for process in chaos.of(role)]
    return chaos.rng.choice(found) if found else None


# Processes die


@kind("kill runner", 5)
async def _(chaos: "Chaos") -> bool:
    return await kill(chaos, busy_runner(chaos)[0])


@kind("kill agent process", 4)
async def _(chaos: "Chaos") -> bool:
    _, agents = busy_runner(chaos)
    if agents:
        os.kill(chaos.rng.choice(agents), signal.SIGKILL)
    return bool(agents)


@kind("kill adapter", 4)
async def _(chaos: "Chaos") -> bool:
    return await kill(chaos, one_of(chaos, "adapter"))


@kind("kill proxy", 3)
async def _(chaos: "Chaos") -> bool:
    return await kill(chaos, one_of(chaos, "proxy"))


@kind("kill sink", 2)
async def _(chaos: "Chaos") -> bool:
    return await kill(chaos, one_of(chaos, "sink"))


@kind("kill broker", 2)
async def _(chaos: "Chaos") -> bool:
    if not chaos.broker_rested(BROKER_REST_S):
        return False
    chaos.broker.kill()
    chaos.broker.log.replace(chaos.folder / "log" / f"broker-{chaos.done['kill broker']}.log")
    await asyncio.sleep(chaos.rng.uniform(0.5, 3.0))
    await asyncio.to_thread(chaos.broker.up)
    chaos.broker_is_up()
    return True


@kind("remove runner", 2)
async def _(chaos: "Chaos") -> bool:
    process, _ = busy_runner(chaos)
    if process is None or len(chaos.of("runner")) <= 1:
        return False
    process.popen.terminate()
    del chaos.processes[process.name]
    return True


@kind("add runner", 2)
async def _(chaos: "Chaos") -> bool:
    if sum(name.startswith("runner") for name in chaos.processes) > RUNNERS + 1:
        return False
    chaos.add_runner()
    return True


# Processes stand still, and come back


@kind("freeze runner", 4)
async def _(chaos: "Chaos") -> bool:
    """Just as it has a success to write: thawed, it is a zombie with a late one."""
    process, agents = busy_runner(chaos)
    if process is None:
        return False
    await chaos.until_an_attempt_ends(agents)
    freeze(chaos, process)
    return True


@kind("freeze adapter", 3)
async def _(chaos: "Chaos") -> bool:
    process = one_of(chaos, "adapter")
    if process is not None:
        freeze(chaos, process)
    return process is not None


@kind("freeze runner that claims", 2)
async def _(chaos: "Chaos") -> bool:
    """Between a poll for tasks and their claim; it goes on when they have ended elsewhere."""
    process = one_of(chaos, "runner")
    if process is None or not chaos.spare_runner():
        return False
    flag = chaos.faults / f"{process.name}.stop"
    flag.touch()
    for _ in range(100):
        await asyncio.sleep(0.05)
        if not flag.exists():
            process.frozen = True
            chaos.later(OVER_S, chaos.thaw, process)
            return True
    flag.unlink(missing_ok=True)
    return False


@kind("commits time out", 2)
async def _(chaos: "Chaos") -> bool:
    """Those of a runner. When what it claimed has ended elsewhere, it leaves: its tasks are delivered again."""
    process = one_of(chaos, "runner")
    if process is None or not chaos.spare_runner() or any(chaos.faults.glob("*.commit")):
        return False
    flag = chaos.faults / f"{process.name}.commit"
    flag.write_text(chaos.rng.choice(("lost", "late")))

    def leave() -> None:
        flag.unlink()
        chaos.kill(process)

    chaos.later(OVER_S, leave)
    return True


@kind("put clock back", 3)
async def _(chaos: "Chaos") -> bool:
    """By an hour, and forth again."""
    process = one_of(chaos, "proxy", "runner", "adapter")
    if process is None:
        return False
    chaos.set_clock(process, -3600.0)
    chaos.later(chaos.rng.uniform(*SHORT_S), chaos.set_clock, process, 0.0)
    return True


# The brokers and the disk refuse


@kind("take ACL away", 2)
async def _(chaos: "Chaos") -> bool:
    topics = chaos.settings.topics
    read, write = AclOperation.READ, AclOperation.WRITE
    tasks = topics.tasks(chaos.rng.choice(PRIORITIES))
    chosen = chaos.rng.choice(
        [
            *((ResourceType.TOPIC, name, read) for name in (topics.control, topics.events, topics.triplets, tasks)),
            *((ResourceType.TOPIC, name, write) for name in (topics.events, topics.triplets, topics.dead)),
            *((ResourceType.GROUP, f"{topics.prefix}.{role}", read) for role in ("runner", "adapter")),
        ]
    )
    denied = acl(*chosen, AclPermissionType.DENY)
    chaos.note(f"{chosen[2].name} of {chosen[1]}")
    await asyncio.to_thread(chaos.permit, [denied])
    chaos.later(DENIED_S, chaos.unpermit, denied)
    return True


@kind("lower topic limit", 2)
async def _(chaos: "Chaos") -> bool:
    topic = chaos.rng.choice((chaos.settings.topics.events, chaos.settings.topics.triplets))
    chaos.note(topic)
    await asyncio.to_thread(chaos.limit_topic, topic, 100_000)
    await chaos.burst(BURST, 200_000)
    chaos.later(chaos.rng.uniform(*SHORT_S), chaos.limit_topic, topic, chaos.settings.max_record_bytes + (1 << 16))
    return True


@kind("fill disk", 2)
async def _(chaos: "Chaos") -> bool:
    """Of the store and the blobs."""
    ballast = chaos.disk / "ballast"
    if ballast.exists():
        return False
    with suppress(OSError), ballast.open("wb", buffering=0) as file:
        for _ in range(DISK_MB):
            file.write(bytes(1 << 20))
    chaos.note(f"{shutil.disk_usage(chaos.disk).free:,} bytes are free")
    await chaos.burst(BURST, 400_000)  # contents that go to the blob store
    chaos.later(chaos.rng.uniform(*SHORT_S), ballast.unlink)
    return True


@kind("throttle broker", 1)
async def _(chaos: "Chaos") -> bool:
    """To 1 MB/s for all roles together, and many rollouts of 200 KB."""
    await chaos.in_thread(chaos.throttle, SLOW_BYTES)
    await chaos.burst(2 * BURST, 200_000)
    chaos.later(chaos.rng.uniform(*SHORT_S), chaos.throttle, None)
    return True
