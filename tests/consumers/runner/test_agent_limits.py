"""What an agent may do to its process without harm to others: memory, recycling, state, misbehaviour."""

import asyncio
import json
import sys
import time
from dataclasses import replace
from pathlib import Path

import pytest
from runner_rig import assert_whole, running, write_agent

from millstream.producers.agent.state import StateError, load_state, save_state
from millstream.schemas.errors import ConfigError, MillstreamError

ROOT = Path(__file__).parents[3]
MODES = pytest.mark.parametrize("processes", [0, 1], ids=["threads", "process"])


async def test_a_process_over_its_memory_limit_ends_with_its_attempts_and_is_replaced(tmp_path: Path) -> None:
    code = """
        import asyncio
        import millstream as ms

        neighbour = asyncio.Event()

        async def agent(input):
            ms.emit_span("began")
            if str(input).startswith("hungry"):
                if input == "hungry":
                    await neighbour.wait()
                hoard = bytearray(400 << 20)
            elif input:
                neighbour.set()
            await asyncio.sleep(60 if input else 0)
            return 1.0
    """
    folder = write_agent(tmp_path, code, "hungry.py")
    async with running("hungry:agent", folder, processes=1, concurrency=2, memory_limit=300) as rig:
        await rig.publish(["hungry", "neighbour"])
        ended = await rig.ends(2)
        await rig.publish([0])
        await rig.ends(3)
        await rig.publish(["hungry alone"])
        again = await rig.ends(4)
    alone = again['"hungry alone"'].last
    assert alone.error is not None
    assert (alone.status, alone.error.type) == ("failed", "memory")
    for one in ended.values():
        assert one.last.status == "lost"  # which of the two it was is unknown
        assert one.last.error is not None
        assert one.last.error.type == "crash"
        assert "MiB of memory, the limit (--memory-limit) is 300" in one.last.error.message
    assert again["0"].last.status == "succeeded"
    assert_whole(again)


async def test_a_memory_limit_below_what_the_import_needs_is_reported(tmp_path: Path) -> None:
    folder = write_agent(tmp_path, "import time; time.sleep(60)", "big.py")
    with pytest.raises(MillstreamError, match=r"at its start: the agent process held \d+ MiB .* is 1$"):
        async with running("big:agent", folder, processes=1, memory_limit=1):
            pass


async def test_limits_of_processes_without_processes_are_refused() -> None:
    with pytest.raises(ConfigError, match="need agent processes"):
        async with running(print, memory_limit=100):
            pass


def _wait_for_ends(pids: list[str | None]) -> None:
    while any(Path(f"/proc/{pid}").exists() for pid in pids):
        time.sleep(0.02)


async def test_a_process_is_replaced_after_so_many_attempts(tmp_path: Path) -> None:
    code = """
        import asyncio, os
        async def agent(input):
            await asyncio.sleep(input)
            return os.getpid()
    """
    folder = write_agent(tmp_path, code, "worn.py")
    async with running("worn:agent", folder, processes=1, concurrency=2, max_attempts_per_process=3) as rig:
        await rig.publish([0.5 + n / 1000 for n in range(9)])
        ended = await rig.ends(9)
        pids = [one.last.output for one in ended.values()]
        assert sorted(pids.count(pid) for pid in set(pids)) == [3, 3, 3]
        await asyncio.wait_for(asyncio.to_thread(_wait_for_ends, pids), 10)  # idle ones end
    assert_whole(ended)
    assert {one.last.status for one in ended.values()} == {"succeeded"}


