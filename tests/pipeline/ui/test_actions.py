"""What the pages change, as the log holds it afterwards."""

import pytest
from starlette.testclient import TestClient

from millstream.consumers.dead_letters import dead_letter
from millstream.consumers.log.read_to_end import read_to_end
from millstream.pipeline.ui.app import ui_app
from millstream.pipeline.ui.source import Source
from millstream.producers.log.acks import send_acknowledged
from millstream.schemas.wire import codec
from millstream.schemas.wire.log import LogRecord, Partition
from millstream.schemas.wire.records import Control, RolloutTask
from tests.pipeline.ui.rig import World

HERE = {"Origin": "http://127.0.0.1:8700"}


async def controls(world: World) -> list[tuple[str, str, str]]:
    records = [record async for record in read_to_end(world.log, [Partition(world.settings.topics.control, 0)])]
    found = [codec.decode_as(Control, record.value) for record in records]
    return [(control.kind, control.name, control.body) for control in found]


@pytest.mark.parametrize(
    ("path", "form", "record", "then"),
    [
        ("/cancel", {"rollout": "a/b"}, ("cancel", "rollout:a/b"), "/rollouts/a%2Fb"),
        ("/cancel", {"group": "g"}, ("cancel", "group:g"), "/groups/g"),
        ("/cancel", {"experiment": "e"}, ("cancel", "experiment:e"), "/experiments/e"),
        ("/pause", {"experiment": "p"}, ("pause", "p"), "/experiments/p"),
        ("/resume", {"experiment": "q"}, ("pause", "q"), "/experiments/q"),
    ],
)
async def test_a_button_writes_the_record_of_the_command(browser, world, path, form, record, then):
    answer = browser.post(path, data=form, headers=HERE)
    assert (answer.status_code, answer.headers["location"]) == (303, then)
    found = await controls(world)
    assert record in [control[:2] for control in found]
    assert ("pause", "p", "false") not in found


@pytest.mark.parametrize("path", ["/cancel", "/pause"])
def test_an_action_names_its_object(browser: TestClient, path: str) -> None:
    assert browser.post(path, data={"runner": "r"}, headers=HERE).status_code == 422
    assert browser.post(path, data={"rollout": "x" * 100_000}, headers=HERE).status_code == 413


async def test_a_dead_letter_is_shown_and_replayed(browser: TestClient, world: World) -> None:
    topics = world.settings.topics
    place = Partition(topics.tasks("normal"), 0)
    failed = world.tasks["failed"]
    refused = LogRecord(place, 7, 1, None, codec.encode(failed))
    letter = dead_letter(refused, "adapter", "attempts_exhausted", "ValueError")
    offset = await send_acknowledged(world.log.producer(), topics.dead, letter, key="k")
    (record,) = [
        r async for r in read_to_end(world.log, [Partition(topics.dead, n) for n in range(topics.dead_partitions)])
    ]
    where = f"{record.partition.number}:{offset}"
    shown = browser.get(f"/dead/{where}").text
    assert failed.rollout_id in shown
    done = browser.post("/dead/replay", data={"place": where}, headers=HERE)
    assert (done.status_code, "is run again as" in done.text) == (200, True)
    tasks = [Partition(topics.tasks(p), n) for p in ("high", "normal", "low") for n in range(topics.partitions)]
    again = [codec.decode_as(RolloutTask, r.value) async for r in read_to_end(world.log, tasks)]
    assert [task.metadata["replay_of"] for task in again] == [failed.rollout_id]
    assert browser.get("/dead/0:999").status_code == 422


def test_without_a_log_the_pages_show_the_store_and_offer_no_actions(world: World) -> None:
    source = Source(world.settings)
    with TestClient(ui_app(source), base_url="http://127.0.0.1:8700") as client:
        shown = client.get(f"/rollouts/{world.id('running')}").text
        assert "first step" in shown
        assert "<form" not in shown.split("<main")[1]
        assert "Rollouts a second" in client.get("/").text
        refused = client.post("/cancel", data={"rollout": "r"}, headers=HERE)
        assert (refused.status_code, "Kafka" in refused.text) == (503, True)
    source.close()


def test_without_a_store_the_pages_say_why_and_go_on(world: World) -> None:
    source = Source(world.settings, world.log, no_store="the store is elsewhere")
    with TestClient(ui_app(source), base_url="http://127.0.0.1:8700") as client:
        overview = client.get("/")
        assert (overview.status_code, "the store is elsewhere" in overview.text) == (200, True)
        assert "Waiting" in overview.text
        listed = client.get("/rollouts")
        assert (listed.status_code, "the store is elsewhere" in listed.text) == (503, True)
