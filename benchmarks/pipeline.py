"""Rollouts per second through the whole pipeline: claims, spans, the adapter's transactions, ends read by a trainer.

The agent only emits six spans; there is no model and no store. CPU time covers every process that takes part and is
steadier than wall time on a shared machine. Then, over Kafka: how soon after its publication an agent starts when the
system is idle, and how much of a runner's memory a thousand waiting attempts take.

The CPU of a rollout is also given in units of one bare SDK span of the same run, beside a floor: the spans by the bare
SDK, their encoding, three acknowledged records and a share of a transaction. ``--peer`` measures Agent Lightning in
turns with Kafka and 4 agent processes, by an interpreter that has it (`peers/agent_lightning.py`).

    python benchmarks/pipeline.py [--quick] [--peer PYTHON] [--json FILE]      from the repository's root
"""

import argparse
import asyncio
import json
import os
import resource
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import AsyncIterator, Callable
from contextlib import AsyncExitStack, asynccontextmanager
from pathlib import Path
from typing import Any

from rich.console import Console
from rich.table import Table

import millstream as ms
from millstream.consumers.adapter.adapter import Adapter
from millstream.consumers.log.kafka_log import KafkaLog
from millstream.consumers.log.memory_log import MemoryLog
from millstream.consumers.runner.runner import Runner
from millstream.consumers.workers import read_workers
from millstream.deploy.kafka.local import LocalKafka
from millstream.pipeline.addresses import free_port
from millstream.pipeline.training.collector import Collector
from millstream.producers.tasks import TaskPublisher
from millstream.schemas.config.settings import load_settings
from millstream.schemas.ids import new_id
from millstream.schemas.wire import codec
from millstream.schemas.wire.records import RolloutEnd, RolloutTask, Span

SPANS = 6
CONCURRENCY = 16
WAITING = 1000
RECORDS = 3  # of the floor: a claim, spans together, an end
TOGETHER = 32  # rollouts of a transaction of the floor
PEER_RUNNERS = (1, 4)


def agent(_task: Any) -> None:
    """Six spans, nothing else."""
    for number in range(SPANS):
        ms.emit_span(f"step {number}", {"number": number})


def prompt_agent(published: float) -> float:
    """Returns the seconds since its publication as its reward."""
    return time.time() - published


async def waiting_agent(_task: Any) -> None:
    await asyncio.Event().wait()


def tasks(count: int, settings: Any, value: Any = None) -> list[RolloutTask]:
    made = []
    for _ in range(count):
        rollout_id = new_id()
        made.append(
            RolloutTask(
                rollout_id=rollout_id,
                group_id=rollout_id,
                input=json.dumps(value),
                timeout_s=600.0,
                lease_s=settings.lease_s,
                created_at=time.time_ns(),
            )
        )
    return made


async def run(log: Any, settings: Any, count: int, processes: int) -> dict[str, float]:
    """Publishes ``count`` rollouts once everything is up, and waits for their ends."""
    async with pipeline(log, settings, agent, processes) as (collector, publisher):
        await collect(collector, publisher, tasks(CONCURRENCY * 2, settings))
        timed = tasks(count, settings)
        began, cpu = time.perf_counter(), cpu_seconds()
        ends = await collect(collector, publisher, timed)
        wall, used = time.perf_counter() - began, cpu_seconds() - cpu
    assert all(end.spans >= SPANS for end in ends), ends[0]
    return {"rollouts_per_second": count / wall, "cpu_ms_per_rollout": used / count * 1e3}


async def start_latency(log: Any, settings: Any, count: int) -> dict[str, float]:
    """Milliseconds from just before a task is published until its agent begins; one rollout at a time."""
    seconds = []
    async with pipeline(log, settings, prompt_agent, 1) as (collector, publisher):
        await collect(collector, publisher, tasks(CONCURRENCY, settings, time.time()))
        for _ in range(count):
            (end,) = await collect(collector, publisher, tasks(1, settings, time.time()))
            seconds.append(end.reward)
    cuts = statistics.quantiles(seconds, n=100)
    return {"start_p50_ms": cuts[49] * 1e3, "start_p99_ms": cuts[98] * 1e3}


