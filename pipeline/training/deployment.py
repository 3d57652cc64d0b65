"""The strategies of a trainer: all roles in this process, or separate processes over Kafka."""

import asyncio
import os
from collections.abc import AsyncIterator, Callable, Coroutine
from contextlib import AsyncExitStack, asynccontextmanager
from dataclasses import replace
from functools import partial
from secrets import token_hex
from typing import Any, Final
from urllib.parse import urlsplit

from pydantic import SecretStr

from millstream.consumers.adapter.adapter import Adapter
from millstream.consumers.log.kafka_log import KafkaLog
from millstream.consumers.log.memory_log import MemoryLog
from millstream.consumers.log.port import Log
from millstream.consumers.runner.runner import Runner
from millstream.consumers.sink.clickhouse import open_clickhouse_sink
from millstream.consumers.sink.sink import SinkRole
from millstream.pipeline.addresses import LOOPBACK, is_loopback
from millstream.pipeline.models.server import ModelServer
from millstream.pipeline.models.vllm_server import VllmServer
from millstream.pipeline.proxy import Proxy
from millstream.pipeline.proxy.upstreams.targets import DEFAULT
from millstream.pipeline.services.serve_aiohttp import serve
from millstream.pipeline.training.strategy import Setup, Strategy
from millstream.producers.supervisor import supervised, supervisor
from millstream.schemas.config.settings import Settings
from millstream.schemas.config.upstreams import Upstream
from millstream.schemas.errors import ConfigError

ANY_PORT: Final = f"http://{LOOPBACK}:0"
BASE_VERSION: Final = "base.0.0"  # of a model that no trainer has updated yet


@asynccontextmanager
async def in_memory(setup: Setup) -> AsyncIterator[tuple[Log, ModelServer | None]]:
    """All roles in this process: in-memory log, embedded store in the run's folder, the engine on loopback. Only vLLM
    runs as a process."""
    settings = store_settings(setup)
    log = MemoryLog(settings.topics)
    async with _supervised(), _served_model(setup, ANY_PORT) as (server, urls):
        settings = settings.model_copy(update=_around(settings, urls))
        async with _local_roles(log, replace(setup, settings=settings)):
            yield log, server


def store_settings(setup: Setup) -> Settings:
    """Of the store of a run in memory: embedded, in the run's folder."""
    dsn = f"chdb://{(setup.run_dir / 'store').resolve()}"
    return setup.settings.model_copy(update={"clickhouse_dsn": dsn, "clickhouse_cluster": ""})


@asynccontextmanager
async def over_kafka(setup: Setup) -> AsyncIterator[tuple[Log, ModelServer | None]]:
    """The log is Kafka, and this process serves the model at ``model_url``. Runners, adapter, sink and proxy are
    separate processes; an ``agent`` given to the trainer runs here, with one of each."""
    settings = setup.settings
    log = KafkaLog(settings)
    await log.create_topics()
    async with _supervised(), _served_model(setup, settings.model_url) as (server, urls):
        if setup.agent is None:
            yield log, server
            return
        settings = settings.model_copy(update={"upstreams": settings.upstreams or _upstreams(urls)})
        async with _local_roles(log, replace(setup, settings=settings)):
            yield log, server


STRATEGIES: Final[dict[str, Strategy]] = {"memory": in_memory, "kafka": over_kafka}


def strategy_of(name: str) -> Strategy:
    """Raises `ConfigError` for a name that is not in `STRATEGIES`."""
    if name not in STRATEGIES:
        raise ConfigError(f"unknown strategy {name!r}: use one of {', '.join(STRATEGIES)}")
    return STRATEGIES[name]


@asynccontextmanager
async def _supervised() -> AsyncIterator[None]:
    """Ends the body with `BackgroundFailed` if a background task of any role in it dies."""
    died, loop = asyncio.Event(), asyncio.get_running_loop()
    with supervised(lambda failure: loop.call_soon_threadsafe(died.set)) as background:

        async def watch() -> None:
            await died.wait()
            assert background.failure is not None
            raise background.failure

        try:
            async with asyncio.TaskGroup() as group:
                watching = group.create_task(watch())
                yield
                watching.cancel()
        except ExceptionGroup as errors:
            raise errors.exceptions[0] from None


