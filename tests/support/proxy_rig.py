"""A proxy over the in-memory log in front of a policy server, and what it has recorded."""

import struct
from collections.abc import AsyncIterator
from contextlib import AsyncExitStack, asynccontextmanager
from typing import Any

import aiohttp
import anthropic
import openai
from policy_server import PolicyServer
from prometheus_client import CollectorRegistry

from millstream.consumers.log.memory_log import MemoryLog
from millstream.pipeline.proxy import Proxy
from millstream.pipeline.proxy.app import ProxyPolicy
from millstream.pipeline.services.serve_aiohttp import serve
from millstream.schemas.attempt_keys import attempt_key, attempt_path
from millstream.schemas.config.settings import load_settings
from millstream.schemas.ids import new_id
from millstream.schemas.wire import codec
from millstream.schemas.wire.log import Partition
from millstream.schemas.wire.records import Span

SECRET = "s3cret" * 6
DEFAULT_POLICY = ProxyPolicy()
ANYWHERE = "http://127.0.0.1:0"


class Rig:
    """One attempt at a proxy."""

    def __init__(self, url: str, models: list[PolicyServer], log: MemoryLog, proxy: Proxy, topics: Any) -> None:
        self.url, self.models, self.log, self.proxy, self.topics = url, models, log, proxy, topics
        self.model = models[0]
        self.rollout, self.attempt = new_id(), new_id()
        self.key = attempt_key(SECRET, self.rollout, self.attempt, valid_s=60.0)
        self.base = url + attempt_path(self.rollout, self.attempt)
        self.client = openai.AsyncOpenAI(base_url=f"{self.base}/v1", api_key=self.key, max_retries=0)
        self.claude = anthropic.AsyncAnthropic(base_url=self.base, api_key=self.key, max_retries=0)

    async def close_attempt(self, key: str | None = None) -> tuple[int, Any]:
        headers = {"Authorization": f"Bearer {key or self.key}"}
        async with aiohttp.ClientSession() as session, session.post(self.base + "/close", headers=headers) as response:
            return response.status, await response.json()

    async def spans(self) -> list[Span]:
        """Everything on the events topic."""
        consumer = self.log.consumer()
        await consumer.assign([Partition(self.topics.events, n) for n in range(2)], "beginning")
        records = await consumer.poll(1000, 0.0)
        await consumer.close()
        spans = [codec.decode_as(Span, record.value) for record in records]
        return sorted(spans, key=lambda span: span.sequence)

    async def span(self) -> Span:
        (span,) = await self.spans()
        return span


@asynccontextmanager
async def rig_of(
    log: MemoryLog | None = None,
    models: int = 1,
    policy: ProxyPolicy = DEFAULT_POLICY,
    registry: CollectorRegistry | None = None,
    **settings: Any,
) -> AsyncIterator[Rig]:
    """``models``: policy servers, replicas of one upstream unless the settings say otherwise; `Rig.model` is the first
    of them. In the settings ``{url}`` stands for its address."""
    async with AsyncExitStack() as stack:
        servers = [PolicyServer() for _ in range(models)]
        urls = [await stack.enter_async_context(serve(server.app, ANYWHERE)) for server in servers]
        fixed = {"topic_prefix": "t", "kafka_partitions": 2, "proxy_secret": SECRET}
        upstreams = {"model": {"urls": urls}}
        found = load_settings(**fixed | {"upstreams": upstreams, "routes": {"*": "model"}} | _filled(settings, urls[0]))
        log = log or MemoryLog(found.topics)
        proxy = Proxy(log, found, policy, registry=registry)
        url = await stack.enter_async_context(serve(proxy.app, ANYWHERE))
        rig = Rig(url, servers, log, proxy, found.topics)
        yield rig
        await rig.client.close()
        await rig.claude.close()


def _filled(value: Any, url: str) -> Any:
    if isinstance(value, dict):
        return {key: _filled(each, url) for key, each in value.items()}
    if isinstance(value, list | tuple):
        return [_filled(each, url) for each in value]
    return value.replace("{url}", url) if isinstance(value, str) else value


def int32(ids: list[int]) -> bytes:
    return struct.pack(f"<{len(ids)}i", *ids)


def float32(values: list[float]) -> bytes:
    return struct.pack(f"<{len(values)}f", *values)
