"""The topics: names, keys and the partitioner, for all clients and logs."""

from dataclasses import dataclass
from typing import Final, Literal

PRIORITIES: Final = ("high", "normal", "low")
PRIORITY_WEIGHTS: Final = {"high": 8, "normal": 4, "low": 1}

_DAY_S: Final = 24 * 3600.0


@dataclass(frozen=True, slots=True)
class Lifetimes:
    """How long things live in the log, in seconds. The order of the three is what makes each rollout end once: a task
    is ended before the log may drop it, and its end is known for longer than the task can come back."""

    task_s: float = 6 * _DAY_S  # from the publication of a rollout; a task that is claimed later ends as failed, unrun
    record_s: float = 7 * _DAY_S  # retention of the topics: longer than a sink is ever down
    settled_s: float = 14 * _DAY_S  # for which an end is known; a claim of an older rollout is late


LIFETIMES: Final = Lifetimes()

# confluent-kafka hashes keys with CRC32 by default, aiokafka and Java with murmur2: the same key would have two
# partitions. This is librdkafka's name of the partitioner that all clients use here.
LIBRDKAFKA_PARTITIONER: Final = "murmur2_random"


def partition_of(key: str, partitions: int) -> int:
    """The partition of a key: Kafka's default partitioner (murmur2 of the UTF-8 bytes, sign bit cleared)."""
    return (_murmur2(key.encode("utf-8", "surrogateescape")) & 0x7FFFFFFF) % partitions


def _murmur2(data: bytes) -> int:
    """MurmurHash2, 32 bits, with Kafka's seed (``org.apache.kafka.common.utils.Utils.murmur2``)."""
    multiplier, mask = 0x5BD1E995, 0xFFFFFFFF
    digest = 0x9747B28C ^ len(data)
    whole = len(data) & ~3
    for at in range(0, whole, 4):
        word = int.from_bytes(data[at : at + 4], "little") * multiplier & mask
        word = (word ^ word >> 24) * multiplier & mask
        digest = digest * multiplier & mask ^ word
    if whole < len(data):
        digest = (digest ^ int.from_bytes(data[whole:], "little")) * multiplier & mask
    digest = (digest ^ digest >> 13) * multiplier & mask
    return digest ^ digest >> 15


@dataclass(frozen=True, slots=True)
class Topic:
    """A topic as it is created."""

    name: str
    partitions: int
    cleanup: Literal["delete", "compact"]
    key: str  # description of its records' keys
    kept_s: float = LIFETIMES.record_s  # retention of a topic that is not compacted


@dataclass(frozen=True, slots=True)
class Topics:
    """The topics of one deployment.

    The number of ``events`` partitions never changes during the life of a deployment: it determines the partition of
    a rollout, on which its triplets lie, too.
    """

    prefix: str = "millstream"
    partitions: int = 8
    dead_partitions: int = 1

    @property
    def events(self) -> str:
        return f"{self.prefix}.events"

    @property
    def triplets(self) -> str:
        return f"{self.prefix}.triplets"

    @property
    def settled(self) -> str:
        return f"{self.prefix}.settled"

    @property
    def control(self) -> str:
        return f"{self.prefix}.control"

    @property
    def training(self) -> str:
        return f"{self.prefix}.training"

    @property
    def workers(self) -> str:
        return f"{self.prefix}.workers"

    @property
    def dead(self) -> str:
        return f"{self.prefix}.dead"

    def tasks(self, priority: str) -> str:
        """The tasks topic of a priority. Raises ValueError for an unknown priority."""
        if priority not in PRIORITIES:
            raise ValueError(f"priority {priority!r} is none of {', '.join(PRIORITIES)}")
        return f"{self.prefix}.tasks.{priority}"

    @property
    def all(self) -> tuple[Topic, ...]:
        n = self.partitions
        return (
            *(Topic(self.tasks(p), n, "delete", "none: the publisher goes round-robin") for p in PRIORITIES),
            Topic(self.events, n, "delete", "rollout_id"),
            Topic(self.triplets, n, "delete", "rollout_id"),
            Topic(self.settled, n, "delete", "none: on the partition of the events", LIFETIMES.settled_s),
            Topic(self.control, 1, "compact", "kind/name"),
            Topic(self.training, 1, "delete", "experiment_id"),
            Topic(self.workers, 1, "compact", "worker_id"),
            Topic(self.dead, self.dead_partitions, "delete", "the original key"),
        )

    @property
    def stored(self) -> tuple[Topic, ...]:
        """The topics that a sink reads: all but the adapter's own."""
        return tuple(topic for topic in self.all if topic.name != self.settled)
