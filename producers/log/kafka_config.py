"""What all Kafka clients share: connection settings, the translation of errors, and rate-limited logs.

Two clients are used (librdkafka through confluent-kafka, and aiokafka); `Settings` configure both.
"""

import logging
import ssl
import time
from collections.abc import Callable
from typing import Any, Final

from confluent_kafka import KafkaError, KafkaException

from millstream.schemas.config.settings import Settings
from millstream.schemas.errors import Denied, Fenced, LogError, LogUnavailable, TooLarge, TransactionAborted

logger = logging.getLogger(__name__)

# Room for keys, headers and batch framing: topics and fetchers accept whatever the producer accepts.
BATCH_OVERHEAD: Final = 1 << 16
FILES: Final = {  # librdkafka's options by our settings
    "kafka_security_ca_file": "ssl.ca.location",
    "kafka_security_cert_file": "ssl.certificate.location",
    "kafka_security_key_file": "ssl.key.location",
}
LOG_EVERY_S: Final = 10.0  # an outage otherwise writes thousands of equal lines

_FENCED = {
    KafkaError._FENCED,
    KafkaError.PRODUCER_FENCED,
    KafkaError.INVALID_PRODUCER_EPOCH,
    KafkaError.FENCED_INSTANCE_ID,
}
_LOST = {  # the group has moved on: this member may not commit
    KafkaError.UNKNOWN_MEMBER_ID,
    KafkaError.ILLEGAL_GENERATION,
    KafkaError.REBALANCE_IN_PROGRESS,
    KafkaError.FENCED_MEMBER_EPOCH,
    KafkaError.STALE_MEMBER_EPOCH,
    KafkaError._ASSIGNMENT_LOST,
}
_PURGED = {KafkaError._PURGE_QUEUE, KafkaError._PURGE_INFLIGHT}
_PASSING = {  # an outage, or a leader or coordinator that is moving
    KafkaError._MSG_TIMED_OUT,
    KafkaError._TIMED_OUT,
    KafkaError._TRANSPORT,
    KafkaError._ALL_BROKERS_DOWN,
    KafkaError._WAIT_COORD,
    KafkaError._NOENT,  # list_offsets: a partition has no leader yet
    KafkaError.BROKER_NOT_AVAILABLE,
    KafkaError.REQUEST_TIMED_OUT,
    KafkaError.NETWORK_EXCEPTION,
    KafkaError.LEADER_NOT_AVAILABLE,
    KafkaError.NOT_LEADER_FOR_PARTITION,
    KafkaError.OFFSET_NOT_AVAILABLE,
    KafkaError.FENCED_LEADER_EPOCH,
    KafkaError.UNKNOWN_LEADER_EPOCH,
    KafkaError.COORDINATOR_LOAD_IN_PROGRESS,
    KafkaError.COORDINATOR_NOT_AVAILABLE,
    KafkaError.NOT_COORDINATOR,
}
_DENIED = {
    KafkaError.TOPIC_AUTHORIZATION_FAILED,
    KafkaError.GROUP_AUTHORIZATION_FAILED,
    KafkaError.TRANSACTIONAL_ID_AUTHORIZATION_FAILED,
    KafkaError.CLUSTER_AUTHORIZATION_FAILED,
}
_NO_TOPIC = {KafkaError._UNKNOWN_TOPIC, KafkaError.UNKNOWN_TOPIC_OR_PART, KafkaError._UNKNOWN_PARTITION}


def missing_right(settings: Settings, operation: str, *resources: tuple[str, str]) -> str:
    """What to do if ``operation`` (as kafka-acls names it: "Read", "Write") is denied. ``resources``: kind ("topic",
    "group", "transactional-id") and name of each that may be meant."""
    name = settings.kafka_security_username
    who, principal = (f"user {name}", f"User:{name}") if name else ("the user of this process", "User:…")
    named = " and ".join(f"{kind} {it}" for kind, it in resources)
    options = " ".join(f"--{kind} {it}" for kind, it in resources)
    return (
        f"{who} has no right to {operation.lower()} {named}. Grant it (kafka-acls --add --allow-principal {principal} "
        f"--operation {operation} {options}), or correct the kafka_security_… settings"
    )


