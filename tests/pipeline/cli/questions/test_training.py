"""`millstream steps` and `millstream experiments`."""

import json
import math
import uuid
from dataclasses import replace

import pytest
from typer.testing import CliRunner

from millstream.consumers.sink.clickhouse_writer import ClickHouseWriter
from millstream.consumers.sink.rows import to_rows
from millstream.pipeline.cli import output
from millstream.pipeline.cli.main import app
from millstream.pipeline.training.reporting.record import flat
from millstream.schemas.config.settings import load_settings
from millstream.schemas.errors import ConfigError, StoreError
from millstream.schemas.wire.log import LogRecord, Partition
from millstream.schemas.wire.records import Control, TrainingStep

T0 = 1_800_000_000_000_000_000
SECOND = 10**9


def step(number, epoch=0, experiment="e2", **fields):
    values = {"run": "calc", "wait_s": 0.8, "update_s": 0.2, "rollouts": 16, "groups": 2}
    values |= {"reward_mean": number / 4, "reward_std": 0.1, "metrics": {"kl": number / 100, "odd": math.nan}}
    values |= {"started_at": T0 + number * SECOND, "ended_at": T0 + (number + 1) * SECOND + epoch}
    return TrainingStep(experiment_id=experiment, step=number, epoch=epoch, **values | fields)


BODY = {
    "run": "calc",
    "algorithm": "PolicyGradient",
    "seed": 3,
    "millstream": "0.1.0",
    "arguments": {"learner": {"type": "GRPO", "lr": 0.001}},
    "model": {"model.safetensors": "aa"},
}
BODIES = {
    "e1": BODY,
    "e2": BODY | {"seed": 4, "arguments": {"learner": {"type": "GRPO", "lr": 0.002}}, "git": {"commit": "c[0]ffee"}},
    "e3": BODY | {"run": "bare"},
}
RECORDS = [
    *(
        Control(kind="experiment", name=name, experiment_id=name, body=json.dumps(body), created_at=T0 + at)
        for at, (name, body) in enumerate(BODIES.items())
    ),
    Control(kind="experiment", name="broken", body="{", created_at=T0 - 1),
    step(1, experiment="e1", reward_mean=None, reward_std=None, ended_at=T0),
    step(1, validation_reward=0.5),
    step(2),
    step(3, dropped={"too_old": 2, "[odd]": 1}, staleness_mean=1.5, staleness_max=4),
    step(3, 1, restored_from="step-00000002: KL of 3.2 [high]", failed=5),
]


@pytest.fixture(scope="module")
def dsn(folder):
    settings = load_settings(clickhouse_dsn=f"chdb://{folder}", clickhouse_database=f"d{uuid.uuid4().hex}")
    writer = ClickHouseWriter(settings)
    writer.migrate()
    logged = [LogRecord(Partition("millstream.training", 0), at, 1, None, value) for at, value in enumerate(RECORDS)]
    tables, unusable = to_rows(logged, "millstream.events")
    assert not unusable
    for rows in tables:
        rows.insert(writer, uuid.uuid4().hex)
    yield settings
    writer.close()


@pytest.fixture
def ask(dsn, monkeypatch):
    monkeypatch.setenv("MILLSTREAM_CLICKHOUSE_DSN", dsn.clickhouse_dsn)
    monkeypatch.setenv("MILLSTREAM_CLICKHOUSE_DATABASE", dsn.clickhouse_database)
    monkeypatch.setattr(output.out, "_width", 250)

    def run(*arguments):
        result = CliRunner().invoke(app, [*map(str, arguments)])
        if isinstance(result.exception, Exception) and not isinstance(result.exception, SystemExit):
            raise result.exception
        assert result.exit_code == 0, result.output
        return result.stdout

    return run


def test_steps_of_the_run_that_was_trained_last(ask):
    table = ask("steps")
    assert "run calc, experiment e2" in table
    lines = table.splitlines()[2:]
    assert [line.split()[0] for line in lines] == ["1", "2", "3", "3"]
    assert "abandoned" in lines[2]
    assert "2 too_old, 1 [odd]" in lines[2]
    assert "1.5 ≤ 4" in lines[2]
    assert "from step-00000002: KL of 3.2 [high]" in lines[3]
    assert "80%" in lines[0]
    assert lines[0].count("█") < lines[1].count("█") < lines[2].count("█")


def test_steps_as_json_have_all_that_is_recorded(ask):
    found = json.loads(ask("steps", "e2", "--json"))
    assert [(row["epoch"], row["step"], row["abandoned"]) for row in found] == [
        *((0, 1, False), (0, 2, False), (0, 3, True), (1, 3, False))
    ]
    assert found[0]["metrics"] == {"kl": 0.01, "odd": "NaN"}
    assert (found[0]["started_at"], found[0]["idle_share"]) == (T0 + SECOND, 0.8)
    assert [row["step"] for row in json.loads(ask("steps", "--limit", 2, "--json"))] == [3, 3]


