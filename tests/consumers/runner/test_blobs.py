"""Long contents from an agent to the log: the runner stores each once, before its span."""

import asyncio
import json
from concurrent.futures import Future
from pathlib import Path

import pytest
from factories import span, task
from runner_rig import running, settings_for_tests, write_agent

from millstream.consumers.log.memory_log import MemoryLog
from millstream.consumers.runner.attempt_writer import AttemptWriter
from millstream.consumers.runner.claims import Claim
from millstream.consumers.runner.outcome import Outcome
from millstream.producers.blob_store import Blobs
from millstream.schemas.spans.blobs import is_reference
from millstream.schemas.wire import codec, status
from millstream.schemas.wire.log import Partition
from millstream.schemas.wire.records import Span
from millstream.schemas.wire.topics import Topics

TASK = task()
TOPICS = Topics("t", partitions=2)

AGENT = """
    import millstream as ms

    def agent(task):
        ms.emit_span("before")
        ms.emit_span("look", {"image": "x" * task["bytes"]})
        ms.emit_span("look again", {"image": "x" * task["bytes"]})
        ms.emit_reward(1.0)
"""
NAMES = ["before", "look", "look again", "reward"]
MB = 1 << 20


@pytest.fixture(params=[1, 0], ids=["processes", "threads"])
def processes(request):
    return request.param


def contents(folder):
    return [path for path in Path(folder).rglob("*") if path.is_file()]


async def test_an_image_of_10_mb_from_end_to_end(tmp_path, processes):
    settings = settings_for_tests(blob_url=str(tmp_path / "blobs"), max_record_bytes=1 << 16)
    folder = write_agent(tmp_path, AGENT, "blob_agent.py")
    async with running("blob_agent:agent", folder, settings=settings, processes=processes) as rig:
        await rig.publish([{"bytes": 10 * MB}])
        (ended,) = (await rig.ends(1)).values()
    assert ended.last.status == status.SUCCEEDED
    spans = [span for span in ended.spans if span.parent_id]
    assert [span.name for span in spans] == NAMES  # in the order in which the agent made them
    assert [span.sequence for span in spans] == [1, 2, 3, 4]
    assert is_reference(spans[1].attributes["image"])
    assert spans[1].attributes == spans[2].attributes
    assert Blobs(settings.blob_url).whole(spans[1].attributes["image"]) == "x" * 10 * MB
    assert len(contents(tmp_path / "blobs")) == 1


async def test_the_same_content_of_50_attempts_is_stored_once(tmp_path):
    fsspec = pytest.importorskip("fsspec")
    settings = settings_for_tests(blob_url=f"memory://{tmp_path.name}")
    folder = write_agent(tmp_path, AGENT, "blob_agent.py")
    async with running("blob_agent:agent", folder, settings=settings, concurrency=25, processes=2) as rig:
        await rig.publish([{"bytes": MB, "n": n} for n in range(50)])
        ended = await rig.ends(50)
    assert {e.last.status for e in ended.values()} == {status.SUCCEEDED}
    assert {tuple(span.name for span in e.spans if span.parent_id) for e in ended.values()} == {tuple(NAMES)}
    assert len(fsspec.filesystem("memory").find(f"/{tmp_path.name}")) == 1


class SlowStore(Blobs):
    """Stores a content when the test says so."""

    def __init__(self):
        super().__init__()
        self.stored = Future()

    def put(self, _digest, _content):
        return self.stored


@pytest.fixture
async def writer():
    log, store = MemoryLog(TOPICS), SlowStore()
    found = AttemptWriter(Claim(TASK, "a", None), log.producer(), TOPICS, "w", store)
    found.log, found.stored = log, store.stored
    return found


async def written(log):
    consumer = log.consumer()
    await consumer.assign([Partition(TOPICS.events, n) for n in range(TOPICS.partitions)], "beginning")
    events = [codec.decode(record.value) for record in await consumer.poll(100, 0.0)]
    await consumer.close()
    return [event.name if isinstance(event, Span) else event.status for event in events]


async def test_later_spans_and_the_end_wait_for_a_content(writer):
    writer.span(span(TASK, "a", name="1"), "span")
    writer.content("d", b"x")
    writer.span(span(TASK, "a", name="2"), "span", ["d"])
    writer.span(span(TASK, "a", name="3"), "span")
    finishing = asyncio.create_task(writer.finish(Outcome(status.SUCCEEDED, spans=3), None))
    assert (writer.spans, await written(writer.log)) == (3, ["1"])
    assert not finishing.done()
    writer.stored.set_result(None)
    assert (await finishing).status == status.SUCCEEDED
    assert await written(writer.log) == ["1", "2", "3", status.SUCCEEDED]


async def test_a_content_without_its_span_is_not_counted(writer):
    writer.content("d", b"x")
    writer.span(span(TASK, "a", name="1"), "span", ["d"])
    writer.span(span(TASK, "a", name="2"), "span")
    writer.stored.cancel()
    assert (await writer.finish(Outcome(status.SUCCEEDED, spans=2), None)).error.type == "blob"
    assert await written(writer.log) == ["2", status.FAILED]


async def test_a_store_that_is_down_fails_the_attempt_and_says_why(tmp_path, processes):
    (tmp_path / "blobs").write_text("no folder")
    settings = settings_for_tests(blob_url=str(tmp_path / "blobs"))
    folder = write_agent(tmp_path, AGENT, "blob_agent.py")
    async with running("blob_agent:agent", folder, settings=settings, processes=processes) as rig:
        await rig.publish([{"bytes": MB}, {"bytes": 10}])
        ended = await rig.ends(2)
    failed, other = ended[json.dumps({"bytes": MB})], ended[json.dumps({"bytes": 10})]
    assert (failed.last.status, failed.last.error.type) == (status.FAILED, "blob")
    assert f"(1048576 bytes) was not stored in {tmp_path}/blobs: FileExistsError" in failed.last.error.message
    assert [span.name for span in failed.spans if span.parent_id] == ["before", "reward"]
    assert other.last.status == status.SUCCEEDED


async def test_an_agent_that_is_killed_after_its_content_leaves_a_content_and_no_span_without_one(tmp_path):
    agent = """
        import os, signal
        import millstream as ms

        def agent(task):
            ms.emit_span("look", {"image": "x" * task["bytes"]})
            os.kill(os.getpid(), signal.SIGKILL)
    """
    settings = settings_for_tests(blob_url=str(tmp_path / "blobs"))
    async with running("my_agent:agent", write_agent(tmp_path, agent), settings=settings) as rig:
        await rig.publish([{"bytes": MB}])
        (ended,) = (await rig.ends(1)).values()
    assert (ended.last.status, ended.last.error.type) == (status.FAILED, "signal")
    (span,) = ended.spans
    assert Blobs(settings.blob_url).whole(span.attributes["image"]) == "x" * MB
