"""The command line, as a user runs it."""

import json
import os
import subprocess
import sys
import time
from importlib.metadata import version

import pytest
from typer.main import get_command
from typer.testing import CliRunner

from millstream.pipeline.cli.main import COMMANDS as NAMES
from millstream.pipeline.cli.main import _family, app


def commands(group, *path):
    """The names of every command, subcommands included."""
    for name, command in group.commands.items():
        if hasattr(command, "commands"):
            yield from commands(command, *path, name)
        else:
            yield [*path, name]


COMMANDS = list(commands(get_command(app)))


def millstream(*arguments, cwd=None, **environment):
    clean = {k: v for k, v in os.environ.items() if not k.startswith("MILLSTREAM_")}
    return subprocess.run(
        [sys.executable, "-m", "millstream.pipeline", *map(str, arguments)],
        cwd=cwd,
        env=clean | {"COLUMNS": "200"} | environment,
        capture_output=True,
        text=True,
        timeout=60,
        check=False,
    )


@pytest.mark.parametrize("command", COMMANDS, ids=" ".join)
def test_every_command_has_help_with_an_example(command):
    result = CliRunner().invoke(app, [*command, "--help"])
    assert result.exit_code == 0
    assert "Example:" in result.output
    assert f"millstream {' '.join(command)}" in result.output


def test_all_families_of_commands_are_there():
    assert {" ".join(command) for command in COMMANDS} >= {
        *("runner", "adapter", "sink", "proxy", "gateway", "train", "model serve"),
        *("publish", "cancel", "pause", "resume", "workers", "lag", "topics create", "kafka up", "dead list"),
        *("rollouts", "sql", "explain rollout", "dataset text", "replay"),
        *("steps", "experiments list", "experiments show", "experiments diff"),
    }


def test_a_broken_line_publishes_nothing_and_is_named(tmp_path):
    file = tmp_path / "tasks.jsonl"
    file.write_text('{"input": 1}\n{"input": \n')
    result = millstream("publish", file, MILLSTREAM_KAFKA_BOOTSTRAP_SERVERS="127.0.0.1:1")
    assert result.returncode == 2
    assert f"{file}:2" in result.stderr
    assert "Nothing was published" in result.stderr


def test_a_broker_that_is_down_is_reported_within_ten_seconds(tmp_path):
    began = time.monotonic()
    result = millstream("adapter", cwd=tmp_path, MILLSTREAM_KAFKA_BOOTSTRAP_SERVERS="127.0.0.1:1")
    assert time.monotonic() - began < 10 + 3  # and the interpreter's start
    assert result.returncode == 1
    assert "127.0.0.1:1" in result.stderr
    assert "Traceback" not in result.stderr


def test_an_unknown_setting_is_named(tmp_path):
    result = millstream("sink", cwd=tmp_path, MILLSTREAM_CLICKHOUSE_DSM="chdb://x")
    assert result.returncode == 2
    assert "MILLSTREAM_CLICKHOUSE_DSM; did you mean MILLSTREAM_CLICKHOUSE_DSN?" in result.stderr


def test_train_names_what_is_wrong_with_its_file(tmp_path):
    (tmp_path / "train.toml").write_text('tasks = "t.jsonl"\nsteps = 3\n[grpo]\nmodel = "m"\nlr = -1\n')
    result = millstream("train", "train.toml", cwd=tmp_path)
    assert result.returncode == 2
    assert "train.toml: algorithm.grpo.lr: Input should be greater than or equal to 0" in result.stderr
    assert "steps: Extra inputs are not permitted" in result.stderr


def test_sql_and_rollouts_on_an_empty_store(tmp_path):
    dsn = {"MILLSTREAM_CLICKHOUSE_DSN": f"chdb://{tmp_path / 'store'}"}
    from millstream.consumers.sink.clickhouse import open_clickhouse_sink
    from millstream.schemas.config.settings import load_settings

    open_clickhouse_sink(load_settings(clickhouse_dsn=dsn["MILLSTREAM_CLICKHOUSE_DSN"])).close()
    assert millstream("rollouts", "--json", **dsn).stdout.strip() == "[]"
    assert millstream("sql", "--format", "csv", "SELECT 1 AS a, 'x' AS b", **dsn).stdout.split() == ['"a","b"', '1,"x"']
    wrong = millstream("sql", "SELEC 1", **dsn)
    assert wrong.returncode == 1
    assert "Traceback" not in wrong.stderr


def test_status_without_a_broker_says_how_to_start_one(tmp_path):
    result = millstream("kafka", "status", cwd=tmp_path)
    assert result.returncode == 1
    assert "millstream kafka up" in result.stderr


def test_with_json_logs_the_last_error_is_json_too(tmp_path):
    """Entry B2: everything on stderr of a role can be parsed."""
    result = millstream(
        *("adapter",), cwd=tmp_path, MILLSTREAM_KAFKA_BOOTSTRAP_SERVERS="127.0.0.1:1", MILLSTREAM_LOG_FORMAT="json"
    )
    assert result.returncode == 1
    events = [json.loads(line) for line in result.stderr.splitlines()]
    assert "127.0.0.1:1" in events[-1]["message"]
    assert events[-1]["level"] == "error"


