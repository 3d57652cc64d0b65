"""The questions of the command line, on a store that a small real run has filled."""

import asyncio
import csv
import io
import json

import factories
import pyarrow.csv
import pyarrow.parquet
import pytest
from typer.testing import CliRunner

import millstream as ms
from millstream.pipeline.cli import output
from millstream.pipeline.cli.main import app
from millstream.pipeline.cli.open import completed_id
from millstream.pipeline.training.collector import Collector
from millstream.pipeline.training.deployment import in_memory
from millstream.pipeline.training.strategy import Setup
from millstream.producers.tasks import TaskPublisher
from millstream.schemas.errors import ConfigError, StoreError


def agent(task):
    """Says the same as its like, until the second answer."""
    if task["bad"]:
        raise ValueError("three is [too] many")
    for turn, answer in enumerate(["add", task["answer"]]):
        ms.emit_span(
            "chat m",
            {
                "gen_ai.operation.name": "chat",
                "gen_ai.response.id": f"{turn}",
                "gen_ai.output.messages": answer,
                "gen_ai.usage.input_tokens": 12,
                "gen_ai.usage.output_tokens": 2,
            },
        )
    failure = {} if task["answer"] == "4" else {"error.type": "WrongSum"}
    ms.emit_span("execute_tool check", {"gen_ai.operation.name": "execute_tool", "gen_ai.tool.name": "check"} | failure)
    ms.emit_reward(1.0 if task["answer"] == "4" else -0.5)


TASKS = {
    name: factories.task(
        group_id=group, group_size=2, experiment_id="demo", input=json.dumps({"bad": bad, "answer": a})
    )
    for name, group, bad, a in [("right", "g", False, "4"), ("wrong", "g", False, "5"), ("failed", "h", True, "")]
}
RIGHT, WRONG, FAILED = (task.rollout_id for task in TASKS.values())


@pytest.fixture(scope="module")
def dsn(tmp_path_factory):
    folder = tmp_path_factory.mktemp("asked")

    async def run():
        settings = ms.load_settings()
        setup = Setup(settings=settings, agent=agent, to_triplets=ms.to_triplets, run_dir=folder)
        async with in_memory(setup) as (log, _):
            producer = log.producer()
            collector = Collector(log, settings.topics, producer)
            await collector.start()
            collector.expect([RIGHT, WRONG, FAILED])
            await TaskPublisher(producer, settings).publish(list(TASKS.values()))
            await collector.collect([RIGHT, WRONG, FAILED])
            await collector.close()
            producer.close()

    asyncio.run(run())
    dsn = f"chdb://{folder / 'store'}"
    held = ms.ClickHouseStore(ms.load_settings(clickhouse_dsn=dsn))  # else each command starts the engine again
    yield dsn
    held.close()


@pytest.fixture
def ask(dsn, monkeypatch):
    """What a command prints. Raises what it raises."""
    monkeypatch.setenv("MILLSTREAM_CLICKHOUSE_DSN", dsn)
    monkeypatch.setattr(output.out, "_width", 250)

    def run(*arguments, binary=False):
        result = CliRunner().invoke(app, [*map(str, arguments)])
        if isinstance(result.exception, Exception) and not isinstance(result.exception, SystemExit):
            raise result.exception
        assert result.exit_code == 0, result.output
        return result.stdout_bytes if binary else result.stdout

    return run


def test_rollouts(ask):
    listed = {row["rollout_id"]: row for row in json.loads(ask("rollouts", "--json"))}
    assert listed.keys() == {RIGHT, WRONG, FAILED}
    assert (listed[RIGHT]["status"], listed[RIGHT]["reward"], listed[RIGHT]["turns"]) == ("succeeded", 1.0, 2)
    assert listed[RIGHT]["duration_s"] > 0
    # Entry B8: no token ids, but the server reports their numbers.
    assert (listed[RIGHT]["prompt_tokens"], listed[RIGHT]["response_tokens"]) == (24, 4)
    table = ask("rollouts", "--status", "failed", "--experiment", "demo")
    assert FAILED in table
    assert "three is [too] many" in table
    assert RIGHT not in table
    by_reward = json.loads(ask("rollouts", "--sort", "reward", "--ascending", "--limit", 2, "--json"))
    assert [row["rollout_id"] for row in by_reward] == [WRONG, RIGHT]


def test_a_rollout_shows_its_conversation_and_the_stack_of_its_error(ask):
    """Entry C6."""
    shown = ask("rollout", WRONG)
    assert f"rollout {WRONG} · succeeded · reward -0.5" in shown
    answers = ["assistant: add", "assistant: 5", "tool check:", "reward reward: -0.5"]
    assert [shown.index(line) for line in answers] == sorted(shown.index(line) for line in answers)
    failed = ask("rollout", FAILED)
    assert "attempt 1 · failed" in failed
    assert "in agent" in failed  # the agent's line, of the stack
    assert "ValueError: three is [too] many" in failed
    (found,) = json.loads(ask("rollout", WRONG, "--json"))
    assert [line["who"] for line in found["attempts"][0]["conversation"]][:2] == ["assistant", "assistant"]


