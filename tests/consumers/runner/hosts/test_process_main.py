"""Agent processes: how they end, what they see, and which agents they run."""

import asyncio
import json
import signal
import sys
import time
from pathlib import Path
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st
from runner_rig import Rig, assert_whole, by_input, running, settings_for_tests, write_agent

from millstream.consumers.log.memory_log import MemoryLog
from millstream.consumers.runner.hosts.frames import Frame, FrameReader, Kind, pack
from millstream.consumers.runner.hosts.processes import agent_environment
from millstream.consumers.runner.runner import Runner
from millstream.schemas.errors import ConfigError, MillstreamError

DEADLY = """
    import asyncio, os, signal, subprocess, sys
    import millstream as ms

    async def agent(input):
        ms.emit_span("began", {"pid": os.getpid()})
        if isinstance(input, str):
            await asyncio.sleep(0.3)  # the others have begun as well
            child = subprocess.Popen(["sleep", "60"], close_fds=False)
            print(child.pid, file=open(input, "w"))
            if "exit" in input:
                os._exit(3)
            os.kill(os.getpid(), signal.SIGKILL)
        await asyncio.sleep(input)
        return 1.0
"""


@pytest.mark.parametrize(
    ("how", "message"),
    [("exit", "the agent process exited with code 3"), ("kill", "the agent process was killed by SIGKILL")],
)
async def test_a_dead_process_loses_its_own_attempts_only_and_is_replaced(
    tmp_path: Path, how: str, message: str
) -> None:
    folder = write_agent(tmp_path, DEADLY, "deadly.py")
    async with running("deadly:agent", folder, processes=2, concurrency=2) as rig:
        bomb = str(tmp_path / how)
        await rig.publish([bomb, 1.0, 1.1, 1.2])
        ended = await rig.ends(4)
        pids = {text: one.spans[0].attributes["pid"] for text, one in ended.items()}
        deadly = json.dumps(bomb)
        hit = {text for text, pid in pids.items() if pid == pids[deadly]}
        assert len(hit) == 2
        for text, one in ended.items():
            assert one.last.status == ("lost" if text in hit else "succeeded")
        for text in hit:
            error = ended[text].last.error
            assert error is not None
            assert error.type == "crash"
            assert error.message == f"{message}, with 2 attempts in it: one of them ended it"
        assert_whole(ended)  # what it had said before its death is there
        assert not _alive(int((tmp_path / how).read_text()))  # what the dead one had started is gone, too
        await rig.publish([0.01, 0.02, 0.03, 0.04])
        again = await rig.ends(8)
    assert_whole(again)
    new = [one for text, one in again.items() if text not in ended]
    assert [one.last.status for one in new] == ["succeeded"] * 4
    assert pids[deadly] not in {one.spans[0].attributes["pid"] for one in new}


async def test_an_agent_that_dies_at_every_start_ends_the_runner(tmp_path: Path) -> None:
    folder = write_agent(tmp_path, "import os; os._exit(9)", "dies.py")
    with pytest.raises(MillstreamError, match="dies:agent exited with code 9 at its start"):
        async with running("dies:agent", folder, processes=2):
            pass


async def test_an_agent_that_can_not_be_imported_again_ends_the_runner(tmp_path: Path) -> None:
    code = """
        import os
        from pathlib import Path
        flag = Path("flag")
        if flag.exists():
            raise RuntimeError("the licence has run out")
        flag.touch()
        def agent(input):
            os._exit(1)
    """
    folder = write_agent(tmp_path, code, "once.py")
    settings = settings_for_tests()
    rig = Rig(MemoryLog(settings.topics), settings)
    await rig.publish([1])
    runner = Runner(rig.log, settings, "once:agent", folder=folder, processes=1)
    with pytest.raises(MillstreamError, match="the licence has run out"):
        await runner.run(asyncio.Event())
    assert [one.last.status for one in by_input(await rig.everything()).values()] == ["failed"]


