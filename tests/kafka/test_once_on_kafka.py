"""Entry C1: on a real Kafka, a rollout ends once however its task or claim comes back."""

import asyncio
from collections import Counter
from collections.abc import AsyncIterator, Callable, Mapping
from contextlib import asynccontextmanager

import pytest
from factories import event, task

from millstream.consumers.adapter.adapter import Adapter
from millstream.consumers.control import ControlFollower
from millstream.consumers.log.kafka_log import KafkaLog
from millstream.consumers.log.read_to_end import read_to_end
from millstream.consumers.runner.claims import ClaimPolicy, Claims
from millstream.producers.log.acks import send_acknowledged
from millstream.producers.tasks import TaskPublisher
from millstream.schemas.config.settings import Settings
from millstream.schemas.errors import LogUnavailable
from millstream.schemas.wire import codec
from millstream.schemas.wire.log import Partition
from millstream.schemas.wire.records import AttemptEvent, RolloutEnd, RolloutTask

pytestmark = pytest.mark.kafka


class Deployment:
    def __init__(self, settings: Settings) -> None:
        self.settings = settings
        self.topics = settings.topics
        self.log = KafkaLog(settings)
        self.producer = self.log.producer()

    @asynccontextmanager
    async def adapter(self) -> AsyncIterator[None]:
        adapter = Adapter(self.log, self.topics, transactional_id=f"{self.topics.prefix}.a")
        stop = asyncio.Event()
        running = asyncio.create_task(adapter.run(stop))
        await adapter.wait_ready()
        yield
        stop.set()
        await running

    @asynccontextmanager
    async def claims(self, **policy: float) -> AsyncIterator[Claims]:
        control = ControlFollower(self.log, self.topics)
        claims = Claims(self.log, self.topics, self.producer, control, "w", ClaimPolicy(retry_s=0.01, **policy))
        await control.start()
        await claims.start()
        yield claims
        await claims.close()
        await control.close()

    async def write(self, *events: AttemptEvent) -> None:
        for one in events:
            await send_acknowledged(self.producer, self.topics.events, one, key=one.rollout_id)

    async def run(self, of: RolloutTask, attempt: str) -> None:
        await self.write(*(event(of, attempt, how) for how in ("preparing", "running", "succeeded")))

    async def ends(self) -> Counter[str]:
        partitions = [Partition(self.topics.triplets, n) for n in range(self.topics.partitions)]
        values = [codec.decode(record.value) async for record in read_to_end(self.log, partitions)]
        return Counter(value.rollout_id for value in values if isinstance(value, RolloutEnd))

    async def until_ended(self, rollout_ids: set[str]) -> None:
        async with asyncio.timeout(60):
            while not rollout_ids <= (await self.ends()).keys():
                continue


@pytest.fixture
async def deployment(kafka_settings: Callable[..., Settings]) -> AsyncIterator[Deployment]:
    found = Deployment(kafka_settings())
    await found.log.create_topics()
    yield found
    await asyncio.to_thread(found.producer.close)


async def test_a_claim_of_a_runner_that_was_frozen_is_late_after_restarts(deployment: Deployment) -> None:
    """Its `preparing` is written when its rollout has ended, the committed offset has passed that, and other adapters
    have taken over: nothing but the topic of marks knows the end."""
    old = [task(max_attempts=3, max_lost_attempts=3) for _ in range(4)]
    for round_ in range(3):
        async with deployment.adapter():
            for of in old:
                await deployment.run(of, f"attempt {round_}")  # the first ends it, the others come back
            fresh = [task() for _ in range(8)]
            for of in fresh:
                await deployment.run(of, "a")
            await deployment.until_ended({of.rollout_id for of in fresh})
    ends = await deployment.ends()
    assert set(ends.values()) == {1}
    assert len(ends) == 4 + 3 * 8


@pytest.mark.parametrize("applied", [False, True], ids=["commit lost", "answer lost"])
async def test_tasks_whose_commit_has_an_unknown_outcome_are_committed_again(
    deployment: Deployment, applied: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    tasks = [task(lease_s=5.0) for _ in range(6)]
    await TaskPublisher(deployment.producer, deployment.settings).publish(tasks)
    async with deployment.adapter(), deployment.claims() as claims:
        commit = claims._consumer.commit

        async def without_answer(offsets: Mapping[Partition, int], timeout_s: float = 10.0) -> None:
            if applied:
                await commit(offsets, timeout_s)
            raise LogUnavailable("no answer")

        monkeypatch.setattr(claims._consumer, "commit", without_answer)
        abandoned = Counter[str]()
        async with asyncio.timeout(30):
            while len(abandoned) < 6:
                assert await claims.claim(8, 0.2) == []
                partitions = [Partition(deployment.topics.events, n) for n in range(deployment.topics.partitions)]
                async for record in read_to_end(deployment.log, partitions):
                    abandoned[record.key or ""] += 1
        monkeypatch.setattr(claims._consumer, "commit", commit)
        got = []
        async with asyncio.timeout(30):
            while len(got) < 6:
                got += await claims.claim(8, 0.2)
        for claim in got:
            await deployment.write(event(claim.task, claim.attempt_id, "succeeded"))
        await deployment.until_ended({of.rollout_id for of in tasks})
    async with deployment.claims() as successor:  # all of it is committed
        assert await successor.claim(8, 1.0) == []
    assert await deployment.ends() == Counter(of.rollout_id for of in tasks)


async def test_a_publisher_that_repeats_an_id_after_days_starts_nothing(deployment: Deployment) -> None:
    of = task()
    publisher = TaskPublisher(deployment.producer, deployment.settings)
    for _ in range(2):
        await publisher.publish([of])
        async with deployment.adapter(), deployment.claims() as claims:
            (claim,) = await claims.claim(1, 10.0)
            await deployment.write(event(claim.task, claim.attempt_id, "succeeded"))
            await deployment.run(last := task(), "a")
            await deployment.until_ended({of.rollout_id, last.rollout_id})
    assert (await deployment.ends())[of.rollout_id] == 1
