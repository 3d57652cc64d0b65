"""A sink with the store behind it, and what the roles write, for tests."""

import asyncio

import factories

from millstream.consumers.sink.clickhouse import ClickHouseSink
from millstream.consumers.sink.sink import FlushPolicy, OutagePolicy, SinkRole
from millstream.schemas.control import LLM, Resources
from millstream.schemas.ids import new_id
from millstream.schemas.wire import status
from millstream.schemas.wire.records import RolloutEnd, Triplet

IMPATIENT = OutagePolicy(retry_s=0.01, retry_max_s=0.1)
VIEWS = ("tasks", "attempts", "rollouts", "spans", "rewards", "triplets", "resources", "dead_letters")


def role(log, writer, settings, *, rows=None, age_s=1.0, outage=IMPATIENT, **policies):
    flush = FlushPolicy(rows or settings.span_batch_size, age_s=age_s)
    sink = ClickHouseSink(writer, settings.topics.events)
    return SinkRole(log, sink, settings, flush=flush, outage=outage, **{"drain_s": 60.0} | policies)


def counts(store):
    return {view: store.sql(f"SELECT count() FROM {view}").rows[0][0] for view in VIEWS}


def publish(log, settings, rollouts, spans=4):
    """Whole rollouts as the roles write them; returns what the store has to hold then."""
    topics, producer = settings.topics, log.producer()
    settled = []
    for n in range(rollouts):
        task, attempt = factories.task(), new_id()
        end = RolloutEnd(
            rollout_id=task.rollout_id,
            group_id=task.group_id,
            group_size=1,
            status="succeeded",
            attempt_id=attempt,
            attempts=1,
            turns=1,
            reward=0.5,
            created_at=task.created_at,
            ended_at=task.created_at + 9,
        )
        triplet = Triplet(
            rollout_id=task.rollout_id,
            attempt_id=attempt,
            group_id=task.group_id,
            turn=0,
            span_id="s",
            prompt="[]",
            response="{}",
        )
        producer.send(topics.tasks("normal"), task, partition=n % settings.kafka_partitions)
        events = [
            factories.event(task, attempt, status.PREPARING),
            *[factories.event(task, attempt, status.RUNNING) for _ in range(3)],
            *[factories.span(task, attempt, sequence=s) for s in range(1, spans)],
            factories.reward(task, attempt, 0.5),
            factories.event(task, attempt, status.SUCCEEDED),
        ]
        for record in events:
            producer.send(topics.events, record, key=task.rollout_id)
        settled += [(topics.triplets, triplet), (topics.triplets, end), (topics.events, end)]
    version = Resources(resources_id=new_id(), experiment_id="e", items={"m": LLM(model="m", model_version="r.0.1")})
    producer.send(topics.control, version.to_control(created_at=1), key=f"resources/{version.resources_id}")
    producer.close(20.0)
    adapter = log.transactional_producer(f"{topics.prefix}.adapter.1")
    adapter.init_transactions(20.0)
    adapter.begin_transaction()
    for topic, record in settled:
        adapter.send(topic, record, key=record.rollout_id)
    adapter.flush(20.0)
    adapter.commit_transaction(20.0)
    adapter.close(20.0)
    return {
        "tasks": rollouts,
        "attempts": rollouts,
        "rollouts": rollouts,
        "spans": rollouts * spans,
        "rewards": rollouts,
        "triplets": rollouts,
        "resources": 1,
        "dead_letters": 0,
    }


async def run_to_the_end(*sinks):
    """Each reads what the log holds now, and leaves."""
    stop = asyncio.Event()
    stop.set()
    await asyncio.gather(*(sink.run(stop) for sink in sinks))


async def eventually(condition, seconds=20.0):
    async with asyncio.timeout(seconds):
        while not condition():  # noqa: ASYNC110 - a store has no events
            await asyncio.sleep(0.02)
