"""Tasks files, and where published tasks come to lie."""

import json
from collections import Counter
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
from factories import event, task

from millstream.consumers.log.memory_log import MemoryLog
from millstream.producers.tasks import TOGETHER, TaskPublisher, read_tasks
from millstream.schemas.config.settings import load_settings
from millstream.schemas.errors import CodecError, ConfigError, TooLarge
from millstream.schemas.ids import derived_id, new_id
from millstream.schemas.wire import codec
from millstream.schemas.wire.log import Partition
from millstream.schemas.wire.records import RolloutTask

SETTINGS = load_settings(timeout_s=77, lease_s=7, retry_max_attempts=2, max_record_bytes=1 << 20)


def write(path: Path, *lines: str) -> Path:
    path.write_text("\n".join(lines), "utf-8")
    return path


def test_a_line_becomes_a_group_with_the_settings_defaults(tmp_path: Path) -> None:
    file = write(
        tmp_path / "t.jsonl", '{"input": {"q": "Zürich"}}', "", '{"input": 2, "group_id": "g", "timeout_s": 5}'
    )
    tasks, bad = read_tasks(file, SETTINGS, group_size=3, priority="high", experiment_id="e")
    assert bad == []
    assert len(tasks) == len({t.rollout_id for t in tasks}) == 6
    first, second = tasks[:3], tasks[3:]
    assert len({t.group_id for t in first}) == 1
    assert {t.group_id for t in second} == {"g"}
    assert json.loads(first[0].input) == {"q": "Zürich"}
    assert {(t.group_size, t.priority, t.experiment_id, t.mode, t.max_attempts, t.lease_s) for t in tasks} == {
        (3, "high", "e", "train", 2, 7.0)
    }
    assert (first[0].timeout_s, second[0].timeout_s) == (77.0, 5.0)


@pytest.mark.parametrize(
    ("line", "why"),
    [
        ("{", "JSON"),
        ("[1]", "object"),
        ("{}", "input: Field required"),
        ('{"input": 1, "inptu": 2}', "inptu"),
        ('{"input": 1, "priority": "urgent"}', "'urgent' is none of high, normal, low"),
        ('{"input": 1, "mode": "prod"}', "'prod' is none of train, val, test"),
        ('{"input": 1, "timeout_s": -1}', "timeout_s"),
        ('{"input": 1, "timeout_s": "5"}', "timeout_s"),
        ('{"input": 1, "metadata": {"a": 1}}', "metadata.a"),
        ('{"input": 1, "retry_on": ["succeeded"]}', "succeeded"),
        ('{"input": 1, "seed": 9223372036854775808}', "seed"),
    ],
)
def test_a_broken_line_is_named_and_nothing_is_read(tmp_path: Path, line: str, why: str) -> None:
    file = write(tmp_path / "t.jsonl", '{"input": 1}', line, '{"input": 3}')
    with pytest.raises(ConfigError) as raised:
        read_tasks(file, SETTINGS)
    assert f"{file}:2: " in str(raised.value)
    assert why in str(raised.value)
    assert "Nothing was published" in str(raised.value)
    tasks, bad = read_tasks(file, SETTINGS, skip_bad=True)
    assert [t.input for t in tasks] == ["1", "3"]
    assert len(bad) == 1
    assert bad[0].startswith(f"{file}:2: ")


def test_a_file_that_is_not_there_is_named(tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match=r"none\.jsonl"):
        read_tasks(tmp_path / "none.jsonl", SETTINGS)


@pytest.mark.parametrize("seed", [0, 7])
def test_the_members_of_a_group_have_different_seeds(tmp_path: Path, seed: int) -> None:
    """With one seed they would give the same answers, and nothing could be learnt from the group."""
    file = write(tmp_path / "t.jsonl", json.dumps({"input": 1, "seed": seed}))
    (first, *others), _ = read_tasks(file, SETTINGS, group_size=8)
    assert first.seed == seed
    assert len({task.seed for task in [first, *others]}) == 8
    assert [t.seed for t in read_tasks(file, SETTINGS, group_size=8)[0]] == [first.seed, *(t.seed for t in others)]
    assert read_tasks(file, SETTINGS)[0][0].seed == seed


