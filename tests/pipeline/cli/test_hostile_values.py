"""Every option of every command, given values that it can't use: a clear error, never a traceback."""

import asyncio
import os
import signal
import sys

import pytest
from typer.main import get_command

from millstream.consumers.log.memory_log import MemoryLog
from millstream.pipeline.cli import main
from millstream.schemas.config.settings import load_settings

NUMBERS = ["x", "", "-1", "0", "70000", "1e3", str(1 << 63), "9" * 30, "nan", "inf", "-inf", "1e400", "٣"]
TEXTS = ["", "x", ":", "a:b", "os:nope", "0:0", "-1:-1", "x=y", "=", "ü", "[red]", "%s", "x" * 5000, "\udcff", "\x01"]
PATHS = ["missing", ".", "empty", "binary", "utf16", "file", "file/child", "/proc/x", "x" * 300, "", "\udcff", "[red]"]

BENIGN = {  # values of required arguments, by name
    "agent": "ok_agent:agent",
    "file": "tasks.jsonl",
    "folder": "model",
    "config": "train.toml",
    "query": "SELECT 1",
    "source": "rollouts",
    "places": "0:0",
    "place": "0:0",
    "shares": "p.0.1=1",
    "version": "p.0.1",
    "to": "other.topic",
}


class StoppedLog(MemoryLog):
    """The log of a role that is told to stop once it has begun."""

    def __init__(self, settings, *args, **kwargs):
        super().__init__(settings.topics)

    async def check(self):
        asyncio.get_running_loop().call_later(0.05, os.kill, os.getpid(), signal.SIGTERM)


def commands(group, *path):
    for name, command in group.commands.items():
        if hasattr(command, "commands"):
            yield from commands(command, *path, name)
        else:
            yield (*path, name), command


def hostile(parameter):
    annotation = str(parameter.type_descriptor.annotation)
    if "bool" in annotation:
        return []
    if "Path" in annotation:
        return PATHS
    return NUMBERS if "int" in annotation or "float" in annotation else TEXTS


def calls():
    for path, command in commands(get_command(main.app)):
        required = [p for p in command.params if p.param_type_name == "argument" and p.required]
        options = [p for p in command.params if p.param_type_name == "option" and p.required]
        for parameter in command.params:
            for value in hostile(parameter):
                words = [*path]
                for option in options:
                    if option is not parameter:
                        words += [option.opts[-1], BENIGN.get(option.name, "x")]
                if parameter.param_type_name == "option":
                    words.append(f"{parameter.opts[-1]}={value}")
                words.append("--")
                words += [value if p is parameter else BENIGN.get(p.name, "x") for p in required]
                if parameter.param_type_name == "argument" and parameter not in required:
                    words.append(value)
                yield " ".join(path), parameter.name, value, words


CALLS = list(calls())


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    folder = tmp_path_factory.mktemp("hostile")
    (folder / "empty").touch()
    (folder / "binary").write_bytes(bytes(range(256)) * 4)
    (folder / "utf16").write_text('{"input": 1}\n', "utf-16")
    (folder / "file").write_text("no JSON, no TOML\n")
    (folder / "tasks.jsonl").write_text('{"input": 1}\n')
    (folder / "train.toml").write_text('tasks = "tasks.jsonl"\n')
    (folder / "ok_agent.py").write_text("def agent(task):\n    return 1.0\n")
    (folder / "model").mkdir()
    return folder


@pytest.fixture(scope="module")
def store(folder):
    from millstream.consumers.sink.clickhouse import open_clickhouse_sink

    dsn = f"chdb://{folder / 'store'}"
    sink = open_clickhouse_sink(load_settings(clickhouse_dsn=dsn))  # held, else each command starts the engine again
    yield dsn
    sink.close()


