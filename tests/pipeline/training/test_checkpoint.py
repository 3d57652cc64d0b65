# ruff: noqa: E402 — torch comes with the `train` extra
import json
from pathlib import Path
from typing import Any

import pytest

torch = pytest.importorskip("torch")

from millstream.pipeline.training import checkpoint
from millstream.pipeline.training.checkpoint import CheckpointDamaged, load_latest, save
from millstream.schemas.errors import ConfigError

pytestmark = pytest.mark.torch

POSITIONS = {0: 17, 5: 0}
EXTRA = {"model_version": "run.0.3", "outstanding": ["a", "b"], "tasks_drawn": 48}


def state() -> dict[str, Any]:
    parameter = torch.nn.Parameter(torch.ones(3, 2))
    optimizer = torch.optim.Adam([parameter])
    parameter.sum().backward()
    optimizer.step()
    return {
        "weights": {"w": parameter.detach()},
        "optimizer": optimizer.state_dict(),
        "random": torch.Generator().get_state(),
    }


def steps(folder: Path) -> list[str]:
    return sorted(path.name for path in folder.iterdir())


def test_what_is_saved_is_loaded(tmp_path: Path) -> None:
    given = state()
    save(tmp_path / "new" / "folder", 3, given, POSITIONS, EXTRA)
    found = load_latest(tmp_path / "new" / "folder")
    assert found is not None
    assert (found.step, found.positions, found.extra) == (3, POSITIONS, EXTRA)
    assert torch.equal(found.algorithm_state["weights"]["w"], given["weights"]["w"])
    assert torch.equal(found.algorithm_state["random"], given["random"])
    moments, expected = found.algorithm_state["optimizer"]["state"][0], given["optimizer"]["state"][0]
    assert torch.equal(moments["exp_avg"], expected["exp_avg"])
    assert moments["step"] == expected["step"]


def test_nothing_there(tmp_path: Path) -> None:
    assert load_latest(tmp_path) is None
    assert load_latest(tmp_path / "missing") is None


def test_the_last_ones_are_kept(tmp_path: Path) -> None:
    for step in range(9, 13):
        save(tmp_path, step, state(), {}, {}, keep=2)
    assert steps(tmp_path) == ["step-00000011", "step-00000012"]
    found = load_latest(tmp_path)
    assert found is not None
    assert found.step == 12


def test_a_crash_while_saving_leaves_the_one_before(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    save(tmp_path, 1, state(), {}, {"mark": 1})

    def crash(path: Path) -> None:
        raise KeyboardInterrupt

    with monkeypatch.context() as patch:
        patch.setattr(checkpoint, "_sync", crash)
        with pytest.raises(KeyboardInterrupt):
            save(tmp_path, 2, state(), {}, {"mark": 2})
    found = load_latest(tmp_path)
    assert found is not None
    assert found.extra == {"mark": 1}
    save(tmp_path, 2, state(), {}, {"mark": 2})
    assert steps(tmp_path) == ["step-00000001", "step-00000002"]


def test_a_step_may_be_saved_again(tmp_path: Path) -> None:
    save(tmp_path, 1, state(), {}, {"mark": 1})
    save(tmp_path, 1, state(), {}, {"mark": 2})
    found = load_latest(tmp_path)
    assert found is not None
    assert found.extra == {"mark": 2}
    assert steps(tmp_path) == ["step-00000001"]


def test_another_runs_folder_is_refused(tmp_path: Path) -> None:
    save(tmp_path, 40, state(), {}, {})
    with pytest.raises(ConfigError, match="step 40"):
        save(tmp_path, 0, state(), {}, {})


@pytest.mark.parametrize("name", [checkpoint.WEIGHTS, checkpoint.STATE, checkpoint.MANIFEST])
@pytest.mark.parametrize("how", ["cut", "flip", "missing"])
def test_damage_is_named_and_not_passed_over(tmp_path: Path, name: str, how: str) -> None:
    save(tmp_path, 1, state(), {}, {})
    file = save(tmp_path, 2, state(), {}, {}) / name
    content = file.read_bytes()
    if how == "cut":
        file.write_bytes(content[: len(content) // 2])
    elif how == "flip":
        file.write_bytes(bytes([content[0] ^ 0xFF]) + content[1:])
    else:
        file.unlink()
    with pytest.raises(CheckpointDamaged, match=r"step-00000002.*remove"):
        load_latest(tmp_path)


def test_the_manifest_is_for_people_too(tmp_path: Path) -> None:
    path = save(tmp_path, 2, state(), POSITIONS, EXTRA)
    manifest = json.loads((path / checkpoint.MANIFEST).read_text())
    assert manifest["positions"] == {"0": 17, "5": 0}
    assert manifest["extra"]["model_version"] == "run.0.3"


def test_folders_of_the_user_beside_the_checkpoints_stay_and_do_not_count(tmp_path: Path) -> None:
    """Entry B7: pruning removes checkpoints only."""
    (tmp_path / "step-best").mkdir()
    (tmp_path / "step-1").mkdir()
    for step in range(3):
        save(tmp_path, step, state(), POSITIONS, EXTRA, keep=1)
    assert steps(tmp_path) == ["step-00000002", "step-1", "step-best"]
    found = load_latest(tmp_path)
    assert found is not None
    assert found.step == 2


def test_an_exported_model_is_one_that_transformers_load(tmp_path):
    """Entry A4: weights without configuration and tokenizer were of no use."""
    from transformers import AutoModelForCausalLM

    from examples.calculator import model
    from millstream.pipeline.models.policy import load_tokenizer, parameters
    from millstream.pipeline.training.checkpoint import export

    model.create(tmp_path / "model", 0)
    model.create(tmp_path / "other", 1)
    other = AutoModelForCausalLM.from_pretrained(tmp_path / "other", dtype=torch.float32)
    for _ in range(2):  # the second replaces the first
        export(parameters(other), tmp_path / "model", tmp_path / "best")
    loaded = AutoModelForCausalLM.from_pretrained(tmp_path / "best", dtype=torch.float32)
    ids = torch.arange(1, 9)[None]
    assert torch.equal(loaded(ids).logits, other(ids).logits)
    assert load_tokenizer(tmp_path / "best").chat_template
    assert sorted(path.name for path in tmp_path.iterdir()) == ["best", "model", "other"]
