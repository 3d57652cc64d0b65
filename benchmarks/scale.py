"""How cost grows: what one unit of work costs when there is 1, 10 and 100 times as much of something.

Flat is well (total cost grows in proportion); the ratio is that of the largest size to the smallest. CPU is that of
this process (of the proxy's, for its streams), in microseconds unless the name says otherwise.

    python benchmarks/scale.py [--quick] [--only NAME]... [--json FILE]      from the repository's root
"""

import argparse
import asyncio
import gc
import json
import tempfile
import time
import tracemalloc
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import adapter as adapters
import proxy as proxies
import store as stores
from rich.console import Console
from rich.table import Table

from millstream.consumers.adapter.settle import PartitionFold
from millstream.consumers.adapter.triplets import Trace, to_triplets
from millstream.consumers.control import ControlFollower
from millstream.consumers.log.kafka_log import KafkaLog
from millstream.consumers.log.memory_log import MemoryLog
from millstream.consumers.runner.claims import Claims
from millstream.consumers.runner.runner import Runner
from millstream.consumers.sink.clickhouse_writer import ClickHouseWriter
from millstream.consumers.workers import read_workers
from millstream.deploy.kafka.local import LocalKafka
from millstream.pipeline.store.clickhouse import ClickHouseStore
from millstream.producers.control import cancel_record, publish_control, publish_resources
from millstream.producers.tasks import TaskPublisher
from millstream.schemas.config.settings import Settings, load_settings
from millstream.schemas.control import LLM, Resources
from millstream.schemas.ids import new_id
from millstream.schemas.spans import semconv
from millstream.schemas.wire import codec
from millstream.schemas.wire.log import KIND_HEADER, LogRecord, Partition
from millstream.schemas.wire.prefixes import share
from millstream.schemas.wire.records import RolloutTask
from millstream.schemas.wire.topics import Topics

TOPICS = Topics()
TASKS = 1000  # claimed by a group
IDLE_S = 4.0  # for which attempts wait
TURN_TOKENS = 64

Costs = dict[str, float]  # name → of one unit


def cpu_us(work: Callable[[], object], units: int) -> float:
    """Of this thread, for one unit."""
    gc.collect()
    began = time.thread_time()
    work()
    return (time.thread_time() - began) / units * 1e6


# The adapter


def log_records(of: RolloutTask, bodies: Sequence[tuple[bytes, bytes]], offsets: Iterator[int]) -> list[LogRecord]:
    place, now = Partition(TOPICS.events, 0), time.time_ns() // 1_000_000
    return [LogRecord(place, next(offsets), now, of.rollout_id, body, {KIND_HEADER: kind}) for kind, body in bodies]


