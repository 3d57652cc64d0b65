"""Hooks around attempts: in child processes and in threads."""

import asyncio
import json
import logging
from pathlib import Path
from typing import Any

import pytest
from aiohttp import web
from prometheus_client import CollectorRegistry
from runner_rig import Ended, Rig, assert_whole, running, settings_for_tests, write_agent

import millstream as ms
from millstream.consumers.log.memory_log import MemoryLog
from millstream.consumers.runner.runner import Runner
from millstream.schemas.errors import ConfigError
from millstream.schemas.wire import codec
from millstream.schemas.wire.records import Span

AGENT = """
    import asyncio, json, os, time
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
                 tracer.input_tokens, tracer.output_tokens, tracer.errors, 0.05 <= tracer.duration_s < 5)
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
            time.sleep(0.6)
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
async def test_hooks_learn_what_the_agent_raised(
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
        name = f"attempt {one.last.attempt_id} of rollout {one.last.rollout_id}"
        assert f"{name}: hook Bad.on_rollout_start failed: SystemExit(4)" in said
        limit = "it took longer than its time limit (timeout_s) of 0.2 s"
        assert f"{name}: hook Bad.on_trace_start failed: TimeoutError('{limit}')" in said
        assert f"{name}: hook Bad.on_trace_end failed: TimeoutError('{limit}')" in said
        assert f"{name}: hook Bad.on_rollout_end failed: CancelledError()" in said
    bad = ended['"bad"'].last
    assert f"rollout {bad.rollout_id}: on_error answered 'explode', which is none of retry, fail, ignore" in said


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
        ("json:dumps", "hook 'json:dumps' can't be made: TypeError"),
        ("json:__name__", "hook 'json:__name__' is no millstream.Hook: it is a str"),
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


# --- those that come with the package


SHIPPED = """
    import os, time
    from pathlib import Path
    import millstream as ms

    def load():
        with open("loaded", "a") as file:
            file.write(f"{os.getpid()}\\n")
        time.sleep(0.2)
        return os.getpid()

    model = ms.WarmUp(load)
    monitor = ms.PerformanceMonitor(0.05)
    errors = ms.ErrorHandler({LookupError: "retry", KeyError: "fail", ValueError: "ignore"})
    backup = ms.StateBackup("backup")

    def warm(input):
        return {"model": model.value, "pid": os.getpid()}

    async def breaks(input):
        ms.emit_reward(0.25)
        raise {"index": IndexError, "key": KeyError, "value": ValueError, "type": TypeError}[input]("no good")

    def spends(input):
        if input == "bad":
            raise ValueError
        ms.emit_span("call", {"gen_ai.operation.name": "chat", "gen_ai.usage.input_tokens": 7,
                              "gen_ai.usage.output_tokens": 3})
        time.sleep(0.1)
        return {"found": "Zürich"}
