"""Kills, freezes, refuses and poisons everything under load, then has the log checked. Prints seed and schedule.

python tests/chaos/harness.py --kills 200 --seed 1 --run-dir runs/chaos
"""

import argparse
import asyncio
import itertools
import json
import random
import signal
import sys
import time
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

from checker import check
from deployment import LEASE_S, ROOT, Deployment, console
from faults import KINDS
from poison import ATTRIBUTES, CONTROL, EVENTS, TASKS
from rich.table import Table

from millstream.consumers.log.kafka_log import KafkaLog
from millstream.producers.control import cancel_record, publish_control
from millstream.producers.log.port import Producer
from millstream.producers.tasks import TaskPublisher
from millstream.schemas.errors import LogError
from millstream.schemas.ids import new_id
from millstream.schemas.wire import codec
from millstream.schemas.wire.log import LogRecord, Partition
from millstream.schemas.wire.records import RolloutEnd, RolloutTask
from millstream.schemas.wire.topics import PRIORITIES

OPEN = 60  # rollouts outstanding while there is killing
POISONED = 0.08  # of the tasks: one of their dozen spans
POISON_S = 1.0  # between two records straight to the topics: with these, one span in a hundred
SETTLE_S = 180.0  # for the last rollouts to end
READY_S = 60.0  # for every process to be ready, once all faults are over
CANCEL_S = 30.0  # for the last rollouts to end, once they are cancelled


