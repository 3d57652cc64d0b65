"""Agent processes that run as another user than the runner."""

import asyncio
import json
import os
import pwd
import subprocess
import sys
from contextlib import suppress
from itertools import takewhile
from pathlib import Path
from tempfile import gettempdir

import pytest
from runner_rig import running, settings_for_tests, write_agent

from millstream.consumers.log.memory_log import MemoryLog
from millstream.consumers.runner.hosts.agent_user import agent_user
from millstream.consumers.runner.runner import Runner
from millstream.schemas.errors import ConfigError, MillstreamError

root = pytest.mark.skipif(os.geteuid() != 0, reason="only root may start processes as another user")
WHO = """
    import os

    def read(path):
        try:
            return open(path, "rb").read().decode()
        except OSError as error:
            return type(error).__name__

    def agent(task):
        runner = os.getppid()
        return {
            "ids": [os.getuid(), os.getgid(), os.getgroups()],
            "home": os.environ["HOME"],
            "environment": read(f"/proc/{runner}/environ"),
            "secret": read("secret.toml"),
            "own": bool(read("my_agent.py")),
        }
"""


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    """That another user may enter."""
    for each in (tmp_path, *takewhile(lambda parent: parent != Path(gettempdir()), tmp_path.parents)):
        each.chmod(0o755)
    (tmp_path / "secret.toml").write_text("hunter2")
    (tmp_path / "secret.toml").chmod(0o600)
    return write_agent(tmp_path, WHO)


def runnable_by(name: str) -> str | None:
    """An interpreter of our version that this user may start."""
    user = pwd.getpwnam(name)
    for python in (sys.executable, "/usr/bin/python3"):
        check = [python, "-c", "import sys; print(sys.version_info[:2])"]
        with suppress(OSError):
            done = subprocess.run(
                check, user=user.pw_uid, group=user.pw_gid, capture_output=True, text=True, check=False
            )
            if done.stdout.strip() == str(sys.version_info[:2]):
                return python
    return None


@pytest.fixture
def interpreter(monkeypatch: pytest.MonkeyPatch) -> None:
    """Root's own interpreter may lie where others can't go."""
    if (python := runnable_by("nobody")) is None:
        pytest.skip("needs a Python that user nobody may start")
    monkeypatch.setenv("PYTHONPATH", os.pathsep.join(filter(None, [os.environ.get("PYTHONPATH"), *sys.path])))
    monkeypatch.setattr(sys, "executable", python)


@root
@pytest.mark.usefixtures("interpreter")
async def test_agents_run_as_their_user_and_read_nothing_of_the_runner(folder: Path) -> None:
    """Section F1: neither the runner's environment nor its files."""
    nobody = pwd.getpwnam("nobody")
    options = {"processes": 1, "agent_user": "nobody", "memory_limit": 10_000, "hooks": ("my_hooks:Count",)}
    (folder / "my_hooks.py").write_text(
        "import millstream as ms\nfrom prometheus_client import Counter\nSTARTS = Counter('starts', 'x')\n"
        "class Count(ms.Hook):\n    def on_rollout_start(self, agent, runner, rollout):\n        STARTS.inc()\n"
    )
    async with running("my_agent:agent", folder, **options) as rig:
        await rig.publish([1])
        (one,) = (await rig.ends(1)).values()
    assert one.last.status == "succeeded", one.last.error
    seen = json.loads(one.last.output or "")
    assert seen["ids"] == [nobody.pw_uid, nobody.pw_gid, []]
    assert seen["home"] == nobody.pw_dir
    assert (seen["environment"], seen["secret"], seen["own"]) == ("PermissionError", "PermissionError", True)


@root
@pytest.mark.parametrize(("name", "why"), [("nobody-here", "there is no such user"), ("root", "may read everything")])
def test_a_user_that_does_not_protect_is_refused(name: str, why: str) -> None:
    with pytest.raises(ConfigError, match=rf"--agent-user {name}.*{why}"):
        agent_user(name)


def test_only_root_may_choose_a_user(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(os, "geteuid", lambda: 1000)
    with pytest.raises(ConfigError, match="start the runner as root, or leave --agent-user out"):
        agent_user("nobody")


@root
async def test_threads_have_no_user_of_their_own(tmp_path: Path) -> None:
    settings = settings_for_tests()
    runner = Runner(MemoryLog(settings.topics), settings, print, agent_user="nobody")
    with pytest.raises(ConfigError, match="--agent-user need agent processes"):
        await runner.run(asyncio.Event())


@root
async def test_a_user_that_cannot_start_python_is_named(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    python = tmp_path / "python"
    python.write_text("#!/bin/sh\n")
    python.chmod(0o700)
    monkeypatch.setattr(sys, "executable", str(python))
    settings = settings_for_tests()
    folder = write_agent(tmp_path, WHO)
    runner = Runner(
        MemoryLog(settings.topics), settings, "my_agent:agent", folder=folder, processes=1, agent_user="nobody"
    )
    with pytest.raises(MillstreamError, match="user nobody must be able to run"):
        await runner.run(asyncio.Event())
