"""Commands on the control topic, and what they show of the log."""

import asyncio
import json

import factories
import pytest
from typer.testing import CliRunner

import millstream as ms
from millstream.consumers.control import find_experiment
from millstream.consumers.log.memory_log import MemoryLog
from millstream.pipeline.cli.main import app
from millstream.pipeline.cli.questions.workers import waits
from millstream.producers.control import publish_control
from millstream.producers.log.acks import send_acknowledged
from millstream.schemas.wire.records import Control, Triplet


@pytest.fixture
def log(monkeypatch):
    log = MemoryLog(ms.load_settings().topics)
    monkeypatch.setattr("millstream.consumers.log.kafka_log.KafkaLog", lambda settings: log)
    return log


def run(*words):
    result = CliRunner().invoke(app, list(words))
    assert result.exit_code == 0, result.output
    return result


def send(log, topic, *records):
    async def work():
        producer = log.producer()
        for record in records:
            await send_acknowledged(producer, topic, record, key="k")

    asyncio.run(work())


def test_what_is_paused_is_listed_until_it_is_resumed(log):
    """Entry C2."""
    assert "no experiment is paused" in run("paused").stderr
    assert "experiment a is paused" in run("pause", "a").stdout
    run("pause", "b")
    assert "experiment b is not paused" in run("resume", "b").stdout
    assert [row["experiment"] for row in json.loads(run("paused", "--json").stdout)] == ["a"]


def test_a_cancel_says_what_it_does(log):
    """Entry C2."""
    assert "rollout xyz is cancelled: what is queued, running or published later" in run("cancel", "xyz").stdout
    assert "group g is cancelled" in run("cancel", "--group", "g").stdout


def test_an_experiment_may_be_named_by_its_run(log):
    """Entry C2: as in the commands that read."""
    body = json.dumps({"run": "calculator"})
    records = [Control(kind="experiment", name=f"id-{n}", body=body, created_at=n) for n in (1, 2)]
    send(log, ms.load_settings().topics.control, *records)
    assert "experiment id-2 (run calculator) is paused" in run("pause", "calculator").stdout
    assert [row["experiment"] for row in json.loads(run("paused", "--json").stdout)] == ["id-2"]
    assert "experiment id-2 (run calculator) is not paused" in run("resume", "calculator").stdout
    assert "no experiment is paused" in run("paused").stderr
    assert "experiment id-2 (run calculator) is cancelled" in run("cancel", "--experiment", "calculator").stdout
    assert "group calculator is cancelled" in run("cancel", "--group", "calculator").stdout


def test_lag_says_why_tasks_wait(log):
    """Entry C2."""
    send(log, ms.load_settings().topics.tasks("normal"), factories.task())
    run("pause", "a")
    shown = run("lag").stdout
    assert "experiment a is paused" in shown
    assert "no runner is alive: start one with `millstream runner" in shown


@pytest.mark.parametrize(
    ("state", "said"),
    [
        ((0, 8, 8, ["a"]), []),
        ((3, 8, 8, []), ["all 8 slots are in use"]),
        ((3, 8, 2, []), []),
        ((3, 0, 0, []), ["no runner"]),
    ],
)
def test_the_reasons_for_waiting(state, said):
    found = waits(*state)
    assert len(found) == len(said)
    assert all(text in reason for text, reason in zip(said, found, strict=True))


def triplet(**fields):
    given = {"rollout_id": "r", "attempt_id": "a", "group_id": "g", "turn": 0, "span_id": "s"}
    return Triplet(**given | {"prompt": "[]", "response": "{}"} | fields)


@pytest.mark.parametrize("kind", ["messages", "preferences", "text"])
def test_a_data_set_without_examples_says_why_and_what_to_do(log, kind):
    """Entry B8."""
    topic = ms.load_settings().topics.triplets
    assert "no triplets of mode train, of any experiment" in run("dataset", kind).stderr
    send(log, topic, triplet(trainable=False, reason="no token ids or no logprobs", experiment_id="e"))
    result = run("dataset", kind)
    assert "none of the 1 calls" in result.stderr
    assert "require_tokens = false" in result.stderr
    assert result.stdout == ""
    assert "no triplets of experiment other, mode train" in run("dataset", kind, "--experiment", "other").stderr


@pytest.mark.parametrize(("options", "arguments"), [([], '{"a":3}'), (["--object-arguments"], {"a": 3})])
def test_arguments_of_tool_calls_are_text_or_objects(log, options, arguments):
    asks = {"role": "assistant", "tool_calls": [{"id": "1", "function": {"name": "add", "arguments": '{"a":3}'}}]}
    send(log, ms.load_settings().topics.triplets, triplet(response=json.dumps(asks)))
    (line,) = run("dataset", "messages", *options).stdout.splitlines()
    assert json.loads(line)["messages"][-1]["tool_calls"][0]["function"] == {"name": "add", "arguments": arguments}


async def test_an_experiment_is_found_by_the_name_of_its_run():
    """Entry B8."""
    topics = ms.load_settings().topics
    log = MemoryLog(topics)
    producer = log.producer()
    for number in (1, 3, 2):
        body = json.dumps({"run": "calculator"})
        await publish_control(
            producer, topics, Control(kind="experiment", name=f"id-{number}", body=body, created_at=number)
        )
    assert await find_experiment(log, topics, "calculator") == "id-3"
    assert await find_experiment(log, topics, "id-1") == "id-1"
