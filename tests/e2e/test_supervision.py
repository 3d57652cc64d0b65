"""Nothing dies silently: whatever a role runs in the background is supervised, and its death is seen from outside."""

import asyncio
import threading
from collections.abc import AsyncIterator, Awaitable, Callable
from contextlib import asynccontextmanager
from itertools import product
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import runner_rig
from sink_rig import publish

from millstream.consumers.adapter.adapter import Adapter
from millstream.consumers.adapter.triplets import to_triplets
from millstream.consumers.log.memory_log import MemoryLog
from millstream.consumers.log.port import Log
from millstream.consumers.runner.runner import Runner
from millstream.consumers.sink.sink import FlushPolicy, SinkRole
from millstream.pipeline.addresses import LOOPBACK, free_port
from millstream.pipeline.models.role import ModelRole
from millstream.pipeline.proxy import Proxy
from millstream.pipeline.proxy.upstreams.replicas import Failed, ReplicaPolicy, Replicas
from millstream.pipeline.services.health import Health, HealthPolicy
from millstream.pipeline.services.role_process import role_process
from millstream.pipeline.services.serve_aiohttp import serve
from millstream.pipeline.training.deployment import ANY_PORT, in_memory
from millstream.pipeline.training.strategy import Setup
from millstream.producers.supervisor import Background, Supervisor, supervisor
from millstream.schemas.config.settings import Settings
from millstream.schemas.config.upstreams import Upstream
from millstream.schemas.errors import BackgroundFailed


async def blocked(task: Any) -> None:
    await asyncio.Event().wait()


@asynccontextmanager
async def main_task(role: Any) -> AsyncIterator["asyncio.Task[None]"]:
    stop = asyncio.Event()
    running = asyncio.create_task(role.run(stop))
    try:
        yield running
    finally:
        stop.set()
        running.cancel()
        await asyncio.wait([running], timeout=20)


@asynccontextmanager
async def a_runner(log: Log, settings: Settings, folder: Path, **options: Any) -> AsyncIterator[Callable[[], bool]]:
    runner = Runner(log, settings, options.pop("agent", blocked), folder=folder, drain_s=0.0, **options)
    async with main_task(runner):
        await runner_rig.Rig(log, settings).publish([1])
        yield lambda: runner.load()[1] == 1


@asynccontextmanager
async def a_runner_of_processes(log: Log, settings: Settings, folder: Path) -> AsyncIterator[Callable[[], bool]]:
    runner_rig.write_agent(folder, "import asyncio\nasync def agent(task):\n    await asyncio.Event().wait()\n")
    options = {"agent": "my_agent:agent", "processes": 1, "memory_limit": 10_000, "instrument": "none"}
    async with a_runner(log, settings, folder, **options) as settled:
        yield settled


@asynccontextmanager
async def an_adapter(log: Log, settings: Settings, folder: Path) -> AsyncIterator[Callable[[], bool]]:
    adapter = Adapter(log, settings.topics, transactional_id="a")
    async with main_task(adapter):
        await adapter.wait_ready()
        yield lambda: True


@asynccontextmanager
async def a_sink(log: Log, settings: Settings, folder: Path) -> AsyncIterator[Callable[[], bool]]:
    storing, go_on = threading.Event(), threading.Event()

    def write(batch: Any) -> list[Any]:
        storing.set()
        go_on.wait()
        return []

    await asyncio.to_thread(publish, log, settings, 1)
    sink = SimpleNamespace(write=write, flush=lambda: None)
    async with main_task(SinkRole(log, sink, settings, flush=FlushPolicy(1, age_s=0.01), drain_s=0.1)):  # type: ignore[arg-type]
        try:
            yield storing.is_set
        finally:
            go_on.set()


@asynccontextmanager
async def a_proxy(log: Log, settings: Settings, folder: Path) -> AsyncIterator[Callable[[], bool]]:
    async with serve(Proxy(log, settings).app, ANY_PORT):
        down = Upstream(urls=(f"http://{LOOPBACK}:{free_port()}",), kind="vllm")
        replicas = Replicas("policy", down, settings.proxy_secret, ReplicaPolicy(failures=1))
        replicas.failed(replicas.all[0], Failed("it is down"))
        yield lambda: True
        replicas.close()


@asynccontextmanager
async def a_model(log: Log, settings: Settings, folder: Path) -> AsyncIterator[Callable[[], bool]]:
    server = SimpleNamespace(
        version="r.0.0",
        adapters={},
        replicas=[],
        base=SimpleNamespace(version="r.0.0", folder=folder),
        start=lambda *_: asyncio.sleep(0),
        close=lambda: asyncio.sleep(0),
    )
    async with main_task(ModelRole(log, settings.topics, server, "policy", "policy")):  # type: ignore[arg-type]
        yield lambda: any(background.name == "control" for background in supervisor().tasks)


