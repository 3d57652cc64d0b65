"""A permission that is taken away and given back, on a real broker with access lists."""

import asyncio
from collections.abc import AsyncIterator, Callable, Sequence
from contextlib import suppress
from pathlib import Path
from typing import Any

import pytest
import yaml
from confluent_kafka import KafkaException
from confluent_kafka.admin import (
    AclBinding,
    AclBindingFilter,
    AclOperation,
    AclPermissionType,
    AdminClient,
    ResourcePatternType,
    ResourceType,
)
from runner_rig import running, terminal

from millstream.consumers.adapter.adapter import Adapter
from millstream.consumers.control import ControlFollower
from millstream.consumers.log.kafka_log import KafkaLog
from millstream.deploy.kafka.local import LocalKafka
from millstream.producers.control import cancel_record, publish_control
from millstream.producers.log.acks import send_acknowledged
from millstream.producers.supervisor import supervised
from millstream.schemas.config.settings import Settings, load_settings
from millstream.schemas.errors import Denied, LogError
from millstream.schemas.wire.log import LogRecord, Partition
from millstream.schemas.wire.records import RolloutEnd

ACLS = {
    "authorizer.class.name": "org.apache.kafka.metadata.authorizer.StandardAuthorizer",
    "allow.everyone.if.no.acl.found": "true",
}


@pytest.fixture(scope="module")
def restricted(tmp_path_factory: pytest.TempPathFactory) -> AsyncIterator[Settings]:
    broker = LocalKafka(tmp_path_factory.mktemp("acl"), port=0, properties=ACLS)
    broker.up()
    yield load_settings(
        kafka_bootstrap_servers=broker.bootstrap_servers, kafka_partitions=1, topic_prefix="acl", proxy_url=""
    )
    broker.down()


class Permission:
    """Of everybody, for one operation on one topic or group."""

    def __init__(
        self,
        settings: Settings,
        name: str,
        kind: ResourceType = ResourceType.TOPIC,
        operation: AclOperation = AclOperation.READ,
    ) -> None:
        self._admin = AdminClient({"bootstrap.servers": settings.kafka_bootstrap_servers})
        self._kind, self._name, self._operation = kind, name, operation

    def deny(self) -> None:
        binding = AclBinding(*self._rule("*", self._operation), AclPermissionType.DENY)
        for created in self._admin.create_acls([binding]).values():
            created.result(20)

    def allow(self) -> None:
        every = AclBindingFilter(*self._rule(None, AclOperation.ANY), AclPermissionType.ANY)
        for deleted in self._admin.delete_acls([every]).values():
            deleted.result(20)

    def _rule(self, host: str | None, operation: AclOperation) -> tuple[object, ...]:
        user = None if host is None else "User:*"
        return self._kind, self._name, ResourcePatternType.LITERAL, user, host, operation


@pytest.mark.kafka
async def test_a_cancel_is_heard_after_reading_the_control_topic_was_denied(
    restricted: Settings, caplog: pytest.LogCaptureFixture
) -> None:
    """Section B1, on the real broker: the follower's age grows meanwhile, and it does not end."""
    topics, heard = restricted.topics, asyncio.Event()
    log, reading = KafkaLog(restricted), Permission(restricted, topics.control)
    await log.create_topics()
    with supervised() as background:
        follower = ControlFollower(log, topics, heard.set)
        await follower.start()
        await asyncio.to_thread(reading.deny)
        async with asyncio.timeout(30):
            while "can't be read" not in caplog.text:  # noqa: ASYNC110 - no event
                await asyncio.sleep(0.05)
        await asyncio.to_thread(reading.allow)
        producer = log.producer()
        await publish_control(producer, topics, cancel_record("group", "g"))
        async with asyncio.timeout(30):
            await heard.wait()
        assert background.failure is None
        await follower.close()
    await asyncio.to_thread(producer.close)