def test_a_success_shows_no_error(ask):
    """Entry C7: why a success is not trainable is not an error."""
    table = ask("rollouts", "--status", "succeeded")
    assert RIGHT in table
    assert "no token ids" not in table


@pytest.mark.parametrize(
    ("asked", "said"),
    [
        (["rollouts", "--status", "cancelled"], "the store has no rollouts with status cancelled"),
        (["rollouts", "--experiment", "demo", "--mode", "val"], "no rollouts with experiment demo, mode val"),
        (["triplets", "--trainable"], "no triplets with trainable true"),
        (["rewards", "--mode", "test"], "no rewards with mode test"),
        (["rewards", "--rollout", FAILED], f"no rewards with rollout {FAILED}"),
    ],
    ids=["rollouts", "rollouts of a mode", "triplets", "rewards", "rewards of a rollout"],
)
def test_an_empty_result_says_what_was_searched(ask, asked, said):
    """Entry B8. On stderr, with exit code 0; JSON stays JSON."""
    result = CliRunner().invoke(app, asked)
    assert result.exit_code == 0
    assert said in result.stderr
    assert json.loads(CliRunner().invoke(app, [*asked, "--json"]).stdout) == []


def test_an_unknown_experiment_is_refused_with_the_known_ones(ask):
    """Entry B8."""
    for command in ("rollouts", "triplets", "rewards"):
        with pytest.raises(ConfigError, match=r"no experiment 'nobody'; the newest are: demo"):
            ask(command, "--experiment", "nobody")


def test_reading_creates_no_folder(tmp_path, monkeypatch):
    """Entry C12."""
    monkeypatch.setenv("MILLSTREAM_CLICKHOUSE_DSN", f"chdb://{tmp_path / 'none' / 'store'}")
    for command in (
        ["rollouts"],
        ["sql", "SELECT 1"],
        ["spans", RIGHT],
        ["export", "rollouts", str(tmp_path / "a.csv")],
    ):
        result = CliRunner().invoke(app, command)
        assert isinstance(result.exception, StoreError)
        assert f"there is no store in {tmp_path / 'none' / 'store'}" in str(result.exception)
        assert "millstream sink" in str(result.exception)
    (tmp_path / "empty").mkdir()
    monkeypatch.setenv("MILLSTREAM_CLICKHOUSE_DSN", f"chdb://{tmp_path / 'empty'}")
    assert isinstance(CliRunner().invoke(app, ["rollouts"]).exception, StoreError)
    assert [path.name for path in tmp_path.rglob("*")] == ["empty"]


def test_the_tree_of_a_rollouts_spans(ask):
    tree = ask("spans", WRONG)
    assert "attempt 1 · succeeded" in tree
    assert "chat m llm · agent 0.0 ms · 12 → 2 tokens" in tree
    assert "reward -0.5" in tree
    assert "WrongSum" in tree
    assert tree.index("attempt 1") < tree.index("chat m") < tree.index("execute_tool check")
    assert "ValueError: three is [too] many" in ask("spans", FAILED)
    names = {span["name"] for span in json.loads(ask("spans", WRONG, "--json"))}
    assert {"chat m", "execute_tool check", "reward"} <= names


def test_triplets(ask):
    listed = json.loads(ask("triplets", "--rollout", WRONG, "--json"))
    assert [(t["turn"], t["response"], t["reward"]) for t in listed] == [(0, "add", None), (1, "5", -0.5)]
    assert listed[0]["prompt_token_ids"] is None
    assert "no token ids" in ask("triplets", "--untrainable", "--limit", 1)
    assert json.loads(ask("triplets", "--trainable", "--json")) == []


def test_rewards(ask):
    (version,) = json.loads(ask("rewards", "--experiment", "demo", "--json"))
    assert (version["rollouts"], version["mean"], version["p10"], version["p90"]) == (2, 0.25, -0.5, 1.0)
    assert "█" in ask("rewards")
    (single,) = json.loads(ask("rewards", "--rollout", WRONG, "--json"))
    assert (single["name"], single["value"]) == ("reward", -0.5)


def test_two_rollouts_of_a_group_diverge_at_the_second_answer(ask):
    found = json.loads(ask("diff", RIGHT, WRONG, "--json"))
    assert found["same_steps"] == 1
    assert [side["steps"][0]["text"] for side in found["rollouts"]] == ["4", "5"]
    table = ask("diff", RIGHT, WRONG)
    assert "The first 1 steps are the same" in table
    assert "WrongSum" in table
    assert "All steps are the same." in ask("diff", RIGHT, RIGHT)
    with pytest.raises(ConfigError, match=r"of group g.*of h"):
        ask("diff", RIGHT, FAILED)


