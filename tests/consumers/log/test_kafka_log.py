"""Topics, and what ``check`` says when something is wrong."""

import shutil
import subprocess
import time
from collections.abc import Callable, Iterator
from typing import Any

import aiokafka.client
import pytest
from aiokafka.protocol.metadata import MetadataRequest
from confluent_kafka.admin import (  # type: ignore[attr-defined]
    AdminClient,
    AlterConfigOpType,
    ConfigEntry,
    ConfigResource,
    ResourceType,
)

from millstream.consumers.log.kafka_log import KafkaLog, TopicPolicy
from millstream.deploy.kafka.local import HOST, LocalKafka
from millstream.pipeline.addresses import free_port
from millstream.pipeline.services.faststream.broker import broker
from millstream.schemas.config.settings import Settings, load_settings
from millstream.schemas.errors import ConfigError, LogError, LogUnavailable, MillstreamError

MakeSettings = Callable[..., Settings]


def config_of(settings: Settings, topic: str) -> dict[str, str]:
    admin = AdminClient({"bootstrap.servers": settings.kafka_bootstrap_servers})
    (described,) = admin.describe_configs([ConfigResource(ResourceType.TOPIC, topic)]).values()
    return {name: entry.value for name, entry in described.result(10).items()}


async def test_a_broker_that_is_down_is_told_within_ten_seconds() -> None:
    address = f"{HOST}:{free_port()}"
    log = KafkaLog(load_settings(kafka_bootstrap_servers=address))
    for call in (log.check, log.create_topics):
        began = time.monotonic()
        with pytest.raises(LogUnavailable) as caught:
            await call()
        assert time.monotonic() - began < 10
        for part in (address, "kafka_bootstrap_servers", "millstream kafka up", "refused"):
            assert part in str(caught.value)


@pytest.mark.kafka
async def test_missing_topics_are_named_until_they_are_created(kafka_settings: MakeSettings) -> None:
    settings = kafka_settings()
    log = KafkaLog(settings)
    with pytest.raises(ConfigError, match="millstream topics create") as caught:
        await log.check()
    assert settings.topics.triplets in str(caught.value)
    await log.create_topics()
    await log.check()
    await log.create_topics()  # again, and nothing is wrong


@pytest.mark.kafka
async def test_brokers_that_answer_too_late_are_an_error_of_the_log(kafka_settings: MakeSettings) -> None:
    """And no traceback: a role ends with the exit code of a log that is away."""
    late = KafkaLog(kafka_settings(), TopicPolicy(create_s=1e-6))
    with pytest.raises(LogError, match=r"creating the topics: .*no answer within 1e-06 s"):
        await late.create_topics()


