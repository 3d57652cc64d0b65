"""Child processes are kept running."""

import asyncio
import signal
import subprocess
import sys
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from pathlib import Path

import pytest

from millstream.pipeline.services.child_roles import ChildRole, RestartPolicy
from millstream.schemas.errors import ConfigError

QUICK = RestartPolicy(first_s=0.01, longest_s=0.02, drain_s=20)
WAITS = "import signal, sys; signal.signal(15, lambda *_: sys.exit(0)); print('up', flush=True); signal.pause()"


def python(code: str) -> list[str]:
    return [sys.executable, "-S", "-c", code]


def counting(folder: Path, then: str) -> list[str]:
    """A process that notes its start in ``folder``; ``n`` is its number."""
    before = f"import os; n = len(os.listdir({str(folder)!r})); open({str(folder)!r} + f'/{{n}}', 'w'); "
    return python(before + then)


@asynccontextmanager
async def started(child: ChildRole) -> AsyncIterator["asyncio.Task[int]"]:
    task = asyncio.create_task(child.run())
    try:
        yield task
    finally:
        task.cancel()
        await asyncio.wait([task])


@pytest.mark.parametrize(("code", "starts"), [(0, 1), (2, 1), (1, 3), (3, 3), (4, 3), (-9, 3)])
async def test_what_dies_is_started_again_unless_it_is_done_or_misconfigured(
    code: int, starts: int, tmp_path: Path
) -> None:
    dies = f"os._exit({code})" if code >= 0 else f"os.kill(os.getpid(), {-code})"
    child = ChildRole("x", counting(tmp_path, f"{dies} if n < 2 else os._exit(0)"), policy=QUICK)
    assert await asyncio.wait_for(child.run(), 20) == (0 if starts > 1 else code)
    assert child.starts == started_in(tmp_path) == starts


async def test_the_wait_grows_up_to_a_limit(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    policy = RestartPolicy(first_s=0.01, longest_s=0.03)
    child = ChildRole("x", counting(tmp_path, "os._exit(1 if n < 4 else 0)"), policy=policy)
    await asyncio.wait_for(child.run(), 20)
    assert [r.message.rpartition(" in ")[2] for r in caplog.records] == ["0.01 s", "0.02 s", "0.03 s", "0.03 s"]
    assert caplog.records[0].message == "x ended with exit code 1; it is started again in 0.01 s"


async def test_a_stop_lets_it_end_gracefully() -> None:
    child = ChildRole("x", python(WAITS), policy=QUICK)
    async with started(child) as task:
        await until_up(child)
        await child.stop()
        assert await task == 0
    assert child.pid is None


async def test_a_stop_ends_the_wait_for_the_next_start() -> None:
    child = ChildRole("x", python("import os; os._exit(1)"), policy=RestartPolicy(first_s=60))
    async with started(child) as task:
        while child.starts == 0 or child.pid is not None:  # noqa: ASYNC110 - no event
            await asyncio.sleep(0.01)
        await child.stop()
        assert await asyncio.wait_for(task, 5) == 1


async def test_one_that_does_not_end_is_killed() -> None:
    deaf = "import signal; signal.signal(15, signal.SIG_IGN); signal.pause()"
    child = ChildRole("x", python(deaf), policy=RestartPolicy(drain_s=0.2))
    async with started(child) as task:
        await until_up(child, ignores=signal.SIGTERM)
        await child.stop()
        assert await task == -signal.SIGKILL


async def test_a_missing_program_is_named() -> None:
    with pytest.raises(ConfigError, match="x can't be started: /no/such"):
        await ChildRole("x", ["/no/such"]).run()


@pytest.mark.skipif(sys.platform != "linux", reason="prctl is Linux's")
def test_no_child_outlives_a_killed_supervisor() -> None:
    code = f"""
import asyncio, sys
from millstream.pipeline.services.child_roles import ChildRole
asyncio.run(ChildRole("x", [sys.executable, "-c", {WAITS!r}]).run())
"""
    with subprocess.Popen([sys.executable, "-c", code], stdout=subprocess.PIPE, text=True) as parent:
        assert parent.stdout is not None
        assert parent.stdout.readline() == "up\n"
        parent.kill()
        assert parent.stdout.read() == ""  # the child has ended: it had the other end


async def until_up(child: ChildRole, ignores: signal.Signals | None = None) -> None:
    """Until it has started, and handles SIGTERM."""
    mask = 1 << (signal.SIGTERM - 1)
    field = "SigCgt" if ignores is None else "SigIgn"
    while True:
        await asyncio.sleep(0.01)
        if child.pid is not None and signals(child.pid, field) & mask:
            return


def signals(pid: int, field: str) -> int:
    status = Path(f"/proc/{pid}/status").read_text()
    found = next(line for line in status.splitlines() if line.startswith(field))
    return int(found.split()[1], 16)


def started_in(folder: Path) -> int:
    return len(list(folder.iterdir()))
