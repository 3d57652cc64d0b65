"""What a training file says, and what comes of it."""

import hashlib
import json
import re
import sys
from pathlib import Path
from typing import Any

import pytest

from millstream.pipeline.addresses import free_port
from millstream.pipeline.training.config import RESOLVED, again, dry_run, load_config, train_from
from millstream.pipeline.training.run import read_record
from millstream.schemas.errors import ConfigError

CONFIG = """
    strategy = "memory"
    run_dir = "run"
    tasks = "tasks.jsonl"
    val_tasks = "tasks.jsonl"
    max_steps = 0
    hooks = ["around:note"]
    AGENT
    [grpo]
    model = "model"
"""

CODE = """
import millstream as ms

class Note(ms.Hook):
    def on_rollout_end(self, agent, runner, rollout, status):
        open("notes", "a").write(f"{rollout.input} {status}")

note = Note()

def agent(input):
    return 1.0
"""


@pytest.mark.torch
def test_a_model_server_that_does_not_exist_is_named(tmp_path: Path) -> None:
    file = tmp_path / "train.toml"
    file.write_text(CONFIG.replace("AGENT", "") + '\n[model]\nserver = "vlm"\nport = 1\n')
    with pytest.raises(ConfigError, match=r"model\.server: Input should be 'engine' or 'vllm'; model\.port: Extra"):
        load_config(file)