class Chaos(Deployment):
    """One run: the load and the faults."""

    def __init__(self, kills: int, seed: int, folder: Path, kinds: Sequence[str] = ()) -> None:
        super().__init__(folder)
        self.kills = kills
        self.kinds = {name: KINDS[name] for name in kinds or KINDS}
        self.rng = random.Random(seed)
        self.done = dict.fromkeys(self.kinds, 0)
        self.skipped: dict[str, str] = {}  # kinds, and why
        self.published: list[str] = []
        self.poisoned: set[str] = set()
        self.foreign: set[str] = set()  # rollouts that only poison names
        self.poison: dict[str, int] = {}  # records of each kind
        self.ended: set[str] = set()
        self.schedule: list[tuple[float, str]] = []
        self.began = self._broker_up = time.monotonic()
        self._undoing: set[asyncio.Task[None]] = set()
        self._notes: list[str] = []

    # What kinds of faults ask for

    def later(self, seconds: float, undo: Callable[..., Any], *arguments: Any) -> None:
        """Undoes a fault; repeated until it succeeds."""

        async def undo_it() -> None:
            await asyncio.sleep(seconds)
            await self.in_thread(undo, *arguments)

        task = asyncio.create_task(undo_it())
        self._undoing.add(task)
        task.add_done_callback(self._undoing.discard)

    async def in_thread(self, call: Callable[..., Any], *arguments: Any) -> None:
        """A call to the broker, until it succeeds: the broker may be down."""
        for wait_s in (1.0, 2.0, 4.0, 8.0, None):
            try:
                await asyncio.to_thread(call, *arguments)
                return
            except Exception as error:
                if wait_s is None:
                    raise
                console.print(f"         {call.__name__}: {error}"[:200])
                await asyncio.sleep(wait_s)

    def broker_rested(self, seconds: float) -> bool:
        return time.monotonic() - self._broker_up >= seconds

    def broker_is_up(self) -> None:
        self._broker_up = time.monotonic()

    def spare_runner(self) -> bool:
        """Whether one may go for long."""
        return len(self.of("runner")) > 1

    def note(self, what: str) -> None:
        """Of the fault under way, for the schedule."""
        self._notes.append(what)

    async def burst(self, count: int, size: int) -> None:
        """Publishes heavy rollouts."""
        await self.publish([self.task(bytes=size) for _ in range(count)])

    async def until_an_attempt_ends(self, agents: list[int]) -> None:
        """In one of these agent processes; a second at most."""
        position, deadline = self.ledger.stat().st_size, time.monotonic() + 1.0
        while time.monotonic() < deadline:
            await asyncio.sleep(0.001)
            with self.ledger.open() as ledger:
                ledger.seek(position)
                entries = [json.loads(line) for line in ledger if line.endswith("\n")]
            if any(entry["event"] == "end" and entry["pid"] in agents for entry in entries):
                await asyncio.sleep(self.rng.uniform(0.0, 0.02))  # its success is on its way to the runner, or the log
                return

    # The load

    def task(self, **fields: Any) -> RolloutTask:
        rollout_id = new_id()
        if not fields and self.rng.random() < POISONED:
            fields["poison"] = self.rng.choice(list(ATTRIBUTES))
            self.poisoned.add(rollout_id)
        return RolloutTask(
            rollout_id=rollout_id,
            group_id="held" if "hold" in fields else rollout_id,
            input=json.dumps({"seed": self.rng.random()} | fields),
            priority=self.rng.choice(PRIORITIES),
            timeout_s=60.0,
            lease_s=LEASE_S,
            max_attempts=5,
            max_lost_attempts=100,
            retry_on=("failed", "timeout", "unresponsive"),
            created_at=time.time_ns(),
        )

    async def publish(self, tasks: Sequence[RolloutTask]) -> None:
        self.published += [task.rollout_id for task in tasks]
        await TaskPublisher(self.producer, self.settings).publish(tasks)

    async def load(self, stop: asyncio.Event) -> None:
        """Keeps `OPEN` rollouts outstanding."""
        while not stop.is_set():
            if (room := OPEN - (len(self.published) - len(self.ended))) > 0:
                await self.publish([self.task() for _ in range(room)])
            await asyncio.sleep(0.2)

    async def follow(self, log: KafkaLog) -> None:
        """Notes the ends of rollouts."""
        topics, consumer = self.settings.topics, log.consumer()
        await consumer.assign([Partition(topics.triplets, n) for n in range(topics.partitions)])
        try:
            while True:
                try:
                    for record in await consumer.poll(500, 0.2):
                        value = codec.decode(record.value) if isinstance(record, LogRecord) and record.value else None
                        if isinstance(value, RolloutEnd):
                            self.ended.add(value.rollout_id)
                except LogError:
                    await asyncio.sleep(0.2)
        finally:
            await consumer.close()

    async def inject(self, stop: asyncio.Event) -> None:
        """Poison, straight to the topics."""
        topics, rng = self.settings.topics, random.Random(self.rng.random())
        places = list(
            itertools.chain(
                *(((topics.events, name, make) for name, make in EVENTS.items()),),
                *(((topics.tasks(rng.choice(PRIORITIES)), name, make) for name, make in TASKS.items()),),
                *(((topics.control, name, make) for name, make in CONTROL.items()),),
            )
        )
        rng.shuffle(places)
        for topic, name, make in itertools.cycle(places):
            if stop.is_set():
                return
            await asyncio.sleep(POISON_S)
            key = "poison"
            if topic == topics.events:
                started = [json.loads(line) for line in self.ledger.read_text().splitlines()[-50:]]
                running = [e for e in started if e["event"] == "start" and e["rollout"] not in self.ended]
                if not running:
                    continue
                key, attempt = (chosen := rng.choice(running))["rollout"], chosen["attempt"]
                self.poisoned.add(key)
                body = make(key, attempt)
            else:
                body = make()
            try:
                if (foreign := getattr(codec.decode(body), "rollout_id", key)) != key:
                    key = foreign
                    self.foreign.add(key)
            except Exception:
                self.foreign.discard(key)
            place = {"partition": rng.randrange(topics.partitions)} if "tasks" in topic else {"key": key}
            self.producer.send(topic, body, **place)
            self.poison[f"{topic}: {name}"] = self.poison.get(f"{topic}: {name}", 0) + 1

    # The faults

    async def strike_all(self) -> None:
        if not self.small_disk and self.kinds.pop("fill disk", None):
            self.skipped["fill disk"] = "mounting a tmpfs is not permitted"
        while sum(self.done.values()) < self.kills:
            await asyncio.sleep(self.rng.uniform(0.5, 2.5))
            self.revive()
            few = [kind for kind in self.kinds if self.done[kind] < 0.04 * self.kills]
            weights = [self.kinds[kind].weight for kind in few or self.kinds]
            kind = self.rng.choices(few or list(self.kinds), weights)[0]
            if len(self.published) - len(self.ended) < OPEN // 4:
                continue  # it would hit nothing
            self._notes = []
            if await self.kinds[kind].strike(self):
                self.done[kind] += 1
                what = ", ".join([kind, *self._notes])
                self.schedule.append((round(time.monotonic() - self.began, 1), what))
                console.print(
                    f"{self.schedule[-1][0]:7.1f} s  {what}: {len(self.ended)} of {len(self.published)} ended"
                )

    async def run(self) -> list[str]:
        """Returns what still doesn't work when all faults are over."""
        log, stop = KafkaLog(self.settings), asyncio.Event()
        self.producer: Producer = log.producer()
        watching = [asyncio.create_task(self.follow(log)), asyncio.create_task(self.supervise())]
        loading = [asyncio.create_task(self.load(stop)), asyncio.create_task(self.inject(stop))]
        striking = asyncio.create_task(self.strike_all())
        try:
            await asyncio.wait([*watching, *loading, striking], return_when=asyncio.FIRST_COMPLETED)
            for task in (*watching, *loading, striking):
                if task.done():
                    task.result()
            stop.set()
            await asyncio.gather(*loading)
            while self._undoing:
                self.revive()
                await asyncio.wait(self._undoing, timeout=1.0)
            console.print(f"{time.monotonic() - self.began:7.1f} s  all faults are over")
            return await self.settle()
        finally:
            for task in (*watching, *loading, striking):
                task.cancel()
            await asyncio.wait([*watching, *loading, striking])
            self.producer.close()

    async def settle(self) -> list[str]:
        """Until all rollouts have ended. Then each runner has to take new ones, and to hear that they are cancelled."""
        await self.until(lambda: self.ended.issuperset(self.published), SETTLE_S)
        if not self.ended.issuperset(self.published):
            return ["rollouts have not ended"]  # the checker says which
        wrong = [f"{name} is not ready" for name in await self.all_ready(READY_S)]
        runners = {process.popen.pid: process.name for process in self.of("runner")}
        held = [self.task(hold=True) for _ in range(16 * len(runners))]
        await self.publish(held)
        await self.until(lambda: len(self.holding()) == len(runners), CANCEL_S)
        wrong += [f"{name} takes no task" for pid, name in runners.items() if pid not in self.holding()]
        await publish_control(self.producer, self.settings.topics, cancel_record("group", "held"))
        await self.until(lambda: self.ended.issuperset(self.published), CANCEL_S)
        if not self.ended.issuperset(self.published):
            wrong.append(f"{len(set(self.published) - self.ended)} rollouts have not ended since they were cancelled")
        return wrong

    def holding(self) -> set[int]:
        """Process ids of the runners that run the last tasks."""
        entries = [json.loads(line) for line in self.ledger.read_text().splitlines()]
        last = set(self.published[-16 * len(self.of("runner")) :])
        return {entry["runner"] for entry in entries if entry["rollout"] in last}

    async def until(self, condition: Callable[[], bool], seconds: float) -> None:
        deadline = time.monotonic() + seconds
        while not condition() and time.monotonic() < deadline:
            self.revive()
            await asyncio.sleep(0.5)


