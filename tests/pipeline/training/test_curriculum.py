"""Stages of training in one file: what each begins with, and where a curriculum goes on."""

import sys
from pathlib import Path
from typing import Any

import pytest
from rich.console import Console

from millstream.pipeline.training.config import dry_run, load_config, load_stages, train_from
from millstream.schemas.errors import ConfigError

STAGES = """
run = "calc"
run_dir = "runs/calc"
strategy = "memory"
agent = "answering:agent"
tasks = "tasks.jsonl"

[[curriculum]]
max_steps = 1
[curriculum.algorithm]
type = "grpo"
model = "model"
lr = 0.0
groups_per_step = 2
group_size = 4

[[curriculum]]
name = "imitate"
[curriculum.algorithm]
type = "sft"
lr = 1e-3
best_of_group = 0
epochs = 2
rows_per_step = 4

[[curriculum]]
[curriculum.algorithm]
type = "dpo"
lr = 1e-3
pairs = "all"
rows_per_step = 2
epochs = 2
[curriculum.algorithm.data]
store = "chdb://runs/calc/grpo/store"
"""

AGENT = """
import openai

asked = 0

def agent(task):
    global asked
    client = openai.OpenAI(api_key="unused")
    messages = [{"role": "user", "content": task}]
    answer = client.chat.completions.create(model="calculator", messages=messages, max_tokens=2)
    asked += 1
    return float(asked % 2)
"""