async def waiting_memory(log: Any, settings: Any) -> dict[str, float]:
    """Resident MiB of a runner and its agent process, idle and with `WAITING` waiting attempts."""
    topics, producer = settings.topics, log.producer()
    environment = os.environ | {
        "MILLSTREAM_KAFKA_BOOTSTRAP_SERVERS": settings.kafka_bootstrap_servers,
        "MILLSTREAM_TOPIC_PREFIX": topics.prefix,
        "MILLSTREAM_PROXY_URL": "",
    }
    options = ["benchmarks.pipeline:waiting_agent", "--processes", "1", "--concurrency", str(WAITING), "--drain-s", "0"]
    command = [sys.executable, "-m", "millstream.pipeline", "runner", *options]
    runner = await asyncio.create_subprocess_exec(*command, env=environment, stderr=asyncio.subprocess.DEVNULL)

    async def until_running(attempts: int) -> float:
        running: list[int] = []  # of each runner: there is one, once it has reported
        while running != [attempts]:
            await asyncio.sleep(0.5)
            running = [worker.running for worker in await read_workers(log, topics)]
        return resident_mib(runner.pid)

    try:
        idle = await until_running(0)
        await TaskPublisher(producer, settings).publish(tasks(WAITING, settings))
        busy = await until_running(WAITING)
    finally:
        runner.terminate()
        await runner.wait()
        producer.close()
    return {"idle_mib": idle, "waiting_mib": busy, "kib_per_waiting_attempt": (busy - idle) / WAITING * 1024}


@asynccontextmanager
async def pipeline(
    log: Any, settings: Any, agent: Callable[..., Any], processes: int
) -> AsyncIterator[tuple[Collector, TaskPublisher]]:
    """Runs an adapter and a runner; yields a collector and a publisher."""
    topics, producer = settings.topics, log.producer()
    collector = Collector(log, topics, producer)
    await collector.start()
    adapter = Adapter(log, topics, transactional_id=f"{topics.prefix}.adapter")
    where = f"benchmarks.pipeline:{agent.__name__}" if processes else agent
    runner = Runner(log, settings, where, processes=processes)
    stop = asyncio.Event()
    async with AsyncExitStack() as stack:
        roles = [asyncio.create_task(role.run(stop)) for role in (adapter, runner)]
        stack.push_async_callback(asyncio.wait, roles)
        stack.callback(stop.set)
        yield collector, TaskPublisher(producer, settings)
    for role in roles:
        role.result()
    await collector.close()
    producer.close()


async def collect(collector: Collector, publisher: TaskPublisher, published: list[RolloutTask]) -> list[RolloutEnd]:
    ids = [task.rollout_id for task in published]
    collector.expect(ids)
    await publisher.publish(published)
    ends = [outcome.end for outcome in await collector.collect(ids)]
    collector.release(ids)
    assert all(end.status == "succeeded" for end in ends), ends[0]
    return ends


