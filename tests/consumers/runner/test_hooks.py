"""Hooks around attempts: in child processes and in threads."""

import asyncio
import json
import logging
from pathlib import Path
from typing import Any

import pytest
from prometheus_client import CollectorRegistry
from runner_rig import Ended, Rig, assert_whole, running, settings_for_tests, write_agent

import millstream as ms
from millstream.consumers.log.memory_log import MemoryLog
from millstream.consumers.runner.runner import Runner
from millstream.schemas.errors import ConfigError

AGENT = """
    import asyncio, json, os, threading, time
    from pathlib import Path
    import millstream as ms

    def note(who, what, *more):
        with Path("notes.jsonl").open("a") as file:
            file.write(json.dumps([who, what, *more]) + "\\n")

    class First(ms.Hook):
        async def on_rollout_start(self, agent, runner, rollout):
            note("first", "rollout_start", agent.__name__, runner.agent, runner.worker_id,
                 runner.pid == os.getpid(), rollout.input)
        async def on_trace_start(self, agent, runner, tracer, rollout):
            await asyncio.sleep(0)
            ms.emit_span("hook")
            note("first", "trace_start", tracer.status)
        async def on_trace_end(self, agent, runner, tracer, rollout):
            kinds = dict(tracer.kinds)
            note("first", "trace_end", tracer.status, tracer.spans, kinds, tracer.output, repr(tracer.error),
                 tracer.input_tokens, tracer.output_tokens, tracer.errors, tracer.duration_s >= 0.05)
        async def on_rollout_end(self, agent, runner, rollout, status):
            note("first", "rollout_end", status)

    class Second(ms.Hook):
        def on_rollout_start(self, agent, runner, rollout):
            note("second", "rollout_start")
        def on_trace_start(self, agent, runner, tracer, rollout):
            ms.emit_span("hook in a thread")
            note("second", "trace_start")
        def on_trace_end(self, agent, runner, tracer, rollout):
            note("second", "trace_end")
        def on_rollout_end(self, agent, runner, rollout, status):
            note("second", "rollout_end", status)

    second = Second()

    def work(input):
        ms.emit_span("call", {"gen_ai.operation.name": "chat", "gen_ai.usage.input_tokens": 7,
                              "gen_ai.usage.output_tokens": 3})
        ms.emit_span("tool", {"gen_ai.operation.name": "execute_tool", "error.type": "Broken"})
        if input == "bad":
            raise ValueError("no good")
        return 0.5

    def sync_agent(input):
        time.sleep(0.05)
        return work(input)

    async def async_agent(input):
        await asyncio.sleep(0.05)
        return work(input)

    class Bad(ms.Hook):
        timeout_s = 0.2
        async def on_rollout_start(self, agent, runner, rollout):
            raise SystemExit(4)
        def on_trace_start(self, agent, runner, tracer, rollout):
            threading.Event().wait()
        async def on_trace_end(self, agent, runner, tracer, rollout):
            try:
                await asyncio.sleep(60)
            except asyncio.CancelledError:
                await asyncio.sleep(0.5)  # does not want to end
        def on_error(self, agent, runner, rollout, error):
            return "explode"
        def on_rollout_end(self, agent, runner, rollout, status):
            raise asyncio.CancelledError
"""

HOSTS = pytest.mark.parametrize("processes", [0, 1])
AGENTS = pytest.mark.parametrize("agent", ["sync_agent", "async_agent"])


def notes(folder: Path) -> list[Any]:
    return [json.loads(line) for line in (folder / "notes.jsonl").read_text().splitlines()]


async def run(
    folder: Path, agent: str, inputs: list[Any], hooks: list[Any], processes: int, **options: Any
) -> dict[str, Ended]:
    write_agent(folder, AGENT, f"{folder.name}.py".replace("-", "_"))  # a module of its own for each test
    hooks = [f"{folder.name.replace('-', '_')}:{h}" if isinstance(h, str) else h for h in hooks]
    options = {"concurrency": 1} | options
    path = f"{folder.name.replace('-', '_')}:{agent}"
    async with running(path, folder, processes=processes, hooks=hooks, **options) as rig:
        await rig.publish(inputs)
        ended = await rig.ends(len(inputs))
    assert_whole(ended)
    return ended


