"""A gateway over HTTP, on a real Kafka."""

import asyncio
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from typing import Any

import aiohttp

from millstream.consumers.log.kafka_log import KafkaLog
from millstream.pipeline.addresses import LOOPBACK
from millstream.pipeline.services.gateway import Gateway, GatewayPolicy
from millstream.pipeline.services.health import Health
from millstream.pipeline.services.serve_asgi import listen, uvicorn_server
from millstream.producers.log.acks import send_acknowledged
from millstream.producers.log.port import Producer
from millstream.schemas.config.settings import Settings
from millstream.schemas.wire.records import AttemptEvent, RolloutEnd


class Client:
    def __init__(self, http: aiohttp.ClientSession, log: KafkaLog, producer: Producer, settings: Settings) -> None:
        self.http, self.log, self.producer, self.settings = http, log, producer, settings
        self.url = str(http._base_url)

    async def get(self, path: str, **headers: str) -> tuple[int, Any]:
        async with self.http.get(path, headers=headers) as answer:
            as_json = answer.content_type == "application/json"
            return answer.status, await (answer.json() if as_json else answer.text())

    async def post(self, path: str, body: Any) -> tuple[int, Any]:
        async with self.http.post(path, json=body) as answer:
            return answer.status, await answer.json()

    async def send(self, *records: AttemptEvent | RolloutEnd) -> None:
        for record in records:
            await send_acknowledged(self.producer, self.settings.topics.events, record, key=record.rollout_id)


@asynccontextmanager
async def serving(settings: Settings, *policy: GatewayPolicy) -> AsyncIterator[Client]:
    log = KafkaLog(settings)
    await log.create_topics()
    producer = log.producer()
    health = Health(log.polls, asyncio.Event())
    server = uvicorn_server(Gateway(log, producer, settings, health, *policy).app)
    listener = listen(LOOPBACK, 0)
    running = asyncio.create_task(server.serve(sockets=[listener]))
    try:
        async with aiohttp.ClientSession(f"http://127.0.0.1:{listener.getsockname()[1]}") as http:
            yield Client(http, log, producer, settings)
    finally:
        server.should_exit = True
        await running
        await asyncio.to_thread(producer.close)