def test_sql_in_every_format(ask):
    query = "SELECT rollout_id, reward FROM rollouts WHERE group_id = {group:String} ORDER BY reward"
    asked = ("sql", query, "--param", "group=g")
    expected = [{"rollout_id": WRONG, "reward": -0.5}, {"rollout_id": RIGHT, "reward": 1.0}]
    assert json.loads(ask(*asked, "--format", "json")) == json.loads(ask(*asked, "--json")) == expected
    rows = csv.DictReader(io.StringIO(ask(*asked, "--format", "csv")))
    assert [{**row, "reward": float(row["reward"])} for row in rows] == expected
    found = pyarrow.parquet.read_table(io.BytesIO(ask(*asked, "--format", "parquet", binary=True)))
    assert found.to_pylist() == expected
    assert WRONG in ask(*asked)
    with pytest.raises(StoreError, match="readonly: it takes SELECT"):
        ask("sql", "DROP TABLE tasks_raw")


def test_export(ask, tmp_path):
    ask("export", "spans", tmp_path / "spans.parquet")
    spans = pyarrow.parquet.read_table(tmp_path / "spans.parquet")
    assert spans.num_rows == json.loads(ask("sql", "SELECT count() AS n FROM spans", "--json"))[0]["n"]
    ask("export", "SELECT rollout_id FROM rollouts WHERE reward = {r:Float64}", tmp_path / "r.jsonl", "--param", "r=1")
    assert json.loads((tmp_path / "r.jsonl").read_text()) == {"rollout_id": RIGHT}
    ask("export", "rewards", tmp_path / "rewards.csv")
    assert sorted(pyarrow.csv.read_csv(tmp_path / "rewards.csv")["value"].to_pylist()) == [-0.5, 1.0]


def test_a_failed_export_leaves_the_old_file(ask, tmp_path):
    file = tmp_path / "x.csv"
    file.write_text("old")
    for source in ["nothing", "SELECT throwIf(number = 9, 'boom') FROM numbers(10)"]:
        with pytest.raises(StoreError, match=r"nothing|boom"):
            ask("export", source, file)
    assert [path.read_text() for path in tmp_path.iterdir()] == ["old"]


@pytest.mark.parametrize("command", [["spans"], ["triplets", "--rollout"], ["rewards", "--rollout"], ["diff", RIGHT]])
def test_an_unknown_rollout_is_named(ask, command):
    with pytest.raises(StoreError, match="has no rollout 'nobody': `millstream rollouts` lists"):
        ask(*command, "nobody")


def test_watching_asks_again_until_ctrl_c(ask, monkeypatch):
    waits = iter([None, KeyboardInterrupt()])

    def sleep(_seconds):
        if interrupt := next(waits):
            raise interrupt

    monkeypatch.setattr(output.time, "sleep", sleep)
    assert ask("rollouts", "--watch").count(FAILED) == 1  # not a terminal: the last table only
    assert next(waits, "asked twice") == "asked twice"
    assert CliRunner().invoke(app, ["rollouts", "--watch", "--json"]).exit_code == 2


def test_a_part_of_an_id_that_fits_one_rollout_is_enough(ask, dsn):
    """Entry B1: everywhere."""
    for part in (WRONG[-12:], WRONG[-8:], WRONG[:36]):
        assert f"rollout {WRONG} · succeeded" in ask("rollout", part)
    for command in (["spans"], ["triplets", "--rollout"], ["rewards", "--rollout"]):
        assert ask(*command, WRONG[-12:], "--json") == ask(*command, WRONG, "--json")
    assert ask("diff", RIGHT[-12:], WRONG[-12:], "--json") == ask("diff", RIGHT, WRONG, "--json")
    with pytest.raises(ConfigError, match="is part of the ids of 3 rollouts"):
        ask("rollout", RIGHT[:6])
    with pytest.raises(StoreError, match="the store has no rollout 'ffffffffffff'"):
        ask("spans", "ffffffffffff")
    with pytest.raises(StoreError, match="the store has no rollout"):
        ask("spans", WRONG[-3:])  # too short to be meant
    settings = ms.load_settings(clickhouse_dsn=dsn)
    assert completed_id(settings, WRONG[-12:]) == WRONG
    assert completed_id(settings, "my-own-id") == "my-own-id"
    with pytest.raises(ConfigError, match="ffff-ffff is not a whole id, and can't be completed"):
        completed_id(settings, "ffff-ffff")


def test_short_ids_of_a_narrow_table_are_taken(ask, monkeypatch):
    monkeypatch.setattr(output.out, "_width", 80)
    monkeypatch.setattr(output.out, "_force_terminal", True)
    table = ask("rollouts")
    assert max(map(len, table.splitlines())) <= 80
    assert WRONG[-12:] in table
    assert WRONG not in table
