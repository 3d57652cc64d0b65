"""Which folders weights may come from."""

import pytest

pytest.importorskip("torch")

import torch
from safetensors.torch import save_file

from millstream.pipeline.models.weight_files import Weights, allowed, check_version, prune, save
from millstream.schemas.errors import ConfigError

pytestmark = pytest.mark.torch


@pytest.fixture
def root(tmp_path):
    (tmp_path / "root" / "good").mkdir(parents=True)
    save_file({"a": torch.ones(2, 3)}, tmp_path / "root" / "good" / "model.safetensors")
    (tmp_path / "outside").mkdir()
    save_file({"a": torch.ones(2)}, tmp_path / "outside" / "model.safetensors")
    return tmp_path / "root"


def test_a_folder_below_the_root(root):
    weights = allowed(root / "good", root, "run.0.1")
    assert weights.shapes() == {"a": (2, 3)}
    assert [len(digest) for digest in weights.checksums().values()] == [64]


def test_weights_from_elsewhere_are_refused(root):
    (root / "link").symlink_to(root.parent / "outside")
    (root / "file-link").mkdir()
    (root / "file-link" / "model.safetensors").symlink_to(root.parent / "outside" / "model.safetensors")
    for folder in (root.parent / "outside", root / ".." / "outside", root / "link", "/etc"):
        with pytest.raises(ConfigError, match="does not lie below"):
            allowed(folder, root, "run.0.1")
    with pytest.raises(ConfigError, match="links to a file that does not lie below"):
        allowed(root / "file-link", root, "run.0.1")


def test_only_safetensors_are_accepted(root):
    (root / "good" / "pytorch_model.bin").write_bytes(b"")
    with pytest.raises(ConfigError, match=r"pytorch_model\.bin, but only safetensors"):
        allowed(root / "good", root, "run.0.1")
    (root / "empty").mkdir()
    with pytest.raises(ConfigError, match="no safetensors"):
        allowed(root / "empty", root, "run.0.1")


def test_an_adapter_is_not_a_model_nor_a_model_an_adapter(root):
    (root / "adapter").mkdir()
    save_file({"a": torch.ones(2)}, root / "adapter" / "adapter_model.safetensors")
    allowed(root / "adapter", root, "run.0.1", lora=True)
    with pytest.raises(ConfigError, match="--lora"):
        allowed(root / "adapter", root, "run.0.1")
    with pytest.raises(ConfigError, match="not a LoRA adapter"):
        allowed(root / "good", root, "run.0.1", lora=True)


def test_saved_versions_are_kept_as_long_as_they_are_needed(tmp_path):
    saved = [save(tmp_path, {"a": torch.full((2,), float(n))}, f"run.0.{n}") for n in range(3)]
    prune(tmp_path, saved[1:])
    assert sorted(path.name for path in tmp_path.iterdir()) == ["run.0.1", "run.0.2"]
    assert saved[2] == Weights("run.0.2", tmp_path / "run.0.2")


@pytest.mark.parametrize("version", ["", "7", "run.0", "run.0.x", "run/../../x.0.1", "run.0.1\n", "a b.0.1"])
def test_a_version_is_run_epoch_step(version):
    with pytest.raises(ConfigError, match=r"run\.epoch\.step"):
        check_version(version)
    assert check_version("run-1.0.17") == "run-1.0.17"


def test_pruning_leaves_what_it_did_not_write(tmp_path):
    """Entry B7: the folder may be the user's own."""
    torch = pytest.importorskip("torch")
    kept, old = (save(tmp_path, {"w": torch.zeros(1)}, version) for version in ("run.0.1", "run.0.0"))
    (tmp_path / "notes").mkdir()
    (tmp_path / "other.0.0").mkdir()
    (tmp_path / "file").touch()
    prune(tmp_path, [kept])
    assert {path.name for path in tmp_path.iterdir()} == {"run.0.1", "notes", "other.0.0", "file"}
    assert not old.folder.exists()
