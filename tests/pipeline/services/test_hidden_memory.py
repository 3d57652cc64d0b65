"""What other processes of the same user can read of a role's process."""

import os
import subprocess
import sys
import textwrap
from pathlib import Path

import pytest

from millstream.pipeline.services import hidden_memory

linux = pytest.mark.skipif(sys.platform != "linux", reason="needs Linux's /proc and prctl")
NOBODY = 65534
# As in a deployment, not as root: root may read everything.
AS_NOBODY = {"user": NOBODY, "group": NOBODY, "extra_groups": []} if os.geteuid() == 0 else {}
# By its file: the interpreter and the packages of root may lie where others can't go.
ROLE = """
    import os, runpy, subprocess, sys
    hide_memory = runpy.run_path(sys.argv[1])["hide_memory"]

    def tries(pid):
        agent = "import sys; print(open(f'/proc/{sys.argv[1]}/environ').read())"
        found = subprocess.run([sys.executable, "-c", agent, str(pid)], env={}, capture_output=True, text=True)
        return found.stdout + found.stderr

    assert "hunter2" in tries(os.getpid())
    hide_memory()
    seen = tries(os.getpid())
    assert "hunter2" not in seen and "PermissionError" in seen, seen
    own = subprocess.run([sys.executable, "-c", "print(open('/proc/self/environ').read())"], env={"A": "b"}, text=True,
                         capture_output=True)
    assert "A=b" in own.stdout, own
    print("hidden")
"""


@linux
def test_an_agent_of_the_same_user_cannot_read_a_roles_environment() -> None:
    """Section F1: with PR_SET_DUMPABLE 0 the kernel refuses what the file's owner alone might read."""
    python = "/usr/bin/python3" if os.geteuid() == 0 else sys.executable
    if not Path(python).exists():
        pytest.skip("needs a Python that another user than root may start")
    done = subprocess.run(
        [python, "-c", textwrap.dedent(ROLE), hidden_memory.__file__],
        env={"PATH": os.environ["PATH"], "MILLSTREAM_PROXY_SECRET": "hunter2", "PYTHONDONTWRITEBYTECODE": "1"},
        capture_output=True,
        text=True,
        timeout=60,
        check=False,
        cwd="/",
        **AS_NOBODY,  # type: ignore[call-overload]
    )
    assert done.stdout == "hidden\n", done.stderr


@linux
def test_every_command_hides_its_memory(monkeypatch: pytest.MonkeyPatch) -> None:
    from millstream.pipeline.cli import main

    hidden: list[bool] = []
    monkeypatch.setattr(main, "hide_memory", lambda: hidden.append(True))
    monkeypatch.setattr(main, "app", lambda prog_name: None)
    main.main()
    assert hidden == [True]
