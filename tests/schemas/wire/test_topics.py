"""Names, sizes and the one partitioner."""

import pytest
from aiokafka.partitioner import DefaultPartitioner
from hypothesis import given
from hypothesis import strategies as st

from millstream.schemas.wire.topics import PRIORITIES, PRIORITY_WEIGHTS, Topics, partition_of

# From Apache Kafka's own test of its default partitioner's hash (UtilsTest.testMurmur2).
KAFKA_MURMUR2 = {
    "21": -973932308,
    "foobar": -790332482,
    "a-little-bit-long-string": -985981536,
    "a-little-bit-longer-string": -1486304829,
    "lkjh234lh9fiuh90y23oiuhsafujhadof229phr9h19h89h8": -58897971,
    "abc": 479470107,
}


@pytest.mark.parametrize(("key", "murmur2"), KAFKA_MURMUR2.items())
def test_keys_are_hashed_as_the_java_client_does(key: str, murmur2: int) -> None:
    for partitions in (1, 4, 8, 128):
        assert partition_of(key, partitions) == (murmur2 & 0x7FFFFFFF) % partitions


@given(st.text(), st.integers(1, 512))
def test_keys_are_hashed_as_aiokafka_does(key: str, partitions: int) -> None:
    numbers = list(range(partitions))
    assert partition_of(key, partitions) == DefaultPartitioner()(key.encode(), numbers, numbers)


def test_every_topic_has_the_prefix_and_its_partitions() -> None:
    topics = Topics("mine", 8, 2)
    assert {t.name: (t.partitions, t.cleanup) for t in topics.all} == {
        "mine.tasks.high": (8, "delete"),
        "mine.tasks.normal": (8, "delete"),
        "mine.tasks.low": (8, "delete"),
        "mine.events": (8, "delete"),
        "mine.triplets": (8, "delete"),
        "mine.settled": (8, "delete"),
        "mine.control": (1, "compact"),
        "mine.training": (1, "delete"),
        "mine.workers": (1, "compact"),
        "mine.dead": (2, "delete"),
    }
    assert {topics.events, topics.triplets, topics.control, topics.workers, topics.dead} < {t.name for t in topics.all}


def test_a_priority_is_one_of_three() -> None:
    assert tuple(PRIORITY_WEIGHTS) == PRIORITIES
    with pytest.raises(ValueError, match="'urgent' is none of high, normal, low"):
        Topics().tasks("urgent")