def run(kills: int, seed: int, folder: Path, kinds: Sequence[str] = ()) -> dict[str, Any]:
    """One whole run; writes and returns its summary. ``problems`` in it is empty if every promise was kept."""
    chaos = Chaos(kills, seed, folder.resolve(), kinds)
    console.print(f"seed {seed}, {kills} kills, {folder}")
    try:
        chaos.up()
        hung = asyncio.run(chaos.run())
        console.print(f"{time.monotonic() - chaos.began:7.1f} s  all is quiet; the log is checked")
        chaos.down()
        counts, problems = check(chaos, ROOT / "schemas" / "avro")
    finally:
        chaos.close()
    if hung:
        problems["hung"] = hung
    summary = {
        "kills": sum(chaos.done.values()),
        "kills_by_kind": chaos.done,
        "skipped": chaos.skipped,
        **counts,
        "poison": sum(chaos.poison.values()),
        "poison_by_kind": chaos.poison,
        "exits": chaos.exits,
        "stuck": chaos.stuck,
        "seconds": round(time.monotonic() - chaos.began, 1),
        "seed": seed,
        "schedule": chaos.schedule,
        "problems": problems,
    }
    (folder / "summary.json").write_text(json.dumps(summary, indent=2) + "\n")
    return summary


def main(kills: int, seed: int, folder: Path, kinds: Sequence[str] = ()) -> int:
    summary = run(kills, seed, folder, kinds)
    table = Table("what", "count")
    for name, value in {**summary["kills_by_kind"], **summary}.items():
        if isinstance(value, int | float):
            table.add_row(name, str(value))
    console.print(table)
    for name in ("skipped", "exits", "stuck", "problems"):
        if summary[name]:
            console.print(name, summary[name])
    return 1 if summary["problems"] else 0


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--kills", type=int, default=200)
    parser.add_argument("--seed", type=int, default=1)
    parser.add_argument("--run-dir", type=Path, default=Path("runs/chaos"))
    parser.add_argument("--kind", action="append", choices=KINDS, help="only this; repeatable")
    options = parser.parse_args()
    signal.signal(signal.SIGTERM, lambda *_: sys.exit(1))  # takes everything down
    sys.exit(main(options.kills, options.seed, options.run_dir, options.kind or ()))