def test_any_number_of_a_step_can_be_plotted(ask):
    assert "kl" in ask("steps", "--plot", "kl").splitlines()[1]
    assert "█" in ask("steps", "--plot", "idle_share")
    assert "█" not in ask("steps", "--plot", "odd")  # NaN
    with pytest.raises(ConfigError, match="no step has a number 'loss'; their metrics are: kl, odd"):
        ask("steps", "--plot", "loss")


def test_a_run_is_named_by_its_id_or_its_name(ask):
    assert "experiment e1" in ask("steps", "e1")
    assert "experiment e2" in ask("steps", "calc")
    with pytest.raises(ConfigError, match="no experiment 'nobody'"):
        ask("steps", "nobody")


def test_a_run_without_steps_says_so(ask):
    result = CliRunner().invoke(app, ["steps", "e3"])
    assert (result.exit_code, result.stdout) == (0, "")
    assert "the store has no steps of experiment e3" in result.stderr
    assert json.loads(CliRunner().invoke(app, ["steps", "e3", "--json"]).stdout) == []


def test_watching_steps(ask, monkeypatch):
    waits = iter([None, KeyboardInterrupt()])

    def sleep(_seconds):
        if interrupt := next(waits):
            raise interrupt

    monkeypatch.setattr(output.time, "sleep", sleep)
    assert "experiment e2" in ask("steps", "--watch")
    assert next(waits, "asked twice") == "asked twice"
    assert CliRunner().invoke(app, ["steps", "--watch", "--json"]).exit_code == 2


def test_experiments_are_listed_with_what_became_of_them(ask):
    found = json.loads(ask("experiments", "list", "--json"))
    assert [row["experiment_id"] for row in found] == ["e3", "e2", "e1", "broken"]
    row = found[1]
    assert (row["run"], row["algorithm"], row["seed"], row["version"]) == ("calc", "PolicyGradient", 4, "0.1.0")
    assert (row["steps"], row["epochs"], row["reward"], row["validation_reward"]) == (3, 2, 0.75, 0.5)
    assert row["seconds"] == pytest.approx(4.0)
    table = ask("experiments", "list", "--limit", 2)
    assert "e2" in table
    assert "e1 " not in table


def test_an_experiment_shows_what_it_was_started_with(ask):
    shown = ask("experiments", "show", "calc")
    assert "experiment e2" in shown
    for name, value in [("arguments.learner.lr", "0.002"), ("git.commit", "c[0]ffee"), ("seed", "4")]:
        (line,) = [line for line in shown.splitlines() if name in line]
        assert value in line
    assert json.loads(ask("experiments", "show", "e1", "--json")) == {"experiment_id": "e1", **BODY}


def test_two_experiments_differ_in_these_values(ask):
    expected = [("seed", 3, 4), ("arguments.learner.lr", 0.001, 0.002), ("git.commit", None, "c[0]ffee")]
    found = json.loads(ask("experiments", "diff", "e1", "e2", "--json"))
    assert [(row["name"], row["a"], row["b"]) for row in found] == expected
    table = ask("experiments", "diff", "e1", "e2")
    assert "c[0]ffee" in table
    assert "model.safetensors" not in table
    assert "They were started with the same values." in ask("experiments", "diff", "e1", "e1")


def test_an_experiment_that_cannot_be_read_is_named(ask):
    with pytest.raises(StoreError, match="the record of experiment broken can't be read"):
        ask("experiments", "show", "broken")


def test_nested_values_have_paths():
    assert dict(flat({"a": {"b": 1, "c": {}}, "d": [1, {"e": 2}]})) == {"a.b": 1, "a.c": {}, "d": [1, {"e": 2}]}


def test_a_hostile_step_is_shown(dsn, ask):
    """Numbers that JSON lacks, and text that could control a terminal."""
    writer = ClickHouseWriter(dsn)
    odd = dict.fromkeys(("reward_mean", "reward_std", "validation_reward", "wait_s", "staleness_mean"), math.nan)
    hostile = step(1, experiment="odd", run="\x1b[31m", restored_from="[/bold]\x1b]0;", dropped={"\x07[x]": -1}, **odd)
    hostile = replace(hostile, metrics={"[red]": math.inf, "": -math.inf}, staleness_max=2**31 - 1, ended_at=0)
    record = LogRecord(Partition("millstream.training", 0), 99, 1, None, hostile)
    experiment = Control(kind="experiment", name="odd", body='["\\u001b"]', created_at=0)
    for rows in to_rows([record, replace(record, value=experiment)], "millstream.events")[0]:
        rows.insert(writer, uuid.uuid4().hex)
    writer.close()
    for plot in ("reward_mean", "[red]", "wait_s", "run"):
        shown = ask("steps", "odd", "--plot", plot)
        assert "\x1b" not in shown
        assert "\x07" not in shown
        assert "\\x1b" in shown
    assert json.loads(ask("steps", "odd", "--json"))[0]["reward_mean"] == "NaN"
    assert "\x1b" not in ask("experiments", "show", "odd")