@pytest.mark.kafka
@pytest.mark.parametrize(
    ("kind", "prefix", "name"),
    [(ResourceType.TOPIC, "one", "one.tasks.normal"), (ResourceType.GROUP, "two", "two.runner")],
)
async def test_a_runner_goes_on_after_reading_its_tasks_was_denied(
    restricted: Settings,
    caplog: pytest.LogCaptureFixture,
    tmp_path: Path,
    kind: ResourceType,
    prefix: str,
    name: str,
) -> None:
    settings = restricted.model_copy(update={"topic_prefix": prefix})
    log, reading = KafkaLog(settings), Permission(settings, name, kind)
    await log.create_topics()
    async with running(lambda task: None, tmp_path, log=log, settings=settings) as rig:
        await rig.publish([1])
        await rig.read_until(lambda events: len(terminal(events)) == 1)
        await asyncio.to_thread(reading.deny)
        async with asyncio.timeout(30):
            while "no tasks can be claimed" not in caplog.text:  # noqa: ASYNC110 - no event
                await asyncio.sleep(0.05)
        await asyncio.to_thread(reading.allow)
        await rig.publish([2])
        await rig.read_until(lambda events: len(terminal(events)) == 2)


@pytest.mark.kafka
@pytest.mark.parametrize(
    ("kind", "name", "said"),
    [
        (
            ResourceType.TOPIC,
            "denied.tasks.low",
            "has no right to read topic denied.tasks.low. Grant it (kafka-acls",
        ),
        (ResourceType.GROUP, "denied.runner", "has no right to read group denied.runner. Grant it (kafka-acls"),
    ],
)
async def test_a_runner_that_is_started_without_a_right_names_it_and_waits_for_it(
    restricted: Settings, caplog: pytest.LogCaptureFixture, tmp_path: Path, kind: ResourceType, name: str, said: str
) -> None:
    """Section B1: a process that ends at once would be started again and again."""
    settings = restricted.model_copy(update={"topic_prefix": "denied"})
    log, reading = KafkaLog(settings), Permission(settings, name, kind)
    await log.create_topics()
    await asyncio.to_thread(reading.deny)
    async with running(lambda task: None, tmp_path, log=log, settings=settings) as rig:
        async with asyncio.timeout(30):
            while said not in caplog.text:  # noqa: ASYNC110 - no event
                await asyncio.sleep(0.05)
        await asyncio.to_thread(reading.allow)
        await rig.publish([1])
        await rig.read_until(lambda events: len(terminal(events)) == 1)


@pytest.mark.kafka
@pytest.mark.parametrize("from_the_start", [True, False])
async def test_a_member_of_the_transactional_group_goes_on_after_its_right_to_the_group_was_taken(
    restricted: Settings, from_the_start: bool
) -> None:
    """librdkafka's consumer ends for good then: the member says so until a new one has joined."""
    topic, log = restricted.topics.events, KafkaLog(restricted)
    await log.create_topics()
    group = f"{restricted.topics.prefix}.team{from_the_start}"
    reading = Permission(restricted, group, ResourceType.GROUP)
    consumer = log.transactional_consumer(group)
    producer = log.producer()
    listener = Owned()

    async def poll_until(condition: Callable[[], bool]) -> None:
        async with asyncio.timeout(30):
            while not condition():
                with suppress(Denied):
                    listener.read += [r.value for r in await consumer.poll(10, 0.2) if isinstance(r, LogRecord)]

    async def until_denied() -> None:
        async with asyncio.timeout(30):
            said = None
            while said is None:
                try:
                    await consumer.poll(10, 0.2)
                except Denied as error:
                    said = str(error)
        assert f"no right to read topic {topic} and group {group}" in said

    if from_the_start:
        await asyncio.to_thread(reading.deny)
    await consumer.subscribe([topic], listener)
    if not from_the_start:
        await poll_until(lambda: bool(listener.owned))
        await asyncio.to_thread(reading.deny)
    await until_denied()
    assert listener.owned == set()
    await until_denied()  # as long as it is so
    await asyncio.to_thread(reading.allow)
    await send_acknowledged(producer, topic, b"after")
    await poll_until(lambda: b"after" in listener.read)
    await consumer.close()
    await asyncio.to_thread(producer.close)


class Owned:
    def __init__(self) -> None:
        self.owned: set[Partition] = set()
        self.read: list[bytes | None] = []

    def on_assign(self, partitions: Sequence[Partition]) -> None:
        self.owned.update(partitions)

    def on_revoke(self, partitions: Sequence[Partition]) -> None:
        self.owned.difference_update(partitions)


@pytest.mark.kafka
async def test_writing_without_a_right_names_it(restricted: Settings) -> None:
    log = KafkaLog(restricted)
    await log.create_topics()
    writing = Permission(restricted, restricted.topics.events, operation=AclOperation.WRITE)
    await asyncio.to_thread(writing.deny)
    producer = log.producer()
    with pytest.raises(Denied, match=r"no right to write topic acl\.events.*--operation Write --topic acl\.events"):
        await send_acknowledged(producer, restricted.topics.events, b"x")
    await asyncio.to_thread(writing.allow)
    await asyncio.to_thread(producer.close)