def log_error(error: KafkaError, doing: str, right: str = "") -> LogError:
    """The port's error for one of librdkafka; ``doing`` begins the message, as "sending to millstream.events".
    ``right``: what `missing_right` says, if it may be missing."""
    code, message = error.code(), f"{doing}: {error.str()} ({error.name()})"
    if code in _DENIED:
        message = f"{message}: {right or 'grant the right to it'}"
        return TransactionAborted(message) if error.txn_requires_abort() else Denied(message)
    if code in _FENCED or error.fatal():
        return Fenced(
            f"{message}: a newer process has replaced this one, the brokers have ended its transaction (it stood "
            "still, or the link is slow), or the client is broken; start it again"
        )
    if error.txn_requires_abort() or code in _LOST or code in _PURGED:
        return TransactionAborted(message)
    if code == KafkaError.MSG_SIZE_TOO_LARGE:
        return TooLarge(f"{message}: raise max_record_bytes and run `millstream topics create` again")
    if error.retriable() or code in _PASSING:
        return LogUnavailable(message)
    if code in _NO_TOPIC:
        return LogError(f"{message}: create the topics with `millstream topics create`")
    return LogError(message)


def raised(error: KafkaException, doing: str, right: str = "") -> LogError:
    """`log_error` for an exception."""
    return log_error(error.args[0], doing, right)


class RateLimit(logging.Filter):
    """Passes each kind of warning once every ten seconds."""

    def __init__(self) -> None:
        super().__init__()
        self._last: dict[tuple[str, str, str], float] = {}

    def filter(self, record: logging.LogRecord) -> bool:
        if record.levelno < logging.WARNING:
            return True
        # librdkafka's template is always the same; its first argument is the kind of message.
        first = record.args[0] if isinstance(record.args, tuple) and record.args else ""
        key, now = (record.name, str(record.msg), str(first)), time.monotonic()
        if now - self._last.get(key, -LOG_EVERY_S) < LOG_EVERY_S:
            return False
        self._last[key] = now
        return True


_LIMIT = RateLimit()
logger.addFilter(_LIMIT)
_librdkafka_log = logging.getLogger("millstream.librdkafka")
_librdkafka_log.addFilter(_LIMIT)


def limit_aiokafka_logs() -> None:
    """Limits all loggers of aiokafka, which writes thousands of lines in an outage."""
    for name in list(logging.root.manager.loggerDict):
        if name.startswith("aiokafka"):
            logging.getLogger(name).addFilter(_LIMIT)


def _report(error: KafkaError) -> None:
    logger.warning("%s: %s", error.name(), error.str())


def librdkafka_config(
    settings: Settings, on_error: Callable[[KafkaError], None] = _report, **options: Any
) -> dict[str, Any]:
    """Configuration of a confluent-kafka client; underscores in ``options`` stand for dots."""
    config: dict[str, Any] = {
        "bootstrap.servers": settings.kafka_bootstrap_servers,
        "security.protocol": settings.kafka_security_protocol,
        "reconnect.backoff.max.ms": 1000,  # reconnects to a restarted broker within a second, not ten
        "error_cb": on_error,
        "logger": _librdkafka_log,
        "log_level": 4,  # warnings and worse
    }
    if settings.kafka_security_protocol.startswith("SASL"):
        config["sasl.mechanism"] = settings.kafka_security_mechanism
        config["sasl.username"] = settings.kafka_security_username
        config["sasl.password"] = settings.kafka_security_password.get_secret_value()
    for name, option in FILES.items():
        if (path := getattr(settings, name)) is not None:
            config[option] = str(path)
    return config | {name.replace("_", "."): value for name, value in options.items()}


def aiokafka_config(settings: Settings) -> dict[str, Any]:
    """Keyword arguments of an aiokafka client."""
    config: dict[str, Any] = {
        "bootstrap_servers": settings.kafka_bootstrap_servers,
        "security_protocol": settings.kafka_security_protocol,
        "metadata_max_age_ms": 10_000,  # a topic that this user may read again is seen by then; else after five minutes
    }
    if settings.kafka_security_protocol.startswith("SASL"):
        config["sasl_mechanism"] = settings.kafka_security_mechanism
        config["sasl_plain_username"] = settings.kafka_security_username
        config["sasl_plain_password"] = settings.kafka_security_password.get_secret_value()
    if settings.kafka_security_protocol.endswith("SSL"):
        context = ssl.create_default_context(cafile=settings.kafka_security_ca_file)
        if settings.kafka_security_cert_file is not None:
            context.load_cert_chain(settings.kafka_security_cert_file, settings.kafka_security_key_file)
        config["ssl_context"] = context
    return config