@asynccontextmanager
async def _served_model(setup: Setup, url: str) -> AsyncIterator[tuple[ModelServer | None, list[str]]]:
    """Serves the model at ``url``; yields the server and the URLs of its replicas. None and no URLs without a model."""
    parts = urlsplit(url)
    if setup.model is None or not setup.rollouts:
        yield None, []
    elif parts.hostname is None or not is_loopback(parts.hostname):  # neither asks for a key
        server = "the demo engine" if setup.vllm is None else "vLLM"
        raise ConfigError(f"model_url {url}: {server} listens on this machine only, at http://{LOOPBACK}:PORT")
    elif setup.vllm is not None:
        replicas = VllmServer(
            setup.model,
            setup.vllm,
            setup.settings,
            setup.run_dir / "vllm",
            version=BASE_VERSION,
            port=parts.port or 0,
        )
        try:
            await replicas.start()
            yield replicas, replicas.urls
        finally:
            await replicas.close()
    else:
        from millstream.pipeline.models.engine import Engine  # needs torch
        from millstream.pipeline.models.engine_http import engine_app

        engine = await asyncio.to_thread(Engine, setup.model, deterministic=setup.deterministic)
        try:
            async with serve(engine_app(engine), url) as served:
                yield engine, [served]
        finally:
            await engine.close()


def _upstreams(urls: list[str]) -> dict[str, Upstream]:
    return {DEFAULT: Upstream(urls=tuple(urls))} if urls else {}


def _around(settings: Settings, urls: list[str]) -> dict[str, Any]:
    """Upstreams and routes of a run in one process: the model that it serves, and the external ones of the settings.
    Whatever these call a policy is the model here."""
    external = {name: each for name, each in settings.upstreams.items() if not each.trainable and name != DEFAULT}
    routes = {pattern: name for pattern, name in settings.routes.items() if name in external}
    served = _upstreams(urls)
    return {"upstreams": {**external, **served}, "routes": {**routes, "*": DEFAULT} if served and external else routes}


@asynccontextmanager
async def _local_roles(log: Log, setup: Setup) -> AsyncIterator[None]:
    """Runs a proxy (if there is an upstream), a runner, an adapter and a sink as tasks of this loop; without rollouts
    the sink alone. They stop in the order in which records flow, so the store has everything afterwards. A role that
    fails ends the run."""
    settings, topics = setup.settings, setup.settings.topics
    secret = settings.proxy_secret.get_secret_value() or token_hex(32)
    clickhouse = await asyncio.to_thread(open_clickhouse_sink, settings)
    async with AsyncExitStack() as stack:
        stack.callback(clickhouse.close)
        settings = settings.model_copy(update={"proxy_url": "", "proxy_secret": SecretStr(secret)})
        if settings.upstreams:
            url = await stack.enter_async_context(serve(Proxy(log, settings).app, ANY_PORT))
            settings = settings.model_copy(update={"proxy_url": url})
        setup.on_proxy(settings)
        running: dict[str, Callable[[asyncio.Event], Coroutine[Any, Any, None]]] = {}
        if setup.rollouts:
            running["runner"] = Runner(log, settings, setup.agent, processes=0, drain_s=0.0, hooks=setup.hooks).run
            name = f"{topics.prefix}.adapter.embedded-{os.getpid()}"
            running["adapter"] = Adapter(log, topics, transactional_id=name, to_triplets=setup.to_triplets).run
        running["sink"] = SinkRole(log, clickhouse, settings).run
        stops = [asyncio.Event() for _ in running]
        background, failed = supervisor(), asyncio.Event()

        def ended(task: asyncio.Task[None], name: str, stop: asyncio.Event) -> None:
            if not task.cancelled() and task.exception() is not None:
                failed.set()  # the group raises the error, and cancels the others
            elif not stop.is_set() and not failed.is_set():
                background.failed(name, asyncio.CancelledError() if task.cancelled() else None)

        try:
            async with asyncio.TaskGroup() as group:
                tasks = [group.create_task(role(stop)) for role, stop in zip(running.values(), stops, strict=True)]
                for task, name, stop in zip(tasks, running, stops, strict=True):
                    task.add_done_callback(partial(ended, name=name, stop=stop))
                try:
                    yield
                finally:
                    for task, stop in zip(tasks, stops, strict=True):
                        stop.set()
                        await asyncio.wait([task])
        except ExceptionGroup as errors:
            raise errors.exceptions[0] from None
