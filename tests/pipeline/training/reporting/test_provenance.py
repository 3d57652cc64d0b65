"""Digests, versions and the commit that a run depends on."""

import hashlib
import subprocess
import sys
from importlib.metadata import version
from pathlib import Path

import pytest

from millstream.pipeline.training.reporting.provenance import PACKAGES, digests, provenance


def git(folder: Path, *arguments: str) -> str:
    identity = ["-c", "user.name=a", "-c", "user.email=a@b.c"]
    done = subprocess.run(["git", "-C", str(folder), *identity, *arguments], check=True, capture_output=True, text=True)
    return done.stdout.strip()


@pytest.fixture
def repository(tmp_path: Path) -> Path:
    git(tmp_path, "init", "-q")
    (tmp_path / "agent.py").write_text("1")
    git(tmp_path, "add", ".")
    git(tmp_path, "commit", "-qm", "first")
    return tmp_path


def test_each_file_of_the_model_has_its_digest(tmp_path: Path) -> None:
    (tmp_path / "b.json").write_bytes(b"two")
    (tmp_path / "a.bin").write_bytes(b"one")
    (tmp_path / "folder").mkdir()
    assert digests(tmp_path) == {
        "a.bin": hashlib.sha256(b"one").hexdigest(),
        "b.json": hashlib.sha256(b"two").hexdigest(),
    }
    assert provenance(tmp_path)["model"] == digests(tmp_path)
    assert digests(tmp_path / "missing") == {}
    assert provenance(None)["model"] is None


def test_the_commit_of_the_users_folder_and_whether_it_was_changed(repository: Path) -> None:
    found = provenance(None, folder=repository)["git"]
    assert found == {"commit": git(repository, "rev-parse", "HEAD"), "dirty": False}
    (repository / "result.txt").write_text("untracked files are no change")
    assert provenance(None, folder=repository)["git"]["dirty"] is False
    (repository / "agent.py").write_text("2")
    assert provenance(None, folder=repository)["git"]["dirty"] is True


def test_a_folder_outside_of_a_repository_has_no_commit(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    assert provenance(None, folder=tmp_path)["git"] is None
    monkeypatch.setenv("PATH", "")
    assert provenance(None)["git"] is None


def test_versions_are_those_of_this_interpreter_and_of_others(tmp_path: Path) -> None:
    missing = tmp_path / "python"
    found = provenance(None, {Path(sys.executable): ("millstream", "nothing-of-this-name"), missing: ("vllm",)})
    assert set(found["packages"]) <= {*PACKAGES, sys.executable, str(missing)}
    assert found["packages"]["millstream"] == version("millstream")
    assert found["packages"][sys.executable] == {"millstream": version("millstream")}
    assert found["packages"][str(missing)] is None
    assert found["python"] == sys.version.split()[0]


def test_the_schemas_have_one_digest() -> None:
    assert len(provenance(None)["schemas"]) == 64