def test_hooks_of_the_file_surround_the_agent_of_the_file(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    from examples.calculator import model

    monkeypatch.chdir(tmp_path)
    model.create(tmp_path / "model", 0)
    (tmp_path / "around.py").write_text(CODE)
    (tmp_path / "tasks.jsonl").write_text(json.dumps({"input": "one"}))
    file = tmp_path / "train.toml"
    file.write_text(CONFIG.replace("AGENT", 'agent = "around:agent"'))
    assert train_from(file).validation_reward == 1.0
    assert (tmp_path / "notes").read_text() == "one succeeded"
    file.write_text(CONFIG.replace("AGENT", ""))
    with pytest.raises(ConfigError, match="hooks run where the agent does: give the runners --hook"):
        train_from(file)


def test_a_run_in_memory_shows_its_store_in_a_browser_meanwhile(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    """Only the process that holds an embedded store can serve it: here the agent is the browser."""
    from examples.calculator import model

    port = free_port()
    watching = f"""
from urllib.request import urlopen

def agent(input):
    page = urlopen("http://127.0.0.1:{port}/", timeout=60).read().decode()
    return float("Rollouts a second" in page and "can't be opened" not in page)
"""
    monkeypatch.chdir(tmp_path)
    model.create(tmp_path / "model", 0)
    (tmp_path / "watching.py").write_text(watching)
    (tmp_path / "tasks.jsonl").write_text(json.dumps({"input": "one"}))
    file = tmp_path / "train.toml"
    text = CONFIG.replace("AGENT", 'agent = "watching:agent"').replace('hooks = ["around:note"]', "")
    file.write_text(text)
    assert train_from(file, ui_port=port).validation_reward == 1.0
    assert f"watch it in a browser: http://127.0.0.1:{port}/" in capsys.readouterr().out
    file.write_text(text.replace('"memory"', '"kafka"'))
    with pytest.raises(ConfigError, match="millstream ui"):
        train_from(file, ui_port=port)


@pytest.mark.torch
@pytest.mark.parametrize("deterministic", [False, True])
def test_the_engine_is_deterministic_if_the_file_says_so(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, deterministic: bool
) -> None:
    from examples.calculator import model
    from millstream.pipeline.models.engine import Engine

    said: list[bool] = []
    create = Engine.__init__

    def noted(self: Engine, *args: Any, **given: Any) -> None:
        said.append(given["deterministic"])
        create(self, *args, **given)

    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(Engine, "__init__", noted)
    model.create(tmp_path / "model", 0)
    (tmp_path / "around.py").write_text(CODE)
    (tmp_path / "tasks.jsonl").write_text(json.dumps({"input": "one"}))
    file = tmp_path / "train.toml"
    server = f"\n[model]\ndeterministic = {str(deterministic).lower()}\n"
    file.write_text(CONFIG.replace("AGENT", 'agent = "around:agent"') + server)
    train_from(file)
    assert said == [deterministic]
    file.write_text(CONFIG.replace("AGENT", "") + '\n[model]\ndeterministic = true\nserver = "vllm"\n')
    with pytest.raises(ConfigError, match="deterministic is for the demo engine"):
        train_from(file)


LEARNING = """
    strategy = "memory"
    agent = "calling:agent"
    run_dir = "runs/first"
    tasks = "tasks.jsonl"
    val_tasks = "val.jsonl"
    max_steps = 2
    seed = 3
    [model]
    deterministic = true
    [algorithm]
    type = "grpo"
    model = "model"
    groups_per_step = 2
    group_size = 4
    lr = 1e-3
"""
CALLING = """
import openai

def agent(task):
    client = openai.OpenAI()
    message = {"role": "user", "content": task}
    said = client.chat.completions.create(model="policy", messages=[message], max_tokens=4).choices[0].message.content
    return float(len(said) % 5)
"""


@pytest.fixture
def file(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A folder in which a training file, its agent, tasks and model lie."""
    from examples.calculator import model

    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr("sys.path", [*sys.path])
    monkeypatch.delitem(sys.modules, "calling", raising=False)
    model.create("model", 0)
    Path("calling.py").write_text(CALLING)
    Path("tasks.jsonl").write_text("".join(json.dumps({"input": f"add {n} and 2"}) + "\n" for n in range(5)))
    Path("val.jsonl").write_text(json.dumps({"input": "add 1 and 1"}))
    Path("train.toml").write_text(LEARNING)
    return Path("train.toml")


def weights(run_dir: Path) -> str:
    return hashlib.sha256((run_dir / "checkpoints" / "step-00000002" / "weights.safetensors").read_bytes()).hexdigest()


@pytest.mark.torch
def test_a_dry_run_writes_the_resolved_file_and_starts_nothing(file: Path) -> None:
    text, record = dry_run(file)
    assert [path.name for path in Path("runs/first").iterdir()] == [RESOLVED]
    resolved = Path("runs/first") / RESOLVED
    assert resolved.read_text() == text
    assert repr(load_config(resolved)) == repr(load_config(file))
    assert "entropy = 0.1" in text
    assert record["arguments"]["learner"]["lr"] == 1e-3
    assert "model.safetensors" in record["model"]


@pytest.mark.torch
@pytest.mark.parametrize(
    ("old", "new", "says"),
    [
        ('agent = "calling:agent"', 'agent = "calling:missing"', "calling has no missing"),
        ('agent = "calling:agent"', 'agent = "calling:agent"\nhooks = ["calling:nothing"]', "calling has no nothing"),
        ('agent = "calling:agent"', 'hooks = ["calling:agent"]', "hooks run where the agent does"),
        ('tasks = "tasks.jsonl"', 'tasks = "nowhere.jsonl"', "nowhere.jsonl can't be read"),
        ('val_tasks = "val.jsonl"', 'val_tasks = "calling.py"', "calling.py:2"),
        ('model = "model"', 'model = "nowhere"', "nowhere is not a Hugging Face model folder"),
        ("lr = 1e-3", 'schedule = "cosine"', "schedule 'cosine' falls to 0"),
        ("lr = 1e-3", "lr = -1", "algorithm.grpo.lr"),
        ("max_steps = 2", 'max_steps = 2\nresume = "step-9"', "there is no such checkpoint"),
        ("deterministic = true", 'server = "vllm"', "no vLLM at"),
    ],
)
def test_a_dry_run_refuses_what_training_would(
    file: Path, monkeypatch: pytest.MonkeyPatch, old: str, new: str, says: str
) -> None:
    monkeypatch.setenv("MILLSTREAM_VLLM_PYTHON", "nowhere/python")
    file.write_text(LEARNING.replace(old, new, 1))
    with pytest.raises(ConfigError, match=re.escape(says)):
        dry_run(file)
    assert not Path("runs").exists()


@pytest.mark.torch
def test_a_dry_run_sets_no_checkpoint_aside(file: Path) -> None:
    train_from(file)
    before = sorted(Path("runs/first/checkpoints").iterdir())
    file.write_text(LEARNING.replace("seed = 3", 'seed = 3\n    resume = "step-1"'))
    dry_run(file)
    assert sorted(Path("runs/first/checkpoints").iterdir()) == before


@pytest.mark.torch
def test_a_run_can_be_reproduced_from_its_record(file: Path) -> None:
    """The weights are the same bit by bit, and another model, other tasks or versions are refused by name."""
    train_from(file)
    record = read_record(Path("runs/first/experiment.json"))
    assert record is not None
    assert (record["algorithm"], record["run"], record["seed"]) == ("PolicyGradient", "run", 3)
    with pytest.raises(ConfigError, match="runs/first is the folder of a run"):
        again(record, Path("runs/first"))
    resolved = again(record)
    train_from(resolved)
    assert resolved == Path("runs/first-again") / RESOLVED
    assert weights(Path("runs/first-again")) == weights(Path("runs/first"))
    file.write_text(LEARNING.replace("seed = 3", "seed = 4").replace("first", "other"))
    train_from(file)
    assert weights(Path("runs/other")) != weights(Path("runs/first"))

    Path("val.jsonl").write_text(json.dumps({"input": "add 1 and 2"}))
    Path("model/notes").write_text("new")
    old = {**record, "packages": {**record["packages"], "torch": "1.0"}}
    with pytest.raises(ConfigError, match="can't be reproduced as it was") as refused:
        again(old, Path("runs/third"))
    named = [line.split(" was ")[0].strip() for line in str(refused.value).splitlines()[1:]]
    assert sorted(named) == ["model.notes", "packages.torch", "val_tasks"]
    assert not Path("runs/third").exists()
    assert again(old, Path("runs/third"), force=True) == Path("runs/third") / RESOLVED


@pytest.mark.torch
def test_what_differs_when_a_run_goes_on_is_in_its_record_and_in_sql(file: Path) -> None:
    from millstream.pipeline.store.clickhouse import ClickHouseStore
    from millstream.schemas.config.settings import load_settings

    train_from(file)
    Path("model/notes").write_text("new")
    file.write_text(LEARNING.replace("lr = 1e-3", "lr = 2e-3").replace("max_steps = 2", "max_steps = 3"))
    train_from(file)
    train_from(file)  # nothing is different
    record = read_record(Path("runs/first/experiment.json"))
    assert record is not None
    (change,) = record["changes"]
    assert (change["epoch"], change["step"]) == (0, 2)
    assert change["values"]["arguments.learner.lr"] == [1e-3, 2e-3]
    assert change["values"]["config.max_steps"] == [2, 3]
    assert change["values"]["model.notes"][0] is None
    store = ClickHouseStore(load_settings(clickhouse_dsn="chdb://runs/first/store"))
    (row,) = store.sql("SELECT * FROM experiments").records()
    store.close()
    assert json.loads(row["configuration"]) == record
    assert (row["run"], row["algorithm"], row["changes"], row["git_commit"]) == ("run", "PolicyGradient", 1, "")
    assert row["model"] == record["model"]
    assert json.loads(row["arguments"]) == record["arguments"]


def test_a_run_of_a_script_is_not_reproduced() -> None:
    with pytest.raises(ConfigError, match="a script has started it"):
        again({"config": None})
    with pytest.raises(ConfigError, match="not one of this version: speed: Extra"):
        again({"config": {"tasks": "t", "speed": 1, "algorithm": {"type": "grpo", "model": "m"}}})