async def test_tasks_are_spread_evenly_over_the_partitions_of_their_priority(tmp_path: Path) -> None:
    file = write(tmp_path / "t.jsonl", '{"input": 1}', '{"input": 2, "priority": "low"}')
    tasks, _ = read_tasks(file, SETTINGS, group_size=16)
    log = MemoryLog(SETTINGS.topics)
    publisher = TaskPublisher(log.producer(), SETTINGS)
    await publisher.publish(tasks)
    await publisher.publish(tasks[:8])

    consumer = log.consumer()
    topics = SETTINGS.topics
    await consumer.assign([Partition(topics.tasks(p), n) for p in ("high", "normal", "low") for n in range(8)])
    records = await consumer.poll(1000, 1)
    assert Counter(r.partition for r in records) == {
        **{Partition(topics.tasks("normal"), n): 3 for n in range(8)},
        **{Partition(topics.tasks("low"), n): 2 for n in range(8)},
    }
    assert all(r.key is None for r in records)
    assert all(r.headers["rollout"].decode() == codec.decode_as(RolloutTask, r.value).rollout_id for r in records)


def with_one_wrong(**fields: Any) -> list[RolloutTask]:
    return [task(**fields) if n == 50 else task() for n in range(101)]


@pytest.mark.parametrize(
    ("tasks", "error", "says"),
    [
        (with_one_wrong(seed=2**70), CodecError, "seed"),
        (with_one_wrong(max_attempts=2**40), CodecError, "max_attempts"),
        (with_one_wrong(input=5), CodecError, "input"),
        (with_one_wrong(metadata={"a": None}), CodecError, "metadata"),
        (with_one_wrong(priority="urgent"), ConfigError, "priority 'urgent' is none of high, normal, low"),
        (with_one_wrong(input="x" * (SETTINGS.max_record_bytes - 2000)), TooLarge, "max_record_bytes"),
        (with_one_wrong(input="x" * SETTINGS.max_record_bytes), TooLarge, "max_record_bytes"),
        (with_one_wrong(rollout_id=derived_id(10**18, "old")), ConfigError, "more than 6 days old"),
    ],
    ids=range(8),
)
async def test_all_tasks_are_published_or_none(tasks: list[RolloutTask], error: type[Exception], says: str) -> None:
    """Entries C6 and C2: 50 of 101 were published when the 51st did not encode."""
    log = MemoryLog(SETTINGS.topics, max_record_bytes=SETTINGS.max_record_bytes)
    with pytest.raises(error, match=r"task 51 \(rollout .*\), nothing was published") as raised:
        await TaskPublisher(log.producer(), SETTINGS).publish(tasks)
    assert says in str(raised.value)
    assert [r for parts in log.partitions.values() for part in parts for r in part.records] == []


async def test_publishing_says_how_many_tasks_are_stored() -> None:
    log = MemoryLog(SETTINGS.topics)
    shown: list[tuple[int, int]] = []
    tasks = [task() for _ in range(TOGETHER + 1)]
    await TaskPublisher(log.producer(), SETTINGS).publish(tasks, lambda *done: shown.append(done))
    assert shown == [(TOGETHER, TOGETHER + 1), (TOGETHER + 1, TOGETHER + 1)]


async def test_a_task_that_is_accepted_can_be_claimed_and_retried() -> None:
    """Entry C2: `preparing` holds the task and some bytes more."""
    limit = SETTINGS.max_record_bytes
    large = task(input="")
    room = limit - TaskPublisher.RESERVED_BYTES - len(codec.encode(large)) - 8
    large = replace(large, input="x" * room, resources_id=new_id())
    log = MemoryLog(SETTINGS.topics, encode=True, max_record_bytes=limit)
    publisher = TaskPublisher(log.producer(), SETTINGS)
    with pytest.raises(TooLarge):
        await publisher.publish([large])
    large = replace(large, input="x" * (room - 40))
    await publisher.publish([large])
    assert len(codec.encode(event(large, new_id(), "preparing", worker_id="w" * 200))) < limit
