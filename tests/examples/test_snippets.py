"""The snippets of README and docs work as printed.

Each document has a folder of its own, with what its text says the reader has: a model at ``path/to/model``, a store at
``runs/store`` with a recorded run. Its Python blocks run in one process, in order; then come the others: SQL is asked
of that store, TOML is read as settings or as a training file, shell lines are checked against the real commands, and
those that only read are run. ``<!-- not run: REASON -->`` in the line above a block leaves it out.
"""

import ast
import asyncio
import contextlib
import importlib.util
import inspect
import json
import os
import re
import shlex
import subprocess
import sys
import tomllib
import traceback
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from types import CodeType
from typing import Any

import pytest

ROOT = Path(__file__).parents[2]
DOCUMENTS = [
    ROOT / "README.md",
    ROOT / "CONTRIBUTING.md",
    *sorted(page for page in ROOT.glob("docs/*.md") if page.name != "your-agent.md"),  # tests/kafka/test_your_agent.py
    *sorted(ROOT.glob("examples/*/README.md")),
]
BLOCK = re.compile(r"^(<!-- not run: [^\n]+ -->\n+)?```(\w*)\n(.*?)^```$", re.DOTALL | re.MULTILINE)
READING = {"sql", "rollouts", "triplets", "rewards"}  # commands that only read the store
PROGRAMS = {"echo", "ls", "source", "sqlite3"}  # not ours: not looked at
OPERATORS = {"&", "&&", "|", "||", ";"}
OUTPUT = "output-of-a-command-in-32-bytes-or-more"

RECORD = """
import torch, millstream as ms

def agent(task):
    ms.emit_span("execute_tool add", {"gen_ai.operation.name": "execute_tool", "gen_ai.tool.name": "add"})
    return 1.0

class NoLearner:
    model = None
    update = weights = lambda *_: {}
    state = lambda *_: {"weights": {"w": torch.zeros(1)}}

algorithm = ms.PolicyGradient(NoLearner(), groups_per_step=2, group_size=2)

ms.Trainer(agent=agent, algorithm=algorithm, max_steps=1, run_dir="runs").fit([{"question": "what?"}] * 2)
"""


@dataclass(frozen=True)
class Block:
    line: int
    language: str
    text: str


def blocks(document: Path) -> list[Block]:
    text = document.read_text("utf-8")
    return [
        Block(text.count("\n", 0, match.start(3)), match[2], match[3]) for match in BLOCK.finditer(text) if not match[1]
    ]


def python(folder: Path, *arguments: str | Path, **variables: str) -> str:
    """Its standard output."""
    env = {name: value for name, value in os.environ.items() if not name.startswith(("MILLSTREAM_", "OPENAI_"))}
    env |= {"PYTHONPATH": str(ROOT), **variables}
    done = subprocess.run(
        [sys.executable, *arguments], cwd=folder, env=env, capture_output=True, text=True, check=False
    )
    assert done.returncode == 0, f"{done.stdout[-3000:]}\n{done.stderr[-5000:]}"
    return done.stdout


def sql(folder: Path, query: str, **variables: str) -> list[dict[str, Any]]:
    found: list[dict[str, Any]] = json.loads(
        python(folder, "-m", "millstream.pipeline", "sql", "--json", query, **variables)
    )
    return found


@pytest.mark.torch
@pytest.mark.parametrize("document", DOCUMENTS, ids=lambda path: str(path.relative_to(ROOT)))
def test_snippets_work_as_printed(document: Path, tmp_path: Path) -> None:
    found = blocks(document)
    if any("path/to/model" in block.text for block in found):
        create_model(tmp_path / "path" / "to" / "model")
    if any(block.language == "sql" or "ms.load_settings()" in block.text for block in found):
        (tmp_path / "record.py").write_text(RECORD)
        python(tmp_path, "record.py")
    if any(block.language == "python" for block in found):
        python(tmp_path, __file__, document)
        assert_that_rollouts_succeeded(tmp_path)
    for block in found:
        try:
            CHECKS[block.language](block.text, tmp_path)
        except (Exception, SystemExit) as error:
            pytest.fail(f"{document.relative_to(ROOT)}:{block.line}: {error!r}")


def test_inline_commands_exist() -> None:
    found = [
        text.replace("\\|", " | ").split()
        for document in DOCUMENTS
        for text in re.findall(r"`millstream ([a-z][^`]*)`", document.read_text("utf-8"))
    ]
    assert len(found) > 30
    for words in found:
        check_inline_command(words)


def create_model(folder: Path) -> None:
    """With a context so short that random answers are."""
    from examples.calculator import model

    model.create(folder)
    config = json.loads((folder / "config.json").read_text())
    (folder / "config.json").write_text(json.dumps(config | {"max_position_embeddings": 64}))


def assert_that_rollouts_succeeded(folder: Path) -> None:
    """Of a training that the Python blocks have run: its agent's exceptions do not end it."""
    if (folder / "runs" / "default" / "store").exists():
        store = {"MILLSTREAM_CLICKHOUSE_DSN": "chdb://runs/default/store"}
        statuses = sql(folder, "SELECT status, count() AS n FROM rollouts GROUP BY status", **store)
        assert [row["status"] for row in statuses] == ["succeeded"], statuses
        (row,) = sql(folder, "SELECT countIf(trainable) AS trainable FROM triplets", **store)
        assert row["trainable"] > 0


def check_sql(text: str, folder: Path) -> None:
    assert sql(folder, text), "the query finds nothing in the recorded run"


