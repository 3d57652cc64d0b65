"""From a rollout's records to its explanation, and back to whole prompts, through the real adapter."""

import asyncio
import struct
from collections import Counter
from contextlib import closing

import pytest
from factories import call, event, reward, task

from millstream.consumers.adapter.adapter import Adapter
from millstream.consumers.adapter.explanation import explained
from millstream.consumers.adapter.read_trace import read_trace
from millstream.consumers.adapter.triplets import TripletMaker
from millstream.consumers.log.memory_log import MemoryLog
from millstream.consumers.log.read_to_end import read_to_end
from millstream.consumers.sink.clickhouse_writer import ClickHouseWriter
from millstream.consumers.sink.rows import to_rows
from millstream.pipeline.store.clickhouse import ClickHouseStore
from millstream.pipeline.training.collector import Collector
from millstream.pipeline.training.datasets import read_rollouts
from millstream.schemas.config.settings import load_settings
from millstream.schemas.config.triplet_rules import TripletRules
from millstream.schemas.errors import ConfigError
from millstream.schemas.spans import semconv
from millstream.schemas.wire.log import Partition
from millstream.schemas.wire.topics import Topics

TOPICS = Topics(partitions=2)
SYSTEM = list(range(100, 130))
TEXT = '[{"role": "system", "content": "' + "é" * 80 + '"}'
# prompt tokens, response tokens, text of the prompt
TURNS = [
    (SYSTEM, [1, 2], TEXT + "]"),
    ([*SYSTEM, 1, 2, 3], [4], TEXT + ', {"role": "user"}]'),
    ([*SYSTEM, 1, 2, 9, 9, 9], [5], TEXT + ', {"role": "tool"}]'),
]


def ids(values):
    return struct.pack(f"<{len(values)}i", *values)


def conversation(of):
    for number, (prompt, response, text) in enumerate(TURNS):
        attributes = {
            semconv.RESPONSE_ID: str(number),
            semconv.RESPONSE_MODEL: "policy",
            semconv.REQUEST_MESSAGES: text,
            semconv.RESPONSE_MESSAGE: '{"role": "assistant", "content": "3"}',
            semconv.TOOL_DEFINITIONS: '[{"name": "add"}]',
        }
        tokens = {"prompt_token_ids": ids(prompt), "response_token_ids": ids(response)}
        logprobs = struct.pack(f"<{len(response)}f", *[-1.0] * len(response))
        yield call(of, "a", str(number), attributes=attributes, **tokens, response_logprobs=logprobs)
    yield reward(of, "a", 1.0)
    yield reward(of, "a", 9.0)


@pytest.fixture
async def settled():
    """A rollout that the adapter has settled; what a trainer received of it."""
    log, rules = MemoryLog(TOPICS, encode=True), TripletRules(reward_range=(0.0, 1.0))
    one, producer, stop = task(), log.producer(), asyncio.Event()
    collector = Collector(log, TOPICS, producer)
    await collector.start()
    collector.expect([one.rollout_id])
    spans = list(conversation(one))
    counts = Counter(span.source for span in spans)
    events = [event(one, "a", "preparing"), event(one, "a", "running")]
    for record in (*events, *spans, event(one, "a", "succeeded", span_counts=counts)):
        producer.send(TOPICS.events, record, key=one.rollout_id)
    adapter = Adapter(log, TOPICS, transactional_id="t", to_triplets=TripletMaker(rules))
    running = asyncio.create_task(adapter.run(stop))
    (finished,) = await asyncio.wait_for(collector.collect([one.rollout_id]), 30)
    stop.set()
    await running
    yield log, one, TripletMaker(rules), finished
    await collector.close()


async def test_a_rollout_is_explained_from_the_log(settled):
    log, one, maker, _ = settled
    found = explained(maker, *await read_trace(log, TOPICS, one.rollout_id))
    assert (found["attempt_id"], found["status"]) == ("a", "succeeded")
    assert [(c["turn"], c["goes on from"], c["not trained on"]) for c in found["calls"]] == [
        (0, None, None),
        (1, "0", None),
        (2, "1, broken after 32 tokens", "reward 'reward' is 9, outside 0 … 1"),
    ]
    assert found["rewards_left_out"] == [
        {"name": "reward", "value": "9.0", "why": "reward 'reward' is 9, outside 0 … 1"}
    ]
    assert found["counts"]["calls"] == 3
    assert found["counts"]["used"] == 2
    with pytest.raises(ConfigError, match="no attempt b of rollout"):
        await read_trace(log, TOPICS, one.rollout_id, "b")


async def test_everybody_reads_whole_prompts_although_the_log_holds_them_once(settled, tmp_path):
    log, one, maker, finished = settled
    trace, _ = await read_trace(log, TOPICS, one.rollout_id)
    whole = maker(trace)
    assert list(finished.triplets) == whole
    assert [t.prompt for t in whole] == [text for _, _, text in TURNS]
    assert await read_rollouts(log, TOPICS, None, "train") == [whole]

    partitions = [Partition(TOPICS.triplets, number) for number in range(TOPICS.partitions)]
    written = [record async for record in read_to_end(log, partitions)]
    settings = load_settings(clickhouse_dsn=f"chdb://{tmp_path / 'store'}")
    rows, unusable = to_rows(written, TOPICS.events)
    assert not unusable
    with closing(ClickHouseWriter(settings)) as writer, closing(ClickHouseStore(settings)) as store:
        writer.migrate()
        for block in rows:
            block.insert(writer, block.table)
        assert store.triplets([one.rollout_id]) == whole
        asked = store.sql("SELECT prefix_turn, length(prompt_token_ids), prompt_tokens FROM triplets ORDER BY turn")
    assert asked.rows == [(None, 30, 30), (0, 1, 33), (1, 3, 35)]