def open_rollouts(size: int) -> Costs:
    """Settling other rollouts, looking for expired leases, and memory, while ``size`` rollouts are open."""
    offsets = iter(range(1 << 40))
    # As many that one collection of garbage among all that is open is a part of the cost, and not all of it.
    others = [log_records(of := adapters.task(), adapters.records(of), offsets) for _ in range(max(100, size // 50))]
    fold = PartitionFold(to_triplets)
    waiting = [log_records(of := adapters.task(), adapters.records(of)[:2], offsets) for _ in range(size)]

    def open_all() -> None:
        for records in waiting:
            for record in records:
                fold.apply(record, 0.0)

    tracemalloc.start()
    open_all()
    held = tracemalloc.get_traced_memory()[0] + sum(len(r.value) for (r, _) in waiting)  # with the claims themselves
    tracemalloc.stop()

    def settle() -> None:
        for records in others:
            for record in records:
                fold.apply(record, 0.0)
            for rollout_id, _ in list(fold.ready(0.0)):
                fold.written(rollout_id)

    record_us = cpu_us(settle, sum(map(len, others)))
    assert len(fold.open) == size
    return {
        "record": record_us,
        "lease": cpu_us(lambda: fold.expire(1.0, 0.0, 0), size),
        "bytes": held / size,
    }


def spans_of_a_rollout(size: int) -> Costs:
    """From the records of one rollout to its triplets."""
    of = adapters.task()
    bodies = adapters.records(of, calls=size // 3)
    records = log_records(of, bodies, iter(range(1 << 40)))
    fold = PartitionFold(to_triplets)

    def settle() -> None:
        for record in records:
            fold.apply(record, 0.0)
        ((_, decision),) = fold.ready(0.0)
        assert len(decision.triplets) == size // 3

    return {"span": cpu_us(settle, size)}


def turns_of_a_conversation(size: int) -> Costs:
    """A call's prompt holds the whole conversation before it, so its spans grow with the square of its turns: the unit
    is a kilobyte of them."""
    of = adapters.task()
    spans = adapters.rollout(of, size)
    messages: list[dict[str, str]] = []
    for number in range(0, len(spans), 3):  # the proxy's spans
        messages += [{"role": "user", "content": "word " * TURN_TOKENS}, {"role": "assistant", "content": "yes"}]
        spans[number] = replace(
            spans[number],
            prompt_token_ids=adapters.token_ids(range((number // 3 + 1) * TURN_TOKENS)),
            attributes=spans[number].attributes | {semconv.REQUEST_MESSAGES: json.dumps(messages[:-1])},
        )
    kilobytes = sum(len(codec.encode(span)) for span in spans) / 1000
    return {"kilobyte": cpu_us(lambda: share(to_triplets(Trace(of, "a", spans))), 1) / kilobytes}


# Kafka


@contextmanager
def kafka(**overrides: Any) -> Iterator[tuple[KafkaLog, Settings]]:
    with tempfile.TemporaryDirectory() as folder:
        broker = LocalKafka(Path(folder), port=0)
        broker.up()
        try:
            settings = load_settings(
                kafka_bootstrap_servers=broker.bootstrap_servers, proxy_url="", topic_prefix="scale", **overrides
            )
            log = KafkaLog(settings)
            asyncio.run(log.create_topics())
            yield log, settings
        finally:
            broker.down()


def partitions(size: int) -> Costs:
    """An adapter over so many partitions of ``events``."""
    rollouts = 300
    with kafka(kafka_partitions=size) as (log, settings):
        return {"rollout": asyncio.run(adapters.settled(log, settings.topics, rollouts)) / rollouts * 1e6}


def members_of_a_group(size: int) -> Costs:
    """Runners that claim tasks: CPU of a claim, and seconds until all partitions are owned and read."""
    with kafka(kafka_partitions=64) as (log, settings):
        return asyncio.run(claimed(log, settings, size))


async def claimed(log: KafkaLog, settings: Settings, members: int) -> Costs:
    producer, topics = log.producer(), settings.topics
    publisher = TaskPublisher(producer, settings)
    follower = ControlFollower(log, topics)
    await follower.start()
    group = [Claims(log, topics, producer, follower, f"worker-{n}") for n in range(members)]
    found: set[str] = set()

    async def work(claims: Claims) -> None:
        while True:
            for claim in await claims.claim(16, 0.5):
                found.add(claim.task.rollout_id)

    async def until(count: int) -> None:
        while len(found) < count:  # noqa: ASYNC110
            await asyncio.sleep(0.01)

    first = [adapters.task() for _ in range(512)]  # some for every partition
    await publisher.publish(first)
    began = time.monotonic()
    await asyncio.gather(*(claims.start() for claims in group))
    working = [asyncio.create_task(work(claims)) for claims in group]
    await until(len(first))
    joined_s, cpu = time.monotonic() - began, time.process_time()
    await publisher.publish([adapters.task() for _ in range(TASKS)])
    await until(len(first) + TASKS)
    used = time.process_time() - cpu
    for task in working:
        task.cancel()
    await asyncio.wait(working)
    await asyncio.gather(*(claims.close() for claims in group))
    await follower.close()
    await asyncio.to_thread(producer.close)
    return {"claim": used / TASKS * 1e6, "seconds to join": joined_s}


# Control, runner, proxy, store


def versions_and_cancels(size: int) -> Costs:
    """Reading so many of both, and asking whether a task is cancelled."""
    return asyncio.run(followed(size))


async def followed(size: int) -> Costs:
    log = MemoryLog(TOPICS, encode=True)
    producer = log.producer()
    for _ in range(size):
        items = {"policy": LLM(model="policy", model_version="run.0.1")}
        await publish_resources(producer, TOPICS, Resources(resources_id=new_id(), experiment_id="e", items=items))
        await publish_control(producer, TOPICS, cancel_record("rollout", new_id()))
    follower, task = ControlFollower(log, TOPICS), adapters.task()
    began = time.thread_time()
    await follower.start()
    read_us = (time.thread_time() - began) / (2 * size) * 1e6
    ask_us = cpu_us(lambda: [follower.cancelled(task) for _ in range(10_000)], 10_000)
    await follower.close()
    return {"record": read_us, "question": ask_us}


began: list[float] = []


async def waiting_agent(_task: Any) -> None:
    began.append(time.monotonic())
    await asyncio.Event().wait()


def waiting_attempts(size: int) -> Costs:
    """Attempts of one runner that wait: CPU of each per second, with a heartbeat, and memory."""
    return asyncio.run(waited(size))


async def waited(size: int) -> Costs:
    settings = load_settings(proxy_url="", runner_concurrency=size)
    log = MemoryLog(settings.topics)
    runner, stop = Runner(log, settings, waiting_agent, processes=0, drain_s=0), asyncio.Event()
    working = asyncio.create_task(runner.run(stop))
    while not await read_workers(log, settings.topics):  # noqa: ASYNC110
        await asyncio.sleep(0.1)
    before = proxies.rss_mb()
    began.clear()
    tasks = [replace(adapters.task(), timeout_s=600.0, lease_s=3.0) for _ in range(size)]
    await TaskPublisher(log.producer(), settings).publish(tasks)
    while len(began) < size:  # noqa: ASYNC110
        await asyncio.sleep(0.1)
    await asyncio.sleep(1.0)  # until their first records are written
    cpu = time.process_time()
    await asyncio.sleep(IDLE_S)
    used = time.process_time() - cpu
    held = proxies.rss_mb() - before
    stop.set()
    await working
    return {"attempt, each second": used / IDLE_S / size * 1e6, "kilobytes": held / size * 1000}


def streams_of_a_proxy(size: int) -> Costs:
    """Callers of one proxy that stream at once; CPU of its process."""
    with tempfile.TemporaryDirectory() as folder, proxies.fronts(Path(folder)) as found:
        asyncio.run(proxies.stream(found["millstream"], 20))  # warms up
        return {"stream": asyncio.run(proxies.stream(found["millstream"], size))[1] * 1e3}


def stored_spans(size: int) -> Costs:
    """Questions to a store with so many spans, in milliseconds."""
    with tempfile.TemporaryDirectory() as folder:
        settings = load_settings(clickhouse_dsn=f"chdb://{folder}/store")
        writer = ClickHouseWriter(settings)
        writer.migrate()
        store = ClickHouseStore(settings)
        found = stores.questions(writer, store, size)
        store.close()
        writer.close()
    return {"ms for a rollout's spans, p50": found["one_rollout_p50_ms"], "bytes of a span": found["bytes_per_span"]}


@dataclass(frozen=True)
class Growth:
    """One thing of which there may be more."""

    measure: Callable[[int], Costs]
    sizes: tuple[int, ...]
    quick: tuple[int, ...]


GROWTHS = [
    Growth(open_rollouts, (1_000, 10_000, 100_000), (100, 1_000)),
    Growth(spans_of_a_rollout, (99, 999, 9_999), (99, 999)),
    Growth(turns_of_a_conversation, (10, 100, 1_000), (10, 100)),
    Growth(partitions, (8, 32, 128), (8,)),
    Growth(members_of_a_group, (1, 8, 64), (2,)),
    Growth(versions_and_cancels, (10, 1_000, 10_000), (10, 100)),
    Growth(waiting_attempts, (50, 500, 5_000), (50,)),
    Growth(streams_of_a_proxy, (20, 200, 2_000), (20,)),
    Growth(stored_spans, (1_000_000, 10_000_000, 30_000_000), (200_000,)),
]


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    names = [growth.measure.__name__ for growth in GROWTHS]
    parser.add_argument("--quick", action="store_true", help="smaller sizes, for a look")
    parser.add_argument("--only", action="append", choices=names, help="only this; repeatable")
    parser.add_argument("--json", type=Path, help="also write the figures to this file: lists of size and cost")
    options = parser.parse_args()
    console = Console()
    found: dict[str, list[tuple[int, float]]] = {}
    table = Table("", "size", "cost of one", "", "ratio", title="How cost grows")
    for growth in GROWTHS:
        name = growth.measure.__name__
        if options.only and name not in options.only:
            continue
        console.print(f"{name} …", style="dim")
        for size in growth.quick if options.quick else growth.sizes:
            for unit, cost in growth.measure(size).items():
                found.setdefault(f"{name}.{unit}", []).append((size, cost))
    for name, costs in found.items():
        most = max(cost for _, cost in costs) or 1.0
        for number, (size, cost) in enumerate(costs):
            last = number == len(costs) - 1
            ratio = f"{cost / costs[0][1]:.2f}" if last and number and costs[0][1] else ""
            table.add_row("" if number else name, f"{size:,}", f"{cost:,.2f}", "█" * round(20 * cost / most), ratio)
    console.print(table)
    if options.json:
        options.json.write_text(json.dumps(found, indent=2) + "\n")


if __name__ == "__main__":
    main()