async def floor(log: Any, settings: Any, count: int) -> dict[str, float]:
    """Microseconds of CPU that even the barest pipeline would take for a rollout."""
    topics, producer = settings.topics, log.producer()
    transactional = log.transactional_producer(f"{topics.prefix}.floor")
    await asyncio.to_thread(transactional.init_transactions, 30.0)
    place = {"rollout_id": new_id(), "attempt_id": new_id(), "trace_id": "1" * 32, "span_id": "1" * 16}
    one = Span(
        **place, name="step 1", kind="span", start=0, end=1, attributes={"number": "1"}, source="agent", sequence=1
    )
    body = codec.encode(one)

    def cpu_us(work: Callable[[], Any], times: int) -> float:
        began = cpu_seconds()
        for _ in range(times):
            work()
        producer.flush(60)
        return (cpu_seconds() - began) / times * 1e6

    def transaction() -> None:
        transactional.begin_transaction()
        transactional.send(topics.triplets, body, key="1")
        transactional.commit_transaction(30.0)

    found = {
        "encode_us": cpu_us(lambda: codec.encode(one), count) * SPANS,
        "records_us": cpu_us(lambda: producer.send(topics.events, body, key="1"), count) * RECORDS,
        "transaction_us": await asyncio.to_thread(cpu_us, transaction, max(1, count // TOGETHER)) / TOGETHER,
    }
    await asyncio.to_thread(transactional.close)
    await asyncio.to_thread(producer.close)
    return found


def peer(python: str, count: int, runners: int) -> float:
    """Rollouts per second of Agent Lightning."""
    script = Path(__file__).with_name("peers") / "agent_lightning.py"
    done = subprocess.run(
        [python, script, str(count), str(runners), str(SPANS), str(free_port())],
        env=os.environ | {"LITELLM_LOCAL_MODEL_COST_MAP": "True"},
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        text=True,
        timeout=600,
        check=True,
    )
    return float(done.stdout.partition("RESULT ")[2].split()[0])


def resident_mib(pid: int) -> float:
    """Of a process and its children, shared pages counted once (proportional set size)."""
    children = Path(f"/proc/{pid}/task/{pid}/children").read_text().split()
    rollups = [Path(f"/proc/{one}/smaps_rollup").read_text() for one in (pid, *children)]
    return sum(int(line.split()[1]) for text in rollups for line in text.splitlines() if line.startswith("Pss:")) / 1024


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


def tracing(quick: bool) -> dict[str, float]:
    """Runs `tracing.py` in a separate process, where nothing else disturbs it."""
    with tempfile.NamedTemporaryFile() as figures:
        script = Path(__file__).with_name("tracing.py")
        subprocess.run([sys.executable, script, "--json", figures.name, *["--quick"][: int(quick)]], check=True)
        found: dict[str, float] = json.loads(Path(figures.name).read_text())
    return found


async def over_kafka(bootstrap: str, measure: Callable[..., Any], *arguments: int) -> dict[str, float]:
    """Measures on new topics."""
    settings = load_settings(
        kafka_bootstrap_servers=bootstrap,
        topic_prefix=f"bench{new_id()[-6:]}",
        proxy_url="",
        runner_concurrency=CONCURRENCY,
    )
    log = KafkaLog(settings)
    await log.create_topics()
    found: dict[str, float] = await measure(log, settings, *arguments)
    return found


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--quick", action="store_true", help="fewer rollouts, for a look")
    parser.add_argument("--json", type=Path, help="also write the figures to this file")
    parser.add_argument("--peer", metavar="PYTHON", help="an interpreter that has Agent Lightning 0.3.0")
    options = parser.parse_args()
    count = 150 if options.quick else 3000
    sys.path.insert(0, str(Path.cwd()))
    rows: dict[str, dict[str, float]] = {}
    settings = load_settings(proxy_url="", runner_concurrency=CONCURRENCY)
    rows["in process, threads"] = asyncio.run(run(MemoryLog(settings.topics), settings, count, 0))
    rows["in process, 1 agent process"] = asyncio.run(run(MemoryLog(settings.topics), settings, count, 1))

    with tempfile.TemporaryDirectory() as folder:
        broker = LocalKafka(Path(folder), port=0)
        broker.up()
        try:
            for processes in (1, 2, 4):
                name = f"Kafka, {processes} agent process{'es' * (processes > 1)}"
                rows[name] = asyncio.run(over_kafka(broker.bootstrap_servers, run, count, processes))
            others: dict[int, list[float]] = {runners: [] for runners in PEER_RUNNERS}
            ours = [rows[name]["rollouts_per_second"]]
            for _ in range(1 if options.quick else 3) if options.peer else ():
                for runners, rates in others.items():
                    rates.append(peer(options.peer, count // 2, runners))
                ours.append(asyncio.run(over_kafka(broker.bootstrap_servers, run, count, 4))["rollouts_per_second"])
            bare = asyncio.run(over_kafka(broker.bootstrap_servers, floor, count))
            latency = asyncio.run(over_kafka(broker.bootstrap_servers, start_latency, count // 3))
            memory = asyncio.run(over_kafka(broker.bootstrap_servers, waiting_memory))
        finally:
            broker.down()
    table = Table("", "rollouts/s", "CPU ms per rollout", title=f"{count} rollouts, {SPANS} spans each")
    for name, row in rows.items():
        table.add_row(name, f"{row['rollouts_per_second']:.0f}", f"{row['cpu_ms_per_rollout']:.2f}")
    console = Console()
    console.print(table)
    single = Table("", "", title=f"Kafka, 1 agent process: one rollout at a time; {WAITING} attempts that wait")
    for name, figure in {**latency, **memory}.items():
        single.add_row(name, f"{figure:.1f}")
    console.print(single)
    spans = tracing(options.quick)
    sdk_us = spans["sdk_us_per_span"]
    figures = {
        "kafka_rollout_to_sdk_span": rows["Kafka, 4 agent processes"]["cpu_ms_per_rollout"] * 1e3 / sdk_us,
        "memory_rollout_to_sdk_span": rows["in process, threads"]["cpu_ms_per_rollout"] * 1e3 / sdk_us,
        "floor_to_sdk_span": SPANS + sum(bare.values()) / sdk_us,
    }
    if options.peer:
        figures["peer_rollouts_per_second"] = max(statistics.median(rates) for rates in others.values())
        figures["to_peer"] = statistics.median(ours) / figures["peer_rollouts_per_second"]
    units = Table("", "", title="CPU of a rollout in bare SDK spans; beside a peer")
    for name, figure in (figures | bare).items():
        units.add_row(name, f"{figure:.1f}")
    console.print(units)
    if options.json:
        groups = {"pipeline": rows, "start": latency, "memory": memory, "span": spans, "floor": bare}
        options.json.write_text(json.dumps(groups | figures, indent=2) + "\n")


if __name__ == "__main__":
    main()