@HOSTS
@AGENTS
async def test_hooks_are_called_around_the_attempt_in_order(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, agent: str, processes: int
) -> None:
    monkeypatch.chdir(tmp_path)
    ended = await run(tmp_path, agent, ["good"], ["First", "second"], processes, worker_id="w-1")
    (one,) = ended.values()
    assert one.last.status == "succeeded"
    assert one.last.metadata == {}
    name = f"{tmp_path.name.replace('-', '_')}:{agent}"
    seen = {"span": 2, "llm": 1, "tool": 1, "reward": 1}
    assert notes(tmp_path) == [
        ["first", "rollout_start", agent, name, "w-1", True, "good"],
        ["second", "rollout_start"],
        ["first", "trace_start", None],
        ["second", "trace_start"],
        ["first", "trace_end", "succeeded", 5, seen, "0.5", "None", 7, 3, 1, True],
        ["second", "trace_end"],
        ["first", "rollout_end", "succeeded"],
        ["second", "rollout_end", "succeeded"],
    ]
    spans = {span.name: span for span in one.spans}
    assert list(spans)[:2] == ["hook", "hook in a thread"]
    root = spans[f"invoke_agent {name}"]
    assert {spans["hook"].parent_id, spans["hook in a thread"].parent_id} == {root.span_id}


@HOSTS
@AGENTS
async def test_hooks_get_the_agents_exception(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, agent: str, processes: int
) -> None:
    monkeypatch.chdir(tmp_path)
    (one,) = (await run(tmp_path, agent, ["bad"], ["First"], processes)).values()
    assert one.last.status == "failed"
    assert one.last.error is not None
    assert one.last.error.type == "ValueError"
    assert "in work" in one.last.error.stack
    calls = {note[1]: note[2:] for note in notes(tmp_path)}
    assert calls["trace_end"][:5] == ["failed", 3, {"span": 1, "llm": 1, "tool": 1}, None, "ValueError('no good')"]
    assert calls["rollout_end"] == ["failed"]


@HOSTS
@AGENTS
async def test_hooks_that_fail_or_hang_are_logged_and_harm_nothing(
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    caplog: pytest.LogCaptureFixture,
    capfd: pytest.CaptureFixture[str],
    agent: str,
    processes: int,
) -> None:
    monkeypatch.chdir(tmp_path)
    with caplog.at_level(logging.ERROR):
        ended = await run(tmp_path, agent, ["good", "bad"], ["Bad", "second"], processes, concurrency=2)
    assert ended['"good"'].last.status == "succeeded"
    assert ended['"good"'].rewards == [0.5]
    assert ended['"bad"'].last.status == "failed"
    assert ended['"bad"'].last.metadata == {}
    assert sorted(note[1] for note in notes(tmp_path)) == [
        *["rollout_end", "rollout_end", "rollout_start", "rollout_start"],
        *["trace_end", "trace_end", "trace_start", "trace_start"],
    ]
    said = caplog.text if processes == 0 else capfd.readouterr().err
    for one in ended.values():
        # Text lines of an agent process name the attempt; of a record in this process it is a field.
        name = f" rollout={one.last.rollout_id} attempt={one.last.attempt_id}" if processes else "\n"
        assert f"hook Bad.on_rollout_start failed: SystemExit(4){name}" in said
        limit = "it took longer than its time limit (timeout_s) of 0.2 s"
        assert f"hook Bad.on_trace_start failed: TimeoutError('{limit}'){name}" in said
        assert f"hook Bad.on_trace_end failed: TimeoutError('{limit}'){name}" in said
        assert f"hook Bad.on_rollout_end failed: CancelledError(){name}" in said
    assert "on_error returned 'explode', which is none of retry, fail, ignore" in said
    if not processes:
        failed = {record.attempt for record in caplog.records if hasattr(record, "attempt")}
        assert failed >= {one.last.attempt_id for one in ended.values()}


async def test_a_cancelled_attempt_ends_in_time_whatever_its_hooks_do(tmp_path: Path) -> None:
    seen: list[Any] = []

    async def agent(task: Any) -> None:
        await asyncio.sleep(60)

    class Watch(ms.Hook):
        timeout_s = 60.0

        async def on_rollout_start(self, agent: Any, runner: Any, rollout: Any) -> None:
            if rollout.input == "start":
                await asyncio.sleep(60)

        def on_trace_end(self, agent: Any, runner: Any, tracer: Any, rollout: Any) -> None:
            seen.append((rollout.input, tracer.status))

        async def on_rollout_end(self, agent: Any, runner: Any, rollout: Any, status: str) -> None:
            seen.append((rollout.input, "end", status))

    async with running(agent, hooks=[Watch()], concurrency=2) as rig:
        await rig.publish(["start", "agent"], timeout_s=0.3)
        ended = await rig.ends(2)
    assert {one.last.status for one in ended.values()} == {"timeout"}
    assert sorted(seen) == [("agent", "cancelled"), ("agent", "end", "cancelled"), ("start", "end", "cancelled")]