@MODES
async def test_a_state_lies_in_the_log_before_the_end_and_reaches_the_next_attempt(
    tmp_path: Path, processes: int
) -> None:
    code = """
        import millstream as ms

        def agent(input):
            before = ms.load_state()
            ms.save_state({"n": 1} if before is None else b"raw" if before == {"n": 1} else "done")
            return [str(before), str(ms.load_state())]
    """
    folder = write_agent(tmp_path, code, f"saves_{processes}.py")
    seen = []
    async with running(f"saves_{processes}:agent", folder, processes=processes) as rig:
        (task,) = await rig.publish([0])
        for n in range(3):
            one = (await rig.ends(n + 1))[task.input]
            assert one.order == ["preparing", "running", "running", "agent", "succeeded"]
            assert one.events[1].state is None
            assert one.events[2].state is not None
            seen.append(json.loads(one.last.output or ""))
            task = replace(task, attempt=n + 2, input=str(n + 1), state=one.events[2].state)
            await rig.publish_tasks([task] if n < 2 else [])
    assert seen == [["None", "{'n': 1}"], ["{'n': 1}", "b'raw'"], ["b'raw'", "done"]]


def test_invalid_states_are_refused_and_outside_a_rollout_nothing_is_saved(caplog: pytest.LogCaptureFixture) -> None:
    with pytest.raises(StateError, match="larger than 1,000,000"):
        save_state(b"x" * 1_000_001)
    with pytest.raises(StateError, match=r"a JSON value: .*set"):
        save_state({1, 2})
    save_state({"step": 1})
    assert load_state() is None


async def test_the_resume_example_continues_where_it_was_killed() -> None:
    async with running("examples.resume.agent:agent", ROOT, processes=2) as rig:
        (task,) = await rig.publish(["rivers"])
        first = (await rig.ends(1))[task.input]
        assert first.last.status == "failed"
        states = [e.state for e in first.events if e.state is not None]
        assert len(states) == 7
        again = replace(task, attempt=2, input='"brooks"', state=states[-1])
        await rig.publish_tasks([again])
        second = (await rig.ends(2))[again.input]
    assert second.last.status == "succeeded"
    assert [s.attributes["step"] for s in second.spans if s.name == "step"] == ["7", "8", "9", "10"]
    notes = json.loads(second.last.output or "").splitlines()
    assert [note.rsplit(" ", 1)[1] for note in notes] == ["1"] * 6 + ["2"] * 4


BAD = """
    import asyncio, os, sys, time
    from pathlib import Path
    import millstream as ms

    class Own(BaseException):
        pass

    class NoText:
        def __str__(self):
            raise RuntimeError("no text")

    def prints(input):
        for _ in range(100):
            sys.stdout.write("x" * (1 << 20))
        return 1.0

    def exits(input):
        sys.exit("enough")

    def raises(input):
        raise Own("own")

    def interrupts(input):
        raise KeyboardInterrupt

    def generates(input):
        yield 1

    def odd(input):
        return NoText()

    def closes(input):
        for stream in (sys.stdin, sys.stdout):
            stream.close()
        os.close(0)
        print("printed to a closed stream")

    def moves(input):
        os.chdir("/")
        raise ValueError("moved")

    def good(input):
        return os.getcwd()

    def forks(input):
        pid = os.fork()
        if not pid:
            os._exit(7)
        return os.waitstatus_to_exitcode(os.waitpid(pid, 0)[1])

    def fork_raises(input):
        pid = os.fork()
        if not pid:
            raise ValueError("in the fork")
        return os.waitstatus_to_exitcode(os.waitpid(pid, 0)[1])

    def fork_goes_on(input):
        pid = os.fork()
        ms.emit_span("both")
        if pid:
            os.waitpid(pid, 0)
        return "fork" if not pid else "parent"

    def fork_lives_on(input):
        if not os.fork():
            os.setsid()  # a kill of the group does not reach it
            while not Path("go").exists():
                time.sleep(0.01)
            ms.emit_span("late")
            ms.save_state("late")
            Path("gone").touch()
            return "late"
        return "parent"

    def after(input):
        Path("go").touch()
        while not Path("gone").exists():
            time.sleep(0.01)
        return "after"

    def agent(input):
        return globals()[input](input)

    async def async_agent(input):
        await asyncio.sleep(0)
        return globals()[input](input)

    async def fork_waits(input):
        pid = os.fork()
        while not pid:
            await asyncio.sleep(0)
        return os.waitstatus_to_exitcode(os.waitpid(pid, 0)[1])
"""