@pytest.fixture
def file(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    monkeypatch.chdir(tmp_path)
    monkeypatch.syspath_prepend(tmp_path)
    monkeypatch.delitem(sys.modules, "answering", raising=False)
    Path("answering.py").write_text(AGENT)
    Path("tasks.jsonl").write_text('{"input": "add 3 to 8 ?"}\n{"input": "add 1 to 2 ?"}\n')
    Path("train.toml").write_text(STAGES)
    return Path("train.toml")


def test_each_stage_begins_with_what_the_last_one_made(file: Path) -> None:
    first, second, third = load_stages(file)
    assert [each.run for each in (first, second, third)] == ["calc-grpo", "calc-imitate", "calc-dpo"]
    assert [each.run_dir.name for each in (first, second, third)] == ["grpo", "imitate", "dpo"]
    assert (second.algorithm.model, third.algorithm.model) == (  # type: ignore[union-attr]
        Path("runs/calc/grpo/last"),
        Path("runs/calc/imitate/last"),
    )
    assert second.algorithm.data.experiment == "calc-grpo"  # type: ignore[union-attr]
    assert second.algorithm.data.store == f"chdb://{Path.cwd()}/runs/calc/grpo/store"  # type: ignore[union-attr]
    assert third.algorithm.data.experiment is None  # type: ignore[union-attr]
    assert (first.max_steps, second.max_steps, third.tasks) == (1, None, Path("tasks.jsonl"))


@pytest.mark.parametrize(
    ("start", "values", "model"),
    [("", "", "last"), ("", 'val_tasks = "v"', "best"), ('start = "last"', 'val_tasks = "v"', "last")],
)
def test_the_best_model_is_taken_where_there_is_one(file: Path, start: str, values: str, model: str) -> None:
    file.write_text(f"{values}\n" + STAGES.replace('name = "imitate"', f'name = "imitate"\n{start}'))
    _, second, _ = load_stages(file)
    assert second.algorithm.model == Path(f"runs/calc/grpo/{model}")  # type: ignore[union-attr]


def test_agents_read_the_prompts_that_a_stage_has_found(file: Path) -> None:
    """Their models are those of the stage before the search."""
    search = """
val_tasks = "val.jsonl"
[prompts.system]
template = "Answer {task}."
[[curriculum]]
max_steps = 1
[curriculum.algorithm]
type = "grpo"
model = "model"
[[curriculum]]
[curriculum.algorithm]
type = "apo"
critic = "gpt"
[[curriculum]]
name = "again"
[curriculum.algorithm]
type = "grpo"
"""
    file.write_text(STAGES[: STAGES.index("[[curriculum]]")] + search)
    first, second, third = load_stages(file)
    assert (first.prompts_from, second.prompts_from, third.prompts_from) == (None, None, Path("runs/calc/apo"))
    assert third.algorithm.model == Path("runs/calc/grpo/best")  # type: ignore[union-attr]


@pytest.mark.parametrize(
    ("old", "new", "says"),
    [
        ('name = "imitate"', 'name = "grpo"', "two stages of the curriculum are called grpo"),
        ('name = "imitate"', 'run = "other"', "stage sft: run can't differ between stages"),
        ('name = "imitate"', 'start = "best"', "without val_tasks no model is the best"),
        ('name = "imitate"', 'start = "first"', "start is best or last, not first"),
        ("max_steps = 1", 'start = "best"', "start is for stages after the first"),
        ("max_steps = 1", "max_step = 1", "stage 1 of the curriculum: max_step: Extra inputs"),
        ('type = "sft"', 'type = "sft"\nmodel = "m"', None),
        ('type = "sft"', 'model = "m"', "stage 2 of the curriculum needs an [curriculum.algorithm] with a type"),
        ('type = "sft"', 'type = "stf"', "stage 2 of the curriculum: algorithm: Input tag 'stf'"),
        ("[[curriculum]]\nmax_steps", '[algorithm]\ntype = "grpo"\n[[curriculum]]\nmax_steps', "not both"),
        ('run = "calc"', 'run = "calc"\nresume = "step-3"', "goes on in the stage where it was"),
        (STAGES, "curriculum = []", "write [[curriculum]] before each stage"),
        (STAGES, "[curriculum]", "write [[curriculum]] before each stage"),
        ('model = "model"\n', "", "stage 1 of the curriculum: algorithm.grpo.model: Field required"),
        ('type = "grpo"', 'type = "verl"', "stage 1 of the curriculum: "),
    ],
)
def test_what_a_curriculum_may_not_say_is_refused(file: Path, old: str, new: str, says: str | None) -> None:
    file.write_text(STAGES.replace(old, new, 1))
    if says is None:
        load_stages(file)
        return
    with pytest.raises(ConfigError) as refused:
        load_stages(file)
    assert says in str(refused.value)
    assert str(file) in str(refused.value)


def test_where_one_training_is_asked_for_a_curriculum_is_refused(file: Path) -> None:
    with pytest.raises(ConfigError, match="holds a curriculum of 3 stages"):
        load_config(file)


class Interrupted(Console):
    """Ctrl-C when a line with this text is printed."""

    def __init__(self, text: str) -> None:
        super().__init__(quiet=True)
        self.text = text

    def print(self, *values: Any, **options: Any) -> None:
        if self.text in str(values):
            raise KeyboardInterrupt


@pytest.mark.torch
def test_a_curriculum_goes_on_in_the_stage_where_it_was(file: Path, tmp_path: Path) -> None:
    """The stages that have ended are not trained again, and the last model is the same as without an interruption.
    Before anything has run, the later stages are checked without their models."""
    from examples.calculator import model
    from millstream.pipeline.models.policy import digest, load_model, parameters

    model.create(tmp_path / "model", 1)
    text, record = dry_run(file)
    assert text.count("# Stage ") == 3
    assert [each.get("waits_for") for each in record["stages"]] == [
        None,
        ["runs/calc/grpo/last"],
        ["runs/calc/imitate/last"],
    ]

    with pytest.raises(KeyboardInterrupt):
        train_from(file, Interrupted("calc-dpo.0.2"))
    ended = {path: path.stat().st_mtime_ns for path in Path("runs/calc").glob("*/last/model.safetensors")}
    assert {path.parts[2] for path in ended} == {"grpo", "imitate"}
    summary = train_from(file, Console(quiet=True))
    assert len(summary.steps) == len(load_model_steps("dpo"))
    assert all(path.stat().st_mtime_ns == before for path, before in ended.items())
    resumed = digest(parameters(load_model("runs/calc/dpo/last")))
    assert resumed != digest(parameters(load_model("runs/calc/imitate/last")))

    Path("runs/calc/dpo").rename("interrupted")
    train_from(file, Console(quiet=True))
    assert digest(parameters(load_model("runs/calc/dpo/last"))) == resumed
    again = train_from(file, Console(quiet=True))  # all have ended
    assert len(again.steps) == len(summary.steps)

    file.write_text(STAGES.replace("epochs = 2\nrows_per_step = 4", "epochs = 3\nrows_per_step = 4"))
    with pytest.raises(ConfigError, match="calc-imitate is another than the one whose result calc-dpo began with"):
        train_from(file, Console(quiet=True))


def load_model_steps(stage: str) -> list[Any]:
    import json

    return list(json.loads(Path(f"runs/calc/{stage}/train.json").read_text())["steps"])