@pytest.mark.parametrize(
    ("hook", "message"),
    [
        ("nothing", "is not of the form module:attribute"),
        ("no_such_module:hook", "hook 'no_such_module:hook' can't be imported"),
        ("json:dumps", "hook 'json:dumps' can't be created: TypeError"),
        ("json:__name__", "hook 'json:__name__' is not a millstream.Hook: it is a str"),
    ],
)
@HOSTS
async def test_a_wrong_hook_stops_the_runner_at_its_start(
    tmp_path: Path, hook: str, message: str, processes: int
) -> None:
    folder = write_agent(tmp_path, AGENT, "wrongly_hooked.py")
    with pytest.raises(ConfigError, match=message):
        async with running("wrongly_hooked:sync_agent", folder, processes=processes, hooks=[hook]):
            pass


async def test_objects_can_not_be_hooks_of_child_processes(tmp_path: Path) -> None:
    folder = write_agent(tmp_path, AGENT, "wrongly_hooked.py")
    with pytest.raises(ConfigError, match=r"hook Hook\(…\) can't go to agent processes: name it module:attribute"):
        async with running("wrongly_hooked:sync_agent", folder, processes=1, hooks=[ms.Hook()]):
            pass


DECIDES = """
    import millstream as ms

    class Decides(ms.Hook):
        async def on_error(self, agent, runner, rollout, error):
            return {IndexError: "retry", KeyError: "fail", ValueError: "ignore"}.get(type(error))

    async def breaks(input):
        ms.emit_reward(0.25)
        raise {"index": IndexError, "key": KeyError, "value": ValueError, "type": TypeError}[input]("no good")
"""


@HOSTS
async def test_a_hook_decides_what_becomes_of_an_error(tmp_path: Path, processes: int) -> None:
    name = f"decides_{processes}"
    write_agent(tmp_path, DECIDES, f"{name}.py")
    async with running(f"{name}:breaks", tmp_path, processes=processes, hooks=[f"{name}:Decides"]) as rig:
        await rig.publish(["index", "key", "value", "type"])
        ended = {json.loads(text): one for text, one in (await rig.ends(4)).items()}
    assert_whole(ended)
    how = {text: (one.last.status, dict(one.last.metadata), one.last.error is None) for text, one in ended.items()}
    assert how == {
        "index": ("failed", {"retry": "yes"}, False),
        "key": ("failed", {"retry": "no"}, False),
        "value": ("succeeded", {"ignored": "ValueError: no good"}, True),
        "type": ("failed", {}, False),
    }
    root = next(span for span in ended["value"].spans if span.kind == "agent")
    assert root.status == "Error"  # what happened stays in the trace
    assert ended["value"].rewards == [0.25]


COUNTS = """
    import millstream as ms
    from prometheus_client import Counter

    ENDED = Counter("my_ended", "Attempts, by how they ended.", ["status"])

    class Counts(ms.Hook):
        def on_trace_end(self, agent, runner, tracer, rollout):
            ENDED.labels(tracer.status).inc()
            ms.emit_span("slow", {"millstream.alert": "slow"})

    def agent(input):
        if input == "bad":
            raise ValueError
"""


async def test_metrics_of_hooks_are_summed_over_all_processes(tmp_path: Path) -> None:
    write_agent(tmp_path, COUNTS, "counts.py")
    options: dict[str, Any] = {
        "processes": 2,
        "concurrency": 2,
        "max_attempts_per_process": 1,  # what has been counted outlives the process that counted it
        "hooks": ["counts:Counts"],
    }
    settings = settings_for_tests()
    log = MemoryLog(settings.topics)
    registry, stop = CollectorRegistry(), asyncio.Event()
    runner = Runner(log, settings, "counts:agent", folder=tmp_path, **options)
    rig = Rig(log, settings, runner=asyncio.create_task(runner.run(stop)))
    await rig.publish(["a", "b", "c", "bad"])
    ended = await rig.ends(4)
    registry.register(runner)  # type: ignore[arg-type]
    assert registry.get_sample_value("my_ended_total", {"status": "succeeded"}) == 3
    assert registry.get_sample_value("my_ended_total", {"status": "failed"}) == 1
    stop.set()
    await rig.runner
    assert not list(registry.collect())
    assert_whole(ended)
    assert [[span.kind for span in one.spans if span.name == "slow"] for one in ended.values()] == [["alert"]] * 4