EXPECTED = {
    "prints": ("succeeded", None, ""),
    "exits": ("failed", "SystemExit", "enough"),
    "raises": ("failed", "Own", "own"),
    "interrupts": ("failed", "KeyboardInterrupt", ""),
    "generates": ("failed", "TypeError", "which nothing runs"),
    "odd": ("succeeded", None, ""),
    "moves": ("failed", "ValueError", "moved"),
    "closes": ("succeeded", None, ""),  # what it prints then is kept all the same
    "forks": ("succeeded", None, ""),
    "fork_raises": ("succeeded", None, ""),
    "fork_goes_on": ("succeeded", None, ""),
    "fork_lives_on": ("succeeded", None, ""),
    "after": ("succeeded", None, ""),
    "good": ("succeeded", None, ""),
}
OUTPUTS = {"forks": 7, "fork_raises": 1, "fork_goes_on": "parent", "fork_lives_on": "parent", "after": "after"}

RUNNER = """
    import asyncio, json, sys
    from pathlib import Path
    sys.path[:0] = [{tests!r}]
    from runner_rig import assert_whole, running

    async def main():
        async with running("bad_manners:{agent}", Path({folder!r}), processes=1, concurrency=1) as rig:
            found = {{}}
            for n, name in enumerate({names!r}):
                await rig.publish([name])
                ended = await rig.ends(n + 1)
            assert_whole(ended)
            for text, one in ended.items():
                error = one.last.error
                found[json.loads(text)] = [
                    one.last.status, error and error.type, error and error.message, one.last.output
                ]
        Path({folder!r}, "found.json").write_text(json.dumps(found))

    asyncio.run(main())
"""


@pytest.mark.parametrize("agent", ["agent", "async_agent"])
async def test_misbehaving_agents_end_only_their_own_attempt_with_a_clear_error(tmp_path: Path, agent: str) -> None:
    folder = write_agent(tmp_path, BAD, "bad_manners.py")
    script = RUNNER.format(
        tests=str(Path(__file__).parents[2] / "support"), folder=str(tmp_path), agent=agent, names=list(EXPECTED)
    )
    write_agent(tmp_path, script, "runner_of_the_bad.py")
    # A runner of its own, because of where its agents' output goes.
    with (tmp_path / "output").open("wb") as output, (tmp_path / "errors").open("wb") as errors:
        process = await asyncio.create_subprocess_exec(
            sys.executable, str(folder / "runner_of_the_bad.py"), stdout=output, stderr=errors
        )
        assert await process.wait() == 0, (tmp_path / "errors").read_text()
    said = (tmp_path / "errors").read_text()
    assert said.count("what a process that the agent has forked emits or saves is not recorded") == 3
    for how in ("failed", "succeeded"):
        assert f"a process that the agent forked came back from it ({how}) and ends here" in said
    assert (tmp_path / "errors").stat().st_size > 100 << 20  # what it printed, in lines of the log
    found = json.loads((tmp_path / "found.json").read_text())
    for name, (status, error, message) in EXPECTED.items():
        assert found[name][0] == status, name
        assert error == "" or found[name][1] == error, name
        assert message in (found[name][2] or ""), name
    assert "printed to a closed stream" in said
    assert json.loads(found["good"][3]) == str(tmp_path)
    assert {name: json.loads(found[name][3]) for name in OUTPUTS} == OUTPUTS


async def test_a_forks_event_loop_does_not_interfere_with_its_parents(tmp_path: Path) -> None:
    folder = write_agent(tmp_path, BAD, "bad_manners.py")
    async with running("bad_manners:fork_waits", folder, processes=1) as rig:
        await rig.publish([1, 2])
        ended = await rig.ends(2)
    assert_whole(ended)
    assert [(one.last.status, one.last.output) for one in ended.values()] == [("succeeded", "1")] * 2