@pytest.fixture
def run(folder, store, monkeypatch, capsys):
    monkeypatch.chdir(folder)
    for name in ("JAVA_HOME", "OPENAI_BASE_URL", "OPENAI_API_KEY", "ANTHROPIC_BASE_URL", "ANTHROPIC_API_KEY"):
        monkeypatch.setenv(name, "")
    monkeypatch.setenv("PATH", "")  # no Java: no broker is started
    monkeypatch.setenv("MILLSTREAM_CLICKHOUSE_DSN", store)
    monkeypatch.setenv("MILLSTREAM_RUNNER_PROCESSES", "0")
    monkeypatch.setattr("millstream.consumers.log.kafka_log.KafkaLog", StoppedLog)

    def run(words):
        monkeypatch.setattr(sys, "argv", ["millstream", *words])
        handler = signal.getsignal(signal.SIGTERM)
        signal.signal(signal.SIGTERM, signal.default_int_handler)  # a command that waits ends as by Ctrl-C
        try:
            main.main()
            code = 0
        except SystemExit as ended:
            code = ended.code or 0
        finally:
            signal.signal(signal.SIGTERM, handler)
        return code, *capsys.readouterr()

    return run


QUICK = {"x", "-1", "70000", "1e400", "missing", "binary", "file/child", "/proc/x", "a:b", "\udcff"}


@pytest.mark.parametrize("command", sorted({command for command, _, _, _ in CALLS}))
def test_no_value_of_an_option_ends_a_command_in_a_traceback(run, command):
    """Entry C1, with the most telling values."""
    check(run, [words for c, _, value, words in CALLS if c == command and value in QUICK])


@pytest.mark.slow
@pytest.mark.parametrize("command", sorted({command for command, _, _, _ in CALLS}))
def test_no_value_at_all_ends_a_command_in_a_traceback(run, command):
    """Entry C1, for each option and each value that its type can be given."""
    check(run, [words for c, _, value, words in CALLS if c == command and value not in QUICK])


def check(run, calls):
    assert calls
    for words in calls:
        code, out, err = run(words)
        assert "Traceback" not in out + err, words
        assert code in (0, 1, 2, 130), words
        assert code in (0, 130) or err.strip(), words


@pytest.mark.parametrize(
    ("words", "said"),
    [
        (["publish", "tasks.jsonl", "--priority", "urgent"], ["--priority", "urgent", "high", "low"]),
        (["publish", "missing"], ["missing"]),
        (["publish", "."], ["directory"]),
        (["publish", "utf16"], ["utf16", "UTF-8"]),
        (["publish", "tasks.jsonl", "--group-size", "0"], ["--group-size", "greater than or equal to 1"]),
        (["kafka", "up", "--data-dir", "/proc/x"], ["--data-dir", "/proc/x"]),
        (["kafka", "up", "--data-dir", "file"], ["--data-dir", "file"]),
        (["kafka", "up", "--port", "70000"], ["--port", "65535"]),
        (["gateway", "--port", "-1"], ["--port", "0"]),
        (["runner", "ok_agent:agent", "--processes", "70000"], ["runner_processes", "1000"]),
        (["train", "binary"], ["binary", "TOML"]),
        (["train", "missing"], ["missing"]),
        (["rollouts", "--status", "broken"], ["--status", "queued", "cancelled"]),
        (["rollouts", "--mode", "foo"], ["--mode", "train", "test"]),
        (["dataset", "text", "--mode", "foo"], ["--mode", "train", "test"]),
        (["rollouts", "--experiment", "nobody"], ["no experiment 'nobody'", "none"]),
        (["publish", "empty"], ["empty holds no tasks"]),
        (["rollouts", "--limit", "0"], ["--limit", "1"]),
        (["export", "rollouts", "nowhere/a.csv"], ["nowhere/a.csv"]),
    ],
    ids=" ".join,
)
def test_a_bad_value_is_named_with_what_is_permitted_and_exit_code_2(run, words, said):
    code, _, err = run(words)
    assert code == 2, err
    shown = " ".join(err.replace("│", " ").split())
    assert not [part for part in said if part not in shown], shown