async def test_an_agent_project_with_folders_named_like_ours_runs_unchanged(tmp_path: Path) -> None:
    (tmp_path / "schemas").mkdir()
    (tmp_path / "schemas" / "__init__.py").write_text("WHO = 'schemas of the agent'")
    (tmp_path / "pipeline.py").write_text("WHO = 'pipeline of the agent'")
    (tmp_path / "records.py").write_text("raise RuntimeError('imported by accident')")
    (tmp_path / "wrapt.py").write_text("raise RuntimeError('imported by accident')")
    code = """
        import sys
        import pipeline, schemas
        from millstream.schemas.wire import topics

        def agent(input):
            return [schemas.WHO, pipeline.WHO, sys.path[0], sys.stdin.read()]
    """
    folder = write_agent(tmp_path, code)
    async with running("my_agent:agent", folder, processes=1) as rig:
        await rig.publish([1])
        (one,) = (await rig.ends(1)).values()
    assert one.last.status == "succeeded", one.last.error
    assert one.last.output is not None
    assert json.loads(one.last.output) == ["schemas of the agent", "pipeline of the agent", str(tmp_path), ""]


async def test_an_agent_process_holds_no_secrets(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("MY_TOKEN", "secret")
    monkeypatch.setenv("LEDGER", "file")
    monkeypatch.setenv("OPENAI_API_KEY", "secret")
    settings = settings_for_tests(kafka_security_password="secret", proxy_secret="secret" * 6)
    monkeypatch.setenv("MILLSTREAM_KAFKA_SECURITY_PASSWORD", "secret")
    code = """
        import os
        def agent(input):
            return dict(os.environ) | {"cmdline": open("/proc/self/cmdline").read()}
    """
    folder = write_agent(tmp_path, code)
    options: dict[str, Any] = {"settings": settings, "env": ["LEDGER"], "processes": 1}
    async with running("my_agent:agent", folder, **options) as rig:
        await rig.publish([1])
        (one,) = (await rig.ends(1)).values()
    assert one.last.output is not None
    seen = json.loads(one.last.output)
    assert "secret" not in seen.values()
    assert not any(name.startswith("MILLSTREAM") for name in seen)
    assert seen["LEDGER"] == "file"
    assert "secret" not in seen["cmdline"]


async def test_a_span_that_ends_after_its_attempt_still_reaches_the_log(tmp_path: Path) -> None:
    code = """
        import asyncio
        import millstream as ms
        from opentelemetry import trace

        async def agent(input):
            span = trace.get_tracer("mine").start_span("late")
            asyncio.get_running_loop().call_later(0.3, span.end)
    """
    folder = write_agent(tmp_path, code)
    async with running("my_agent:agent", folder, processes=1) as rig:
        await rig.publish([1])
        await rig.ends(1)
        events = await rig.read_until(lambda events: len(events) == 5)
    assert [getattr(e, "status", "") if not hasattr(e, "name") else e.name for e in events] == [
        "preparing",
        "running",
        "invoke_agent my_agent:agent",
        "succeeded",
        "late",
    ]
    assert events[3].span_counts == {"agent": 1}
    assert events[4].rollout_id == events[0].rollout_id


RUNNER_THAT_DIES = """
    import asyncio, os, sys
    from pathlib import Path
    sys.path[:0] = [{tests!r}]
    from runner_rig import Rig, running

    async def main():
        async with running("my_agent:agent", Path({folder!r}), processes=2) as rig:
            await rig.publish([1, 2])
            while len(list(Path({folder!r}).glob("pid-*"))) < 2:
                await asyncio.sleep(0.01)
            os.kill(os.getpid(), 9)

    asyncio.run(main())
"""


async def test_agent_processes_do_not_outlive_a_killed_runner(tmp_path: Path) -> None:
    code = """
        import os, time
        async def agent(input):
            open(f"pid-{os.getpid()}", "w").close()
            time.sleep(60)  # blocks its loop: nothing of asyncio could notice
    """
    write_agent(tmp_path, code)
    script = RUNNER_THAT_DIES.format(tests=str(Path(__file__).parents[3] / "support"), folder=str(tmp_path))
    folder = write_agent(tmp_path, script, "runner_that_dies.py")
    process = await asyncio.create_subprocess_exec(sys.executable, str(folder / "runner_that_dies.py"))
    assert await process.wait() == -signal.SIGKILL
    await asyncio.wait_for(asyncio.to_thread(_wait_for_deaths, tmp_path), 10)


def _wait_for_deaths(folder: Path) -> None:
    pids = [int(path.name.removeprefix("pid-")) for path in folder.glob("pid-*")]
    assert len(pids) == 2
    while any(_alive(pid) for pid in pids):
        time.sleep(0.02)


def _alive(pid: int) -> bool:
    try:
        return Path(f"/proc/{pid}/stat").read_text().rsplit(")", 1)[1].split()[0] != "Z"
    except (FileNotFoundError, ProcessLookupError):
        return False


async def test_encoded_and_live_logs_hold_the_same(tmp_path: Path) -> None:
    code = """
        import millstream as ms
        def agent(input):
            ms.emit_span("é", {"deep": {"a": [1]}})
            return 0.5
    """
    folder = write_agent(tmp_path, code)
    shapes = []
    for encode in (False, True):
        settings = settings_for_tests()
        for processes in (0, 1):
            log = MemoryLog(settings.topics, encode=encode)
            async with running("my_agent:agent", folder, processes=processes, log=log, settings=settings) as rig:
                await rig.publish([1])
                (one,) = (await rig.ends(1)).values()
            shapes.append([(s.name, s.kind, dict(s.attributes), s.reward, s.sequence) for s in one.spans])
    assert all(shape == shapes[0] for shape in shapes)


@given(
    st.lists(st.tuples(st.sampled_from(Kind), st.integers(0, 2**32 - 1), st.binary(max_size=50), st.binary())),
    st.lists(st.integers(1, 40), min_size=1),
)
def test_frames_are_the_same_however_the_stream_is_cut(
    frames: list[tuple[Kind, int, bytes, bytes]], cuts: list[int]
) -> None:
    stream = b"".join(pack(*frame) for frame in frames)
    reader, found, start, turn = FrameReader(), [], 0, 0
    while start < len(stream):
        size = cuts[turn % len(cuts)]
        found += list(reader.feed(stream[start : start + size]))
        start, turn = start + size, turn + 1
    assert found == [Frame(*frame) for frame in frames]


async def test_a_tracer_runs_in_an_agent_process_like_its_agent(tmp_path: Path) -> None:
    code = """
    import asyncio
    import millstream as ms

    async def agent(input, rollout):
        await asyncio.sleep(0)
        return input * 2

    tracer = ms.Tracer(agent)

    @tracer.on_completion
    async def doubled(result, rollout):
        return {"right": result == rollout.input * 2, "size": result}
    """
    async with running("traced:tracer", write_agent(tmp_path, code, "traced.py"), processes=1) as rig:
        await rig.publish([1, 2, 3])
        ended = await rig.ends(3)
    assert_whole(ended)
    assert {text: one.rewards for text, one in ended.items()} == {"1": [1.0, 2.0], "2": [1.0, 4.0], "3": [1.0, 6.0]}
    assert {one.spans[-1].name for one in ended.values()} == {"invoke_agent traced:tracer"}


def test_an_agent_process_sees_the_basics_and_what_was_named() -> None:
    environment = {
        "PATH": "/bin",
        "HOME": "/h",
        "LC_ALL": "C",
        "PYTHONPATH": "/p",
        "MILLSTREAM_KAFKA_SECURITY_PASSWORD": "secret",
        "AWS_SECRET_ACCESS_KEY": "secret",
        "LEDGER": "file",
    }
    assert agent_environment(["LEDGER"], environment) == {
        "PATH": "/bin",
        "HOME": "/h",
        "LC_ALL": "C",
        "PYTHONPATH": "/p",
        "LEDGER": "file",
    }
    with pytest.raises(ConfigError, match="--env NOT_SET"):
        agent_environment(["NOT_SET"], environment)