@pytest.mark.kafka
async def test_a_group_whose_committed_offsets_cant_be_read_has_not_committed_nothing(restricted: Settings) -> None:
    """Entry C1: brokers report this for the group as a whole, as they do while a restarted coordinator loads. aiokafka
    overlooks such errors and reports that nothing has been committed."""
    topic, log = restricted.topics.tasks("low"), KafkaLog(restricted)
    await log.create_topics()
    producer, consumer = log.producer(), log.consumer("g")
    await send_acknowledged(producer, topic, b"x")
    await consumer.subscribe([topic])
    async with asyncio.timeout(30):
        while not await consumer.poll(1, 0.2):
            pass
    await consumer.commit({Partition(topic, 0): 1})
    assert await consumer.committed([Partition(topic, 0)]) == {Partition(topic, 0): 1}
    described = Permission(restricted, "g", ResourceType.GROUP, AclOperation.DESCRIBE)
    await asyncio.to_thread(described.deny)
    with pytest.raises(LogError, match="reading the committed offsets of g"):
        await consumer.committed([Partition(topic, 0)])
    await asyncio.to_thread(described.allow)
    await consumer.close()
    await asyncio.to_thread(producer.close)


KINDS = {
    "topic": ResourceType.TOPIC,
    "group": ResourceType.GROUP,
    "transactionalId": ResourceType.TRANSACTIONAL_ID,
}
OPERATIONS = {
    "Create": AclOperation.CREATE,
    "Describe": AclOperation.DESCRIBE,
    "DescribeConfigs": AclOperation.DESCRIBE_CONFIGS,
    "AlterConfigs": AclOperation.ALTER_CONFIGS,
    "Read": AclOperation.READ,
    "Write": AclOperation.WRITE,
}


def _prefixed(user: dict[str, Any]) -> list[AclBinding]:
    """The access lists of a KafkaUser, for everybody."""
    return [
        AclBinding(
            KINDS[acl["resource"]["type"]],
            acl["resource"]["name"],
            ResourcePatternType.PREFIXED,
            "User:*",
            "*",
            OPERATIONS[operation],
            AclPermissionType.ALLOW,
        )
        for acl in user["spec"]["authorization"]["acls"]
        for operation in acl["operations"]
    ]


@pytest.mark.kafka
async def test_the_rights_of_the_example_for_kubernetes_suffice(restricted: Settings, tmp_path: Path) -> None:
    """What has an access list permits nothing else to anybody, as the deletion of a topic shows: the cluster has one
    with what the broker itself and this test need."""
    example = Path(__file__).parents[2] / "deploy" / "helm" / "examples" / "kafka.yaml"
    (user,) = (each for each in yaml.safe_load_all(example.read_text()) if each["kind"] == "KafkaUser")
    settings = restricted.model_copy(update={"topic_prefix": "millstream"})
    admin = AdminClient({"bootstrap.servers": settings.kafka_bootstrap_servers})
    cluster = ResourceType.BROKER, "kafka-cluster", ResourcePatternType.LITERAL
    needed = [
        AclBinding(*cluster, "User:*", "*", operation, AclPermissionType.ALLOW)
        for operation in (AclOperation.CLUSTER_ACTION, AclOperation.ALTER)
    ]
    for created in admin.create_acls([*needed, *_prefixed(user)]).values():
        await asyncio.to_thread(created.result, 20)
    try:
        topics, log, stop = settings.topics, KafkaLog(settings), asyncio.Event()
        await log.create_topics()
        adapter = asyncio.create_task(Adapter(log, topics, transactional_id=f"{topics.prefix}.adapter.a").run(stop))
        async with running(lambda task: None, tmp_path, log=log, settings=settings) as rig:
            await rig.publish([1])
            await rig.read_until(lambda events: any(isinstance(event, RolloutEnd) for event in events))
        stop.set()
        await adapter
        (deleted,) = admin.delete_topics([topics.events]).values()
        with pytest.raises(KafkaException, match="TOPIC_AUTHORIZATION_FAILED"):
            await asyncio.to_thread(deleted.result, 20)
    finally:
        every = AclBindingFilter(*cluster, None, None, AclOperation.ANY, AclPermissionType.ANY)
        for removed in admin.delete_acls([every]).values():
            await asyncio.to_thread(removed.result, 20)