"""


@HOSTS
async def test_warm_up_loads_once_in_each_process(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, processes: int
) -> None:
    monkeypatch.chdir(tmp_path)
    name = f"warm_{processes}"
    write_agent(tmp_path, SHIPPED, f"{name}.py")
    options: dict[str, Any] = {"processes": processes * 2, "concurrency": 3, "hooks": [f"{name}:model"]}
    async with running(f"{name}:warm", tmp_path, **options) as rig:
        await rig.publish(range(12))
        ended = await rig.ends(12)
    found = [json.loads(one.last.output or "") for one in ended.values()]
    assert all(one["model"] == one["pid"] for one in found)
    loaded = (tmp_path / "loaded").read_text().split()
    assert sorted(set(loaded)) == sorted(loaded)
    assert set(loaded) == {str(one["pid"]) for one in found}


async def test_warm_up_tries_again_after_a_failure() -> None:
    tries: list[int] = []

    def load() -> str:
        tries.append(1)
        if len(tries) == 1:
            raise OSError("not there yet")
        return "ready"

    warm = ms.WarmUp(load)
    with pytest.raises(OSError, match="not there yet"):
        _ = warm.value
    assert [warm.value, warm.value, len(tries)] == ["ready", "ready", 2]


@HOSTS
async def test_error_handler_maps_types_to_outcomes(tmp_path: Path, processes: int) -> None:
    name = f"errors_{processes}"
    write_agent(tmp_path, SHIPPED, f"{name}.py")
    async with running(f"{name}:breaks", tmp_path, processes=processes, hooks=[f"{name}:errors"]) as rig:
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


def test_error_handler_refuses_words_it_does_not_know() -> None:
    with pytest.raises(ConfigError, match="'again' for ValueError is none of retry, fail, ignore"):
        ms.ErrorHandler({ValueError: "again"})


async def test_performance_monitor_counts_in_all_processes_and_alerts(tmp_path: Path) -> None:
    write_agent(tmp_path, SHIPPED, "spends.py")
    options: dict[str, Any] = {
        "processes": 2,
        "concurrency": 2,
        "max_attempts_per_process": 1,  # what has been counted outlives those that counted
        "hooks": ["spends:monitor"],
    }
    settings = settings_for_tests()
    log = MemoryLog(settings.topics)
    registry, stop = CollectorRegistry(), asyncio.Event()
    runner = Runner(log, settings, "spends:spends", folder=tmp_path, **options)
    rig = Rig(log, settings, runner=asyncio.create_task(runner.run(stop)))
    await rig.publish(["a", "b", "c", "bad"])
    ended = await rig.ends(4)
    registry.register(runner)  # type: ignore[arg-type]

    def value(name: str, **labels: str) -> float | None:
        return registry.get_sample_value(name, {"agent": "spends:spends", **labels})

    assert value("millstream_agent_seconds_count", status="succeeded") == 3
    assert value("millstream_agent_seconds_count", status="failed") == 1
    assert value("millstream_agent_tokens_total", direction="input") == 21
    assert value("millstream_agent_tokens_total", direction="output") == 9
    assert value("millstream_agent_slow_total") == 3
    stop.set()
    await rig.runner
    assert not list(registry.collect())
    assert_whole(ended)
    for text, one in ended.items():
        alerts = [span for span in one.spans if span.name == "slow_attempt"]
        assert len(alerts) == (text != '"bad"')
        for alert in alerts:
            assert alert.attributes["millstream.alert.rollout_id"] == one.last.rollout_id
            assert float(alert.attributes["millstream.alert.duration_s"]) >= 0.1
    told = [codec.decode_as(Span, record.value) for record in log.partitions[settings.topics.alerts][0].records]
    assert {span.rollout_id for span in told} == {one.last.rollout_id for t, one in ended.items() if t != '"bad"'}
    assert {span.name for span in told} == {"slow_attempt"}


async def test_performance_monitor_tells_a_webhook() -> None:
    got: list[dict[str, Any]] = []

    async def take(request: web.Request) -> web.Response:
        got.append(await request.json())
        return web.Response(status=500 if len(got) == 1 else 200)

    app = web.Application()
    app.router.add_post("/alerts", take)
    server = web.AppRunner(app)
    await server.setup()
    site = web.TCPSite(server, "127.0.0.1", 0)
    await site.start()
    hook = ms.PerformanceMonitor(0.0, webhook=f"{site.name}/alerts")
    try:
        async with running(lambda task: None, hooks=[hook], concurrency=1, worker_id="w-1") as rig:
            await rig.publish([1, 2])
            ended = await rig.ends(2)
    finally:
        await server.cleanup()
    assert [one.last.status for one in ended.values()] == ["succeeded"] * 2  # although the webhook answered 500
    assert {one["rollout_id"] for one in got} == {one.last.rollout_id for one in ended.values()}
    assert {one["worker_id"] for one in got} == {"w-1"}
    assert all(one["rollout_id"] in one["text"] and one["duration_s"] >= 0 for one in got)
    with pytest.raises(ConfigError, match="'file:///etc/passwd' is no http or https URL"):
        ms.PerformanceMonitor(webhook="file:///etc/passwd")


@HOSTS
async def test_state_backup_writes_each_attempt(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, processes: int
) -> None:
    monkeypatch.chdir(tmp_path)
    name = f"backed_{processes}"
    write_agent(tmp_path, SHIPPED, f"{name}.py")
    async with running(f"{name}:spends", tmp_path, processes=processes, hooks=[f"{name}:backup"]) as rig:
        await rig.publish(["good", "bad"])
        ended = await rig.ends(2)
    states = {text: _state(tmp_path / "backup", one) for text, one in ended.items()}
    good, bad = states['"good"'], states['"bad"']
    assert (good["input"], good["status"], good["output"]) == ("good", "succeeded", {"found": "Zürich"})
    assert (good["spans"], good["tokens"]) == ({"llm": 1, "agent": 1}, {"input": 7, "output": 3})
    assert good["duration_s"] >= 0.1
    assert (bad["status"], bad["error"], bad["output"]) == ("failed", "ValueError: ", None)


async def test_state_backup_writes_to_an_object_store() -> None:
    fsspec = pytest.importorskip("fsspec")
    hook = ms.StateBackup("memory://backup-test/states")
    async with running(lambda task: {"n": task}, hooks=[hook]) as rig:
        await rig.publish([1])
        (one,) = (await rig.ends(1)).values()
    files = fsspec.filesystem("memory")
    path = f"/backup-test/states/{one.last.rollout_id}/{one.last.attempt_id}.json"
    assert files.find("/backup-test") == [path]
    assert json.loads(files.cat(path))["output"] == {"n": 1}
    with pytest.raises(ConfigError, match="StateBackup: nosuch://x can't be used"):
        ms.StateBackup("nosuch://x")


def _state(folder: Path, one: Ended) -> Any:
    (path,) = (folder / one.last.rollout_id).iterdir()  # nothing half-written beside it
    assert path.name == f"{one.last.attempt_id}.json"
    return json.loads(path.read_text())