PROCESSES = "runner of processes"  # slow to start
ROLES: dict[str, Callable[[Log, Settings, Path], Any]] = {
    "runner": a_runner,
    PROCESSES: a_runner_of_processes,
    "adapter": an_adapter,
    "sink": a_sink,
    "proxy": a_proxy,
    "model": a_model,
}
# What a role is known to run in the background, beside "loop age" and "report", which each process has. The tests take
# the tasks from the supervisor; this only shows that they find some.
KNOWN = {
    "runner": {"control", "stop", "report"},
    PROCESSES: {"control", "stop", "memory limit", "agent process"},
    "adapter": set(),
    "sink": {"delivery"},
    "proxy": {"control", "check of http"},
    "model": {"control"},
}


@asynccontextmanager
async def running(role: str, folder: Path) -> AsyncIterator[tuple[Health, Supervisor]]:
    """A role with its health, as soon as it works."""
    settings = runner_rig.settings_for_tests(proxy_secret="s" * 32)
    log, patient = MemoryLog(settings.topics), HealthPolicy(check_s=3600.0)  # else it would end this process
    async with (
        role_process(log, settings, role, 0, asyncio.Event(), patient) as health,
        ROLES[role](log, settings, folder) as settled,
    ):
        await until(settled)
        await until(lambda: all(times.last_poll is not None for times in log.polls()))
        yield health, supervisor()


async def until(true: Callable[[], bool]) -> None:
    async with asyncio.timeout(20):
        while not true():  # noqa: ASYNC110 - no event
            await asyncio.sleep(0.01)


def break_off(background: Background) -> None:
    """The error reaches the task where it waits; a task that waits for another one can only be cancelled."""
    waits_for = background.task._fut_waiter  # type: ignore[attr-defined]
    if type(waits_for) is asyncio.Future or type(waits_for).__name__ == "Future":
        waits_for.set_exception(RuntimeError("a bug"))
    else:
        background.task.cancel()


def cancel(background: Background) -> None:
    background.task.cancel()


@pytest.mark.parametrize(
    ("role", "end"), [*product(ROLES, [cancel]), *product(sorted(ROLES.keys() - {PROCESSES}), [break_off])]
)
async def test_the_death_of_any_background_task_fails_the_probes(
    role: str, end: Callable[[Background], None], tmp_path: Path
) -> None:
    """Section B1: each task that the supervisor lists is ended in turn, in a new role."""
    names: list[str] = []
    for number in range(20):
        async with running(role, tmp_path) as (health, background):
            tasks = sorted(background.tasks, key=lambda task: task.name)
            if number >= len(tasks):
                break
            assert health.answer("/livez")[0] == 200
            names.append(tasks[number].name)
            end(tasks[number])
            await until(lambda: health.answer("/livez")[0] == 503)
            assert f"task {names[-1]} " in health.answer("/livez")[1].decode()
            assert health.answer("/readyz")[0] == 503
    assert all(any(name.startswith(known) for name in names) for known in KNOWN[role] | {"loop age", "report"}), names


async def test_an_agent_that_stops_the_loop_of_all_agents_fails_the_probes(tmp_path: Path) -> None:
    async def stopping(task: Any) -> None:
        asyncio.get_running_loop().stop()
        await asyncio.Event().wait()

    settings = runner_rig.settings_for_tests()
    log, patient = MemoryLog(settings.topics), HealthPolicy(check_s=3600.0)
    async with (
        role_process(log, settings, "runner", 0, asyncio.Event(), patient) as health,
        a_runner(log, settings, tmp_path, agent=stopping),
    ):
        await until(lambda: health.answer("/livez")[0] == 503)
        assert "an agent has stopped the event loop" in health.answer("/livez")[1].decode()


def agent(task: Any) -> None:
    pass


@asynccontextmanager
async def embedded(folder: Path) -> AsyncIterator[None]:
    settings = runner_rig.settings_for_tests()
    setup = Setup(settings=settings, agent=agent, to_triplets=to_triplets, run_dir=folder)
    async with in_memory(setup):
        yield


async def test_the_death_of_any_task_ends_a_run_in_one_process(tmp_path: Path) -> None:
    """Section B1: the roles themselves, and what each runs in the background."""

    async def body(end: Callable[[], Awaitable[bool]]) -> bool:
        async with embedded(tmp_path), asyncio.timeout(60):
            if not await end():
                return False
            await asyncio.Event().wait()
        return True

    names: list[str] = []
    for number in range(20):

        async def end(number: int = number) -> bool:
            await until(lambda: any(task.name == "stop" for task in supervisor().tasks))
            roles = [t for t in asyncio.all_tasks() if "run" in t.get_coro().__qualname__.split(".")]  # type: ignore[union-attr]
            every = sorted(
                [(task.get_coro().__qualname__, task) for task in roles]  # type: ignore[union-attr]
                + [(background.name, background.task) for background in supervisor().tasks],
                key=lambda found: found[0],
            )
            if number >= len(every):
                return False
            names.append(every[number][0])
            every[number][1].cancel()
            return True

        try:
            ended = await body(end)
        except BackgroundFailed:
            continue
        assert not ended
        break
    assert {"Runner.run", "Adapter.run", "SinkRole.run", "control", "report", "stop"} <= set(names)
