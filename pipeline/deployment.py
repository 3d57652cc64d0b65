"""How the roles of a training run are put together: all in this process, or with processes of their own over Kafka."""

import asyncio
import os
from collections.abc import AsyncIterator, Callable, Sequence
from contextlib import AsyncExitStack, asynccontextmanager
from pathlib import Path
from secrets import token_hex
from typing import Any, Final
from urllib.parse import urlsplit

from pydantic import SecretStr

from millstream.consumers.adapter.adapter import Adapter
from millstream.consumers.adapter.triplets import ToTriplets
from millstream.consumers.log.kafka_log import KafkaLog
from millstream.consumers.log.memory_log import MemoryLog
from millstream.consumers.log.port import Log
from millstream.consumers.runner.hooks import Hook
from millstream.consumers.runner.runner import Runner
from millstream.consumers.sink.clickhouse import ClickHouseSink
from millstream.consumers.sink.sink import SinkRole
from millstream.pipeline.addresses import LOOPBACK, is_loopback
from millstream.pipeline.models.server import ModelServer
from millstream.pipeline.models.vllm_process import VllmOptions
from millstream.pipeline.models.vllm_server import VllmServer
from millstream.pipeline.proxy import Proxy
from millstream.pipeline.proxy.targets import DEFAULT
from millstream.pipeline.services.serving import serve
from millstream.pipeline.store.clickhouse import ClickHouseStore
from millstream.pipeline.training.trainer import Strategy
from millstream.schemas.config.routing import Upstream
from millstream.schemas.config.settings import Settings
from millstream.schemas.errors import ConfigError

ANYWHERE: Final = "http://127.0.0.1:0"


class MemoryStrategy:
    """Everything here but vLLM: in-memory log, embedded store in the run's folder, the engine on loopback."""

    @asynccontextmanager
    async def running(
        self,
        settings: Settings,
        *,
        agent: Any,
        model: Path | None,
        run_dir: Path,
        to_triplets: ToTriplets,
        hooks: Sequence[Hook | str] = (),
        vllm: VllmOptions | None = None,
    ) -> AsyncIterator[tuple[Log, ModelServer | None]]:
        settings = settings.model_copy(update={"clickhouse_dsn": f"chdb://{(run_dir / 'store').resolve()}"})
        log = MemoryLog(settings.topics)
        async with AsyncExitStack() as stack:
            server, urls = await _model_server(stack, settings, model, run_dir, vllm, ANYWHERE)
            settings = settings.model_copy(update={"upstreams": _upstreams(urls), "routes": {}})
            await stack.enter_async_context(_roles(log, settings, agent, to_triplets, hooks))
            yield log, server


class KafkaStrategy:
    """The log is Kafka; the model is served from here, at ``model_url``. Runners, adapter, sink and proxy are processes
    of their own; an ``agent`` given to the trainer makes it run one of each itself."""

    @asynccontextmanager
    async def running(
        self,
        settings: Settings,
        *,
        agent: Any,
        model: Path | None,
        run_dir: Path,
        to_triplets: ToTriplets,
        hooks: Sequence[Hook | str] = (),
        vllm: VllmOptions | None = None,
    ) -> AsyncIterator[tuple[Log, ModelServer | None]]:
        log = KafkaLog(settings)
        await log.create_topics()
        async with AsyncExitStack() as stack:
            server, urls = await _model_server(stack, settings, model, run_dir, vllm, settings.model_url)
            settings = settings.model_copy(update={"upstreams": settings.upstreams or _upstreams(urls)})
            if agent is not None:
                await stack.enter_async_context(_roles(log, settings, agent, to_triplets, hooks))
            yield log, server


BASE_VERSION: Final = "base.0.0"  # of a model that no trainer has touched yet
STRATEGIES: Final[dict[str, Callable[[], Strategy]]] = {"memory": MemoryStrategy, "kafka": KafkaStrategy}


async def _model_server(
    stack: AsyncExitStack,
    settings: Settings,
    model: Path | None,
    run_dir: Path,
    vllm: VllmOptions | None,
    url: str,
) -> tuple[ModelServer | None, list[str]]:
    """Serves the model at ``url`` (port 0: any free one); the server, and where its replicas are. Without a model:
    nowhere."""
    if model is None:
        return None, []
    if vllm is not None:
        parts = urlsplit(url)
        if parts.hostname is None or not is_loopback(parts.hostname):
            raise ConfigError(f"model_url {url}: vLLM serves this machine alone, at http://{LOOPBACK}:PORT")
        folder = run_dir / "vllm"
        server = VllmServer(model, vllm, settings, folder, version=BASE_VERSION, port=parts.port or 0)
        stack.push_async_callback(server.close)
        await server.start()
        return server, server.urls
    from millstream.pipeline.models.engine import Engine
    from millstream.pipeline.models.engine_http import engine_app

    engine = await asyncio.to_thread(Engine, model)
    stack.push_async_callback(engine.close)
    return engine, [await stack.enter_async_context(serve(engine_app(engine), url))]


def _upstreams(urls: list[str]) -> dict[str, Upstream]:
    return {DEFAULT: Upstream(urls=tuple(urls))} if urls else {}


@asynccontextmanager
async def _roles(
    log: Log,
    settings: Settings,
    agent: Any,
    to_triplets: ToTriplets,
    hooks: Sequence[Hook | str],
) -> AsyncIterator[None]:
    """A proxy (if there is a model), a runner, an adapter and a sink as tasks of this loop. They stop in the order in
    which records flow, so that the store has everything when this is left. What ends one of them ends the run."""
    secret = settings.proxy_secret.get_secret_value() or token_hex(32)
    topics = settings.topics
    store = await asyncio.to_thread(ClickHouseStore, settings, log)
    async with AsyncExitStack() as stack:
        stack.callback(store.close)
        await asyncio.to_thread(store.migrate)
        settings = settings.model_copy(update={"proxy_url": "", "proxy_secret": SecretStr(secret)})
        if settings.upstreams:
            url = await stack.enter_async_context(serve(Proxy(log, settings).app, ANYWHERE))
            settings = settings.model_copy(update={"proxy_url": url})
        adapter = Adapter(
            log, topics, transactional_id=f"{topics.prefix}.adapter.embedded-{os.getpid()}", to_triplets=to_triplets
        )
        runner = Runner(log, settings, agent, processes=0, drain_s=0.0, hooks=hooks)
        sink = SinkRole(log, ClickHouseSink(store, topics.events), settings)
        roles = [runner.run, adapter.run, sink.run]
        stops = [asyncio.Event() for _ in roles]
        try:
            async with asyncio.TaskGroup() as group:
                tasks = [group.create_task(role(stop)) for role, stop in zip(roles, stops, strict=True)]
                try:
                    yield
                finally:
                    for task, stop in zip(tasks, stops, strict=True):
                        stop.set()
                        await asyncio.wait([task])
        except ExceptionGroup as errors:
            raise errors.exceptions[0] from None
