"""Rollouts per second through the whole pipeline: claims, spans, the adapter's transactions, ends read by a trainer.

The agent does nothing but emit six spans. What is measured is ours alone: no model, no store. CPU time counts every
process that takes part (Kafka's own apart, in a column of its own) and is steadier than wall time on a shared machine.

    python benchmarks/pipeline.py [--quick] [--json FILE]      from the repository's root
"""

import argparse
import asyncio
import json
import os
import resource
import subprocess
import sys
import tempfile
import time
from contextlib import AsyncExitStack
from pathlib import Path
from typing import Any

from rich.console import Console
from rich.table import Table

import millstream as ms
from millstream.consumers.adapter import Adapter
from millstream.consumers.runner import Runner
from millstream.pipeline.collector import Collector
from millstream.pipeline.memory_log import MemoryLog
from millstream.producers.tasks import TaskPublisher
from millstream.schemas.ids import new_id
from millstream.schemas.records import RolloutTask
from millstream.schemas.settings import load_settings

SPANS = 6
CONCURRENCY = 16


def agent(_task: Any) -> None:
    """Six spans, nothing else."""
    for number in range(SPANS):
        ms.emit_span(f"step {number}", {"number": number})


def tasks(count: int, settings: Any) -> list[RolloutTask]:
    made = []
    for _ in range(count):
        rollout_id = new_id()
        made.append(
            RolloutTask(
                rollout_id=rollout_id,
                group_id=rollout_id,
                input="null",
                timeout_s=600.0,
                lease_s=settings.lease_seconds,
                created_at=time.time_ns(),
            )
        )
    return made


async def run(log: Any, settings: Any, count: int, processes: int) -> dict[str, float]:
    """Publishes ``count`` rollouts once everything is up, and waits for their ends."""
    topics = settings.topics
    producer = log.producer()
    collector = Collector(log, topics, producer)
    await collector.start()
    adapter = Adapter(log, topics, transactional_id=f"{topics.prefix}.adapter")
    runner = Runner(log, settings, "benchmarks.pipeline:agent" if processes else agent, processes=processes)
    stop = asyncio.Event()
    async with AsyncExitStack() as stack:
        roles = [asyncio.create_task(role.run(stop)) for role in (adapter, runner)]
        stack.push_async_callback(asyncio.wait, roles)
        stack.callback(stop.set)
        warm = tasks(CONCURRENCY * 2, settings)
        await collect(collector, TaskPublisher(producer, topics), warm)
        timed = tasks(count, settings)
        began, cpu = time.perf_counter(), cpu_seconds()
        await collect(collector, TaskPublisher(producer, topics), timed)
        wall, used = time.perf_counter() - began, cpu_seconds() - cpu
    for role in roles:
        role.result()
    await collector.close()
    producer.close()
    return {"rollouts_per_second": count / wall, "cpu_ms_per_rollout": used / count * 1e3}


async def collect(collector: Collector, publisher: TaskPublisher, published: list[RolloutTask]) -> None:
    ids = [task.rollout_id for task in published]
    collector.expect(ids)
    await publisher.publish(published)
    ends = await collector.collect(ids)
    assert all(end.end.status == "succeeded" and end.end.spans >= SPANS for end in ends), ends[0]


def cpu_seconds() -> float:
    """CPU time of this process and of its live children, from /proc."""
    own = resource.getrusage(resource.RUSAGE_SELF)
    total = own.ru_utime + own.ru_stime
    ticks = os.sysconf("SC_CLK_TCK")
    for stat in Path("/proc").glob("[0-9]*/stat"):
        try:
            fields = stat.read_text().rpartition(")")[2].split()
        except OSError:
            continue  # it has ended meanwhile
        if int(fields[1]) == os.getpid():
            total += (int(fields[11]) + int(fields[12])) / ticks
    return total


def span_cost(quick: bool) -> dict[str, float]:
    """What `span_cost.py` measures, in a process of its own: nothing else runs there."""
    with tempfile.NamedTemporaryFile() as figures:
        script = Path(__file__).with_name("span_cost.py")
        subprocess.run([sys.executable, script, "--json", figures.name, *["--quick"][: int(quick)]], check=True)
        found: dict[str, float] = json.loads(Path(figures.name).read_text())
    return found


async def over_kafka(count: int, processes: int, bootstrap: str) -> dict[str, float]:
    from millstream.pipeline.kafka_log import KafkaLog

    settings = load_settings(
        kafka_bootstrap_servers=bootstrap,
        topic_prefix=f"bench{new_id()[-6:]}",
        proxy_url="",
        runner_concurrency=CONCURRENCY,
    )
    log = KafkaLog(settings)
    await log.create_topics()
    return await run(log, settings, count, processes)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--quick", action="store_true", help="fewer rollouts, for a look")
    parser.add_argument("--json", type=Path, help="also write the figures to this file")
    options = parser.parse_args()
    count = 300 if options.quick else 3000
    sys.path.insert(0, str(Path.cwd()))
    rows: dict[str, dict[str, float]] = {}
    settings = load_settings(proxy_url="", runner_concurrency=CONCURRENCY)
    rows["in process, threads"] = asyncio.run(run(MemoryLog(settings.topics), settings, count, 0))
    rows["in process, 1 agent process"] = asyncio.run(run(MemoryLog(settings.topics), settings, count, 1))

    from millstream.deploy.kafka.local import LocalKafka

    with tempfile.TemporaryDirectory() as folder:
        broker = LocalKafka(Path(folder), port=0)
        broker.up()
        try:
            for processes in (1, 2, 4):
                name = f"Kafka, {processes} agent process{'es' * (processes > 1)}"
                rows[name] = asyncio.run(over_kafka(count, processes, broker.bootstrap_servers))
        finally:
            broker.down()
    table = Table("", "rollouts/s", "CPU ms per rollout", title=f"{count} rollouts, {SPANS} spans each")
    for name, row in rows.items():
        table.add_row(name, f"{row['rollouts_per_second']:.0f}", f"{row['cpu_ms_per_rollout']:.2f}")
    Console().print(table)
    spans = span_cost(options.quick)
    if options.json:
        options.json.write_text(json.dumps({"pipeline": rows, "span": spans}, indent=2) + "\n")


if __name__ == "__main__":
    main()