def check_toml(text: str, folder: Path) -> None:
    from millstream.pipeline.training.config import TABLE, TrainConfig, load_stages

    names = tomllib.loads(text).keys()
    file = folder / "block.toml"
    file.write_text(text)
    if names <= {*TrainConfig.model_fields.keys(), TABLE}:
        load_stages(file)
    else:
        code = "from millstream.schemas.config.settings import load_settings; load_settings()"
        python(folder, "-c", code, MILLSTREAM_CONFIG=str(file))


def check_shell(text: str, folder: Path) -> None:
    variables: dict[str, str] = {}
    lines = text.replace("\\\n", " ").splitlines()
    if any(line.startswith("$ ") for line in lines):
        lines = [line[2:] for line in lines if line.startswith("$ ")]
    for line in lines:
        for command in commands_of(line):
            check_command(command, folder, variables)
    if variables:
        code = "from millstream.schemas.config.settings import load_settings; load_settings()"
        python(folder, "-c", code, **variables)


def commands_of(line: str) -> Iterator[list[str]]:
    """The simple commands of a line, without redirections."""
    lexer = shlex.shlex(re.sub(r"\$\(.*?\)", OUTPUT, line), posix=True, punctuation_chars="&|;>")
    lexer.whitespace_split = True
    words: list[str] = []
    tokens = iter(lexer)
    for token in tokens:
        if token == ">":
            next(tokens)
        elif token in OPERATORS:
            yield words
            words = []
        else:
            words.append(token)
    if words:
        yield words


def check_command(words: list[str], folder: Path, variables: dict[str, str]) -> None:
    program, *arguments = words
    if re.match(r"\w+=", program):
        check_command(["export", program], folder, variables)
        if arguments:
            check_command(arguments, folder, variables)
    elif program == "export":
        variables.update(assigned.split("=", 1) for assigned in arguments)
    elif program == "millstream":
        name = parse_millstream(arguments, folder)
        if name in READING and "…" not in " ".join(arguments):
            python(folder, "-m", "millstream.pipeline", *arguments, **variables)
    elif program == "make":
        targets = set(re.findall(r"^([\w-]+):", (ROOT / "Makefile").read_text(), re.MULTILINE))
        missing = {name for name in arguments if "=" not in name} - targets
        assert not missing, f"no such targets: {missing}"
    elif program.endswith("python") and arguments[0] == "-m":
        assert importlib.util.find_spec(arguments[1]), f"no module {arguments[1]}"
        options = {word for word in arguments if word.startswith("--")}
        known = python(ROOT, "-m", arguments[1], "--help") if options else ""
        assert all(option in known for option in options), f"{arguments[1]} has not all of {options}"
    elif program == "pip":
        extras = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]["optional-dependencies"]
        named = re.search(r"\[(.*)\]", " ".join(arguments))
        assert named is None or set(named[1].split(",")) <= extras.keys(), arguments
    else:
        assert program in PROGRAMS or (ROOT / program).is_file(), f"unknown program {program}"


def parse_millstream(arguments: list[str], folder: Path) -> str:
    """Has the real command line parse the arguments in a folder in which the named files exist; returns the command's
    name. Raises its errors."""
    command, rest = millstream(), list(arguments)
    name = rest[0]
    while hasattr(command, "commands"):
        command = command.commands[rest.pop(0)]
    with contextlib.chdir(folder):
        for word in rest:
            if word.endswith((".jsonl", ".toml")):
                Path(word).touch()
        command.make_context(name, rest)
    return name


def check_inline_command(words: list[str]) -> None:
    """Of a text such as ``kafka up | down`` or ``cancel ROLLOUT | --group G``: commands and options exist."""
    found = [millstream()]
    rest = list(words)
    while rest and all(hasattr(command, "commands") for command in found):
        names = [rest.pop(0)]
        while len(rest) > 1 and rest[0] == "|":
            names.append(rest[1])
            rest = rest[2:]
        assert set(names) <= found[0].commands.keys(), f"`millstream {' '.join(words)}`: no such command"
        found = [found[0].commands[name] for name in names]
    known = {option for command in found for parameter in command.params for option in parameter.opts}
    known |= {option for command in found for parameter in command.params for option in parameter.secondary_opts}
    options = {word for word in rest if word.startswith("--")} - {"--help"}
    assert options <= known, f"`millstream {' '.join(words)}`: no such options: {options - known}"


def millstream() -> Any:
    import typer

    from millstream.pipeline.cli.main import app

    return typer.main.get_command(app)


CHECKS = {
    "": lambda text, folder: None,  # a drawing
    "text": lambda text, folder: None,
    "python": lambda text, folder: None,  # has been run
    "json": lambda text, folder: json.loads(text),
    "sql": check_sql,
    "toml": check_toml,
    "sh": check_shell,
    "console": check_shell,
}


def run_python(document: Path) -> None:
    """Executes the Python blocks of a document, in this process."""
    namespace: dict[str, Any] = {"__name__": "__main__"}
    for block in blocks(document):
        if block.language != "python":
            continue
        source = "\n" * block.line + block.text  # tracebacks name lines of the document
        code: CodeType = compile(source, str(document), "exec", flags=ast.PyCF_ALLOW_TOP_LEVEL_AWAIT)
        if code.co_flags & inspect.CO_COROUTINE:
            asyncio.run(eval(code, namespace))
        else:
            exec(code, namespace)


if __name__ == "__main__":
    try:
        run_python(Path(sys.argv[1]))
    except BaseException:
        traceback.print_exc()
        sys.exit(1)
