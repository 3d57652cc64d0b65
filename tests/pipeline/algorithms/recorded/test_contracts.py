"""`millstream dataset messages` for other trainers: verl's own data set makes the same tokens and masks of it."""

import json
import subprocess
from pathlib import Path

import pytest

pytest.importorskip("torch")

from factories import finished

from examples.calculator import model
from millstream.pipeline.algorithms.recorded.imitation import ImitationLearner
from millstream.pipeline.training.datasets import Choice, messages

pytestmark = [pytest.mark.torch, pytest.mark.verl, pytest.mark.slow, pytest.mark.timeout(300)]

HERE = Path(__file__).parent
ROOT = HERE.parents[3]
PYTHON = ROOT / ".venv-verl" / "bin" / "python"


def said(role: str, content: str) -> dict[str, str]:
    return {"role": role, "content": content}


ASKED, ADDED = said("user", "add 3 to 8 ?"), said("assistant", "add")
THEN, MULTIPLIED = said("user", "double it"), said("assistant", "multiply")
CONVERSATION = [
    {"prompt": json.dumps([ASKED]), "response": json.dumps(ADDED)},
    {"prompt": json.dumps([ASKED, ADDED, THEN]), "response": json.dumps(MULTIPLIED), "reward": 1.0},
]
ALONE = [{"prompt": json.dumps([said("system", "add"), THEN]), "response": json.dumps(ADDED), "reward": 0.5}]


def test_verl_makes_the_same_tokens_and_masks_of_it(tmp_path: Path) -> None:
    if not PYTHON.exists():
        pytest.skip("there is no .venv-verl; `make verl` sets it up")
    folder = tmp_path / "model"
    model.create(folder, seed=1)
    rollouts = [list(finished(name, turns).triplets) for name, turns in (("a", CONVERSATION), ("b", ALONE))]
    lines = tmp_path / "sft.jsonl"
    lines.write_text("".join(json.dumps(line) + "\n" for line in messages(rollouts, merge_turns=True)))
    command = [PYTHON, HERE / "verl_sft_rows.py", lines, folder, tmp_path / "sft.parquet", tmp_path / "rows.json"]
    done = subprocess.run(command, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr
    theirs = json.loads((tmp_path / "rows.json").read_text())
    rows, refused = ImitationLearner(folder, choice=Choice(), merge_turns=True).rows(rollouts)
    assert not refused
    assert [row["input_ids"] for row in theirs] == [[*row.prompt, *row.response] for row in rows]
    assert [row["loss_mask"] for row in theirs] == [
        [*[0] * len(row.prompt), *(int(weight) for weight in row.ce)] for row in rows
    ]
