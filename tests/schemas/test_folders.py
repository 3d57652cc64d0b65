"""Only folders that a command has created are emptied."""

import subprocess
import sys
from pathlib import Path

import pytest

from millstream.schemas.errors import ConfigError
from millstream.schemas.folders import MARK, emptied_folder, held_folder, make_folder, own_folder


@pytest.mark.parametrize("name", ["store/data", "model", "notes.txt", ".hidden"])
def test_a_folder_with_files_of_the_user_is_refused_and_stays(tmp_path: Path, name: str) -> None:
    """Entry B7: only folders with the mark are emptied."""
    (tmp_path / name).mkdir(parents=True)
    for refused in (own_folder, emptied_folder):
        with pytest.raises(ConfigError, match=r"--run-dir .* holds files that are not of the demo"):
            refused(tmp_path, "--run-dir", "the demo")
    assert (tmp_path / name).is_dir()
    assert not (tmp_path / MARK).exists()


def test_a_folder_of_another_command_is_refused(tmp_path: Path) -> None:
    own_folder(tmp_path, "--data-dir", "a broker")
    with pytest.raises(ConfigError, match="not of the demo"):
        emptied_folder(tmp_path, "--run-dir", "the demo")


def test_a_new_an_empty_and_an_own_folder_are_accepted(tmp_path: Path) -> None:
    own_folder(tmp_path, "--run-dir", "the demo")
    own_folder(tmp_path / "a" / "b", "--run-dir", "the demo")
    (tmp_path / "a" / "b" / "old").touch()
    own_folder(tmp_path / "a" / "b", "--run-dir", "the demo")
    assert (tmp_path / "a" / "b" / "old").exists()
    emptied_folder(tmp_path / "a" / "b", "--run-dir", "the demo")
    assert [path.name for path in (tmp_path / "a" / "b").iterdir()] == [MARK]


@pytest.mark.parametrize("place", ["file", "file/child", "/proc/x", "x" * 300])
def test_a_folder_that_cannot_be_created_is_named_with_its_option(tmp_path: Path, place: str) -> None:
    (tmp_path / "file").touch()
    with pytest.raises(ConfigError, match=r"^run_dir .*can't be created \(.+\); choose another one"):
        make_folder(tmp_path / place, "run_dir")


def test_a_folder_is_held_until_its_process_ends(tmp_path: Path) -> None:
    code = (
        "import sys, pathlib; from millstream.schemas.folders import held_folder\n"
        "with held_folder(pathlib.Path(sys.argv[1]), 'run_dir'): print('held', flush=True); sys.stdin.read()"
    )
    command = [sys.executable, "-c", code, str(tmp_path)]
    with subprocess.Popen(command, stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True) as other:
        assert other.stdout is not None
        assert other.stdout.readline() == "held\n"
        with pytest.raises(ConfigError, match=f"run_dir {tmp_path} is in use by process {other.pid} on "):
            held_folder(tmp_path, "run_dir").__enter__()
        other.kill()
        other.wait()
        with held_folder(tmp_path, "run_dir"):
            pass
