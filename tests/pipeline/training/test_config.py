"""What a training file says, and what comes of it."""

import json
from pathlib import Path
from typing import Any

import pytest

from millstream.pipeline.training.config import load_config, train_from
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