@pytest.mark.kafka
async def test_a_consumer_waits_until_a_fresh_broker_names_itself(
    kafka_settings: MakeSettings, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The first answer of a broker that has just started may be empty. The group is joined all the same."""
    log = KafkaLog(settings := kafka_settings())
    await log.create_topics()
    answers = 0

    async def connected(*args: Any, **kwargs: Any) -> Any:
        connection = await create_conn(*args, **kwargs)

        async def send(request: Any, expect_response: bool = True) -> Any:
            nonlocal answers
            answer = await ask(request, expect_response)
            if isinstance(request, MetadataRequest):
                answers += 1
                if answers <= 3:
                    answer.brokers = []
            return answer

        ask, connection.send = connection.send, send
        return connection

    create_conn = aiokafka.client.create_conn
    monkeypatch.setattr(aiokafka.client, "create_conn", connected)
    consumer = log.consumer("team")
    await consumer.subscribe([settings.topics.control])
    try:
        while not consumer.assignment():
            await consumer.poll(1, 1.0)
    finally:
        await consumer.close()
    assert answers > 3


@pytest.mark.kafka
async def test_another_number_of_partitions_is_refused(kafka_settings: MakeSettings) -> None:
    settings = kafka_settings()
    await KafkaLog(settings).create_topics()
    other = KafkaLog(kafka_settings(topic_prefix=settings.topic_prefix, kafka_partitions=6))
    for call in (other.check, other.create_topics):
        with pytest.raises(ConfigError, match=r"events has 4 partitions, kafka_partitions is 6"):
            await call()


@pytest.mark.kafka
async def test_topics_have_their_policy_and_follow_the_size_limit(kafka_settings: MakeSettings) -> None:
    settings = kafka_settings(max_record_bytes=1 << 20)
    await KafkaLog(settings).create_topics()
    control, events = (config_of(settings, name) for name in (settings.topics.control, settings.topics.events))
    assert (control["cleanup.policy"], events["cleanup.policy"]) == ("compact", "delete")
    assert int(events["max.message.bytes"]) >= 1 << 20
    larger = kafka_settings(topic_prefix=settings.topic_prefix, max_record_bytes=2 << 20)
    await KafkaLog(larger).create_topics()
    assert int(config_of(settings, settings.topics.events)["max.message.bytes"]) >= 2 << 20


@pytest.mark.kafka
async def test_a_retention_that_is_too_short_is_named_and_lengthened(
    kafka_settings: MakeSettings, caplog: pytest.LogCaptureFixture
) -> None:
    """Entry C1: a topic that forgets early breaks the order of the three lifetimes."""
    settings = kafka_settings()
    log = KafkaLog(settings)
    await log.create_topics()
    short, kept, unlimited = settings.topics.settled, settings.topics.events, settings.topics.triplets
    set_config(settings, short, "retention.ms", "3600000")
    set_config(settings, kept, "retention.ms", "9999999999")
    set_config(settings, unlimited, "retention.ms", "-1")
    await log.check()
    assert f"topic {short} keeps records for 0.0 days, of the 14 that" in caplog.text
    assert f"topic {kept} keeps" not in caplog.text
    assert f"topic {unlimited} keeps" not in caplog.text
    await log.create_topics()
    found = [config_of(settings, name)["retention.ms"] for name in (short, kept, unlimited)]
    assert found == [str(14 * 86_400_000), "9999999999", "-1"]


def set_config(settings: Settings, topic: str, name: str, value: str) -> None:
    entry = ConfigEntry(name, value, incremental_operation=AlterConfigOpType.SET)
    resource = ConfigResource(ResourceType.TOPIC, topic, incremental_configs=[entry])
    admin = AdminClient({"bootstrap.servers": settings.kafka_bootstrap_servers})
    for altered in admin.incremental_alter_configs([resource]).values():
        altered.result(10)


PASSWORD = "correct"
JAAS = 'org.apache.kafka.common.security.plain.PlainLoginModule required username="u" password="u" user_runner="{}";'


@pytest.fixture(scope="module")
def secured(tmp_path_factory: pytest.TempPathFactory) -> Iterator[dict[str, Any]]:
    """A broker with a plain listener, one with passwords and one with TLS; their addresses and the authority."""
    folder = tmp_path_factory.mktemp("secured")
    plain, sasl, tls, controller = (free_port() for _ in range(4))
    store, ca = folder / "broker.p12", folder / "ca.pem"
    keytool = shutil.which("keytool")
    if keytool is None:
        pytest.skip("needs keytool, which comes with Java")
    common = ["-keystore", str(store), "-storepass", "changeit", "-alias", "broker"]
    names = ["-dname", "CN=localhost", "-ext", f"san=ip:{HOST}"]
    subprocess.run([keytool, "-genkeypair", *common, "-keyalg", "RSA", *names], check=True, capture_output=True)
    subprocess.run([keytool, "-exportcert", "-rfc", *common, "-file", str(ca)], check=True, capture_output=True)
    listeners = f"PLAINTEXT://{HOST}:{plain},SASL://{HOST}:{sasl},TLS://{HOST}:{tls}"
    broker = LocalKafka(
        folder / "kafka",
        port=plain,
        properties={
            "controller.quorum.bootstrap.servers": f"{HOST}:{controller}",
            "listeners": f"{listeners},CONTROLLER://{HOST}:{controller}",
            "advertised.listeners": f"{listeners},CONTROLLER://{HOST}:{controller}",
            "listener.security.protocol.map": "PLAINTEXT:PLAINTEXT,CONTROLLER:PLAINTEXT,SASL:SASL_PLAINTEXT,TLS:SSL",
            "sasl.enabled.mechanisms": "PLAIN",
            "listener.name.sasl.plain.sasl.jaas.config": JAAS.format(PASSWORD),
            "ssl.keystore.location": str(store),
            "ssl.keystore.password": "changeit",
            "ssl.keystore.type": "PKCS12",
        },
    )
    broker.up()
    yield {"sasl": f"{HOST}:{sasl}", "tls": f"{HOST}:{tls}", "plain": f"{HOST}:{plain}", "ca": ca}
    broker.down()


def secured_settings(address: str, protocol: str, **more: Any) -> Settings:
    return load_settings(
        kafka_bootstrap_servers=address, kafka_security_protocol=protocol, kafka_partitions=1, topic_prefix="s", **more
    )


USER = {"kafka_security_mechanism": "PLAIN", "kafka_security_username": "runner"}


@pytest.mark.kafka
async def test_both_clients_connect_with_a_password_and_with_tls(secured: dict[str, Any]) -> None:
    for settings in (
        secured_settings(secured["sasl"], "SASL_PLAINTEXT", kafka_security_password=PASSWORD, **USER),
        secured_settings(secured["tls"], "SSL", kafka_security_ca_file=secured["ca"]),
    ):
        log = KafkaLog(settings)
        await log.create_topics()
        await log.check()
        producer, consumer = log.producer(), log.consumer(f"team.{settings.kafka_security_protocol}")
        await consumer.subscribe([settings.topics.events])
        producer.send(settings.topics.events, b"x", partition=0)
        producer.close()
        assert (await consumer.poll(1, 30.0))[0].offset == 0
        await consumer.close()


@pytest.mark.kafka
async def test_processors_connect_with_a_password_and_with_tls(secured: dict[str, Any]) -> None:
    for settings in (
        secured_settings(secured["sasl"], "SASL_PLAINTEXT", kafka_security_password=PASSWORD, **USER),
        secured_settings(secured["tls"], "SSL", kafka_security_ca_file=secured["ca"]),
    ):
        async with broker(settings) as connected:
            await connected.start()
            await connected.publish(b"x", settings.topics.events)


@pytest.mark.kafka
@pytest.mark.parametrize(
    ("listener", "protocol", "more", "says"),
    [
        ("sasl", "SASL_PLAINTEXT", USER | {"kafka_security_password": "wrong"}, "kafka_security_password"),
        ("tls", "SSL", {}, "kafka_security_ca_file"),
        ("tls", "PLAINTEXT", {}, "kafka_security_protocol"),
        ("plain", "SSL", {}, "kafka_security_protocol"),
        ("sasl", "PLAINTEXT", {}, "kafka_security_protocol"),
        ("plain", "SASL_PLAINTEXT", USER | {"kafka_security_password": PASSWORD}, "kafka_security"),
    ],
    ids=["wrong password", "no authority", "plain to TLS", "TLS to plain", "plain to SASL", "SASL to plain"],
)
async def test_a_wrong_security_setting_is_named_within_ten_seconds(
    secured: dict[str, Any], listener: str, protocol: str, more: dict[str, str], says: str
) -> None:
    log = KafkaLog(secured_settings(secured[listener], protocol, **more))
    began = time.monotonic()
    with pytest.raises(MillstreamError, match=says):
        await log.check()
    assert time.monotonic() - began < 10