@pytest.mark.parametrize(("name", "value"), [("LOG_LEVEL", "loud"), ("LOG_FORMAT", "xml")])
def test_a_wrong_form_of_logs_is_named(name, value, tmp_path):
    result = millstream("workers", cwd=tmp_path, **{f"MILLSTREAM_{name}": value})
    assert result.returncode == 2
    assert f"setting {name.lower()} (MILLSTREAM_{name}): Input should be" in result.stderr


def test_the_list_of_commands_says_what_their_own_help_says():
    """It is written down, so that listing and completing imports none of them."""
    for name, command in get_command(app).commands.items():
        summary = NAMES[name][1]
        assert " ".join((command.help or "").split()).startswith(summary), name
    listed = CliRunner().invoke(app, ["--help"]).output
    assert all(f" {name} " in listed for name in NAMES)


def test_every_command_of_a_family_is_in_the_list():
    families = {place for place, _ in NAMES.values() if ":" not in place}
    found = {name for family in families for name in _family(family).commands}
    assert found == {name for name, (place, _) in NAMES.items() if ":" not in place}


def test_the_version(tmp_path):
    result = millstream("--version", cwd=tmp_path)
    assert (result.returncode, result.stdout) == (0, f"millstream {version('millstream')}\n")


@pytest.mark.parametrize(("typed", "found"), [("ro", {"rollout", "rollouts"}), ("kafka ", {"up", "down", "status"})])
def test_the_shell_completes_commands(typed, found, tmp_path):
    """Entry C11."""
    words = f"millstream {typed}"
    result = millstream(
        cwd=tmp_path, _MILLSTREAM_COMPLETE="complete_bash", COMP_WORDS=words, COMP_CWORD=str(words.count(" "))
    )
    assert set(result.stdout.split()) == found


def test_listing_and_completing_commands_imports_none_of_them(tmp_path):
    """Entry C10: it has to be quick."""
    code = "import sys; from millstream.pipeline.cli.main import app; app(['--help'], standalone_mode=False); "
    code += "print([m for m in ('pydantic', 'aiokafka', 'chdb', 'torch', 'opentelemetry') if m in sys.modules])"
    done = subprocess.run([sys.executable, "-c", code], cwd=tmp_path, capture_output=True, text=True, check=True)
    assert done.stdout.endswith("[]\n")


# What takes a command's start tenths of a second, each.
HEAVY = (
    *("pydantic_settings", "fastavro", "orjson", "aiokafka", "confluent_kafka", "clickhouse_connect", "chdb", "torch"),
    *("numpy", "aiohttp", "starlette", "uvicorn", "faststream", "opentelemetry", "prometheus_client", "jinja2"),
    *("rich.progress", "rich.live", "uvloop"),
)


def imported(code, cwd, **environment):
    """The last line that ``code`` prints, as JSON, in a new process; it has `run` for a command and `heavy()`."""
    head = f"""
import contextlib, io, json, sys
from millstream.pipeline.cli.main import app
def run(*arguments):
    with contextlib.redirect_stdout(io.StringIO()), contextlib.suppress(SystemExit):
        app(list(arguments), standalone_mode=False)
def heavy():
    return [name for name in {HEAVY!r} if name in sys.modules]
"""
    done = subprocess.run(
        [sys.executable, "-c", head + code], cwd=cwd, env=os.environ | environment, capture_output=True, text=True
    )
    assert done.returncode == 0, done.stderr
    return json.loads(done.stdout.splitlines()[-1])


def test_a_command_imports_what_it_works_with_when_it_works(tmp_path):
    """Entry C10: its help, its completion and the refusal of a wrong option don't wait for clients and frameworks."""
    code = f"""
found = {{}}
for command in {COMMANDS!r}:
    before = set(heavy())
    run(*command, "--help")
    found[" ".join(command)] = [name for name in heavy() if name not in before]
print(json.dumps({{name: each for name, each in found.items() if each}}))
"""
    assert imported(code, tmp_path) == {}


@pytest.mark.parametrize(
    ("command", "needed"),
    [
        (["init", "new"], set()),
        (["config", "show", "--changed"], {"pydantic_settings"}),
        (["config", "docs", "settings"], {"pydantic_settings"}),
        (["experiments", "show", "run"], set()),
    ],
    ids=" ".join,
)
def test_a_command_that_asks_neither_log_nor_store_imports_no_client(command, needed, tmp_path):
    """Entry C10."""
    (tmp_path / "run").mkdir()
    (tmp_path / "run" / "experiment.json").write_text('{"experiment_id": "e", "seed": 1}')
    code = f"run(*{command!r}); print(json.dumps(heavy()))"
    assert set(imported(code, tmp_path)) == needed
