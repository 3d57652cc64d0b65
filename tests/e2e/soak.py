"""An hour of traffic through all roles in one process; prints what they hold that grows, as JSON.

The hour is simulated: after every hundred rollouts all clocks jump. 100,000 rollouts are the whole: 1,000 policy
versions and 10,000 cancels.

python tests/e2e/soak.py --rollouts 2000
"""

import argparse
import asyncio
import gc
import json
import logging
import os
import sys
import tempfile
import time
from collections import Counter, deque
from collections.abc import Collection, Coroutine, Iterator, Mapping
from contextlib import AsyncExitStack
from pathlib import Path
from typing import Any

import httpx
import jumping_clock  # before anything of ours
from aiohttp import web

import millstream as ms
from millstream.consumers.adapter.adapter import Adapter
from millstream.consumers.log.memory_log import MemoryLog
from millstream.consumers.log.memory_storage import MemoryStorage
from millstream.consumers.log.port import Consumer
from millstream.consumers.runner.runner import Runner
from millstream.consumers.sink.port import Batch, Unusable
from millstream.consumers.sink.sink import FlushPolicy, SinkRole
from millstream.pipeline.proxy import Proxy
from millstream.pipeline.proxy.app import ProxyPolicy
from millstream.pipeline.proxy.attempts import AttemptPolicy
from millstream.pipeline.services.gateway import Gateway
from millstream.pipeline.services.health import Health
from millstream.pipeline.services.serve_aiohttp import serve
from millstream.producers.control import publish_control, publish_resources
from millstream.schemas.config.settings import load_settings
from millstream.schemas.control import LLM, Arm, Resources, RoutingTable
from millstream.schemas.ids import new_id
from millstream.schemas.wire import codec
from millstream.schemas.wire.log import Partition
from millstream.schemas.wire.records import RolloutEnd

STEP = 100  # rollouts of a policy version; a tenth of them is cancelled
BACKOFF_S = 4.0  # simulated: by then a failed attempt is retried
WARM_UP = 0.4  # of all steps, until everything has its size
KEPT_S = 360.0  # what is kept for an hour; so that it reaches its size
SLACK = 60  # elements by which a container may be larger at one time than at another
HELD = 500  # records of a partition that the log keeps
# What has a size that an hour does not reach: the end of its path, and the limit of its elements.
BOUNDED = {
    "._control._resources": 1000,
    "._control._resources[].items": 1000,
    "._control._cancels": 100_000,
    ".settled._recent": 4 << 14,  # of each partition, then 8 bytes a mark
    "sink._gathered.parts[]": 500,  # records of a batch; how many there are depends on when one looks
    "sink._gathered.parts[][].headers": 500,
}
ANYWHERE = "http://127.0.0.1:0"


OF_ROLES = ("millstream", "prometheus_client")  # whose objects are looked into
CONTAINERS = (dict, list, set, frozenset, deque)


class ShortLog(MemoryLog):
    """A log in memory that forgets, as a real one does."""

    def forget(self, kept: int) -> None:
        """Keeps the last records of each partition."""
        with self.lock:
            for partition in (one for topic in self.partitions.values() for one in topic):
                records = partition.records
                at = len(records) - kept - 1
                while at >= 0 and records[at] is not None:
                    records[at] = None
                    at -= 1


def container_sizes(**roots: Any) -> Counter[str]:
    """Path → number of elements, of every container that hangs on these objects; those of like objects are added up."""
    sizes: Counter[str] = Counter()
    seen: set[int] = set()
    to_see: list[tuple[str, Any]] = list(roots.items())
    while to_see:
        path, value = to_see.pop()
        if id(value) in seen or isinstance(value, MemoryStorage):
            continue
        seen.add(id(value))
        if isinstance(value, CONTAINERS):
            sizes[path] += len(value)
            inside = list(value.values()) if isinstance(value, Mapping) else list(value)
            to_see += [(f"{path}[]", each) for each in inside if _looked_into(each)]
        elif isinstance(value, tuple):
            to_see += [(path, each) for each in value if _looked_into(each)]
        elif isinstance(value, asyncio.Queue):
            sizes[path] += value.qsize()
        else:
            to_see += [(f"{path}.{name}", each) for name, each in _attributes(value) if _looked_into(each)]
    return sizes


def _looked_into(value: Any) -> bool:
    if isinstance(value, Collection) and not isinstance(value, str | bytes | bytearray):
        return True
    return type(value).__module__.partition(".")[0] in OF_ROLES or isinstance(value, asyncio.Queue)


def _attributes(value: Any) -> Iterator[tuple[str, Any]]:
    if not _looked_into(value):
        return
    yield from getattr(value, "__dict__", {}).items()
    for kind in type(value).__mro__:
        names = getattr(kind, "__slots__", ())
        for name in [names] if isinstance(names, str) else names:
            if hasattr(value, name):
                yield name, getattr(value, name)


class Counting:
    """A sink that keeps nothing."""

    def __init__(self) -> None:
        self.records: Counter[str] = Counter()

    def write(self, batch: Batch) -> list[Unusable]:
        pairs, unusable = batch.decoded()
        self.records.update(type(record).__name__ for _, record in pairs)
        return unusable

    def flush(self) -> None:
        """Nothing is held."""

    def close(self) -> None:
        """Nothing is held."""


async def answer(request: web.Request) -> web.Response:
    """A model server in vLLM's form."""
    body = await request.json()
    choice = {
        "index": 0,
        "message": {"role": "assistant", "content": "ok"},
        "finish_reason": "stop",
        "token_ids": [1, 2],
        "logprobs": {"content": [{"token": "ok", "logprob": -0.1}, {"token": "", "logprob": -0.1}]},
    }
    usage = {"prompt_tokens": 2, "completion_tokens": 2, "total_tokens": 4}
    whole = {"id": new_id(), "object": "chat.completion", "created": 0, "model": body["model"], "usage": usage}
    return web.json_response(whole | {"prompt_token_ids": [1, 2], "choices": [choice]})


class Hour:
    """All roles, and a trainer's work."""

    def __init__(self, step_s: float, folder: Path) -> None:
        """``step_s``: simulated seconds of a hundred rollouts."""
        self.step_s, self.folder = step_s, folder
        self.sink = Counting()
        self.ends: Counter[str] = Counter()
        self.published = 0
        self.stop = asyncio.Event()
        self.holding: asyncio.Queue[None] = asyncio.Queue()

    async def agent(self, task: dict[str, Any], rollout: Any) -> float:
        if task["kind"] == "held":
            self.loop.call_soon_threadsafe(self.holding.put_nowait, None)
            await asyncio.sleep(1e6)
        ms.emit_message("before the call")
        async with httpx.AsyncClient(verify=False, timeout=60.0) as client:
            body = {"model": "policy", "messages": [{"role": "user", "content": "say ok"}]}
            called = await client.post(f"{self.proxy_url}/v1/chat/completions", json=body)
        called.raise_for_status()
        if task["kind"] == "failing" and rollout.attempt == 1:
            raise RuntimeError("fails once")
        return 1.0

    async def up(self, stack: AsyncExitStack) -> None:
        self.loop = asyncio.get_running_loop()
        model = web.Application()
        model.router.add_post("/v1/chat/completions", answer)
        model_url = await stack.enter_async_context(serve(model, ANYWHERE))
        settings = load_settings(
            topic_prefix="soak",
            kafka_partitions=4,
            proxy_secret="s" * 32,
            upstreams={"policy": {"urls": [model_url]}},
            routes={"*": "policy"},
            blob_url=str(self.folder / "blobs"),
            retry_max_attempts=3,
            timeout_s=60.0,
        )
        self.log = ShortLog(settings.topics, encode=True)
        attempts = AttemptPolicy(kept_s=KEPT_S)
        self.proxy = Proxy(self.log, settings, ProxyPolicy(attempts=attempts))
        self.proxy_url = await stack.enter_async_context(serve(self.proxy.app, ANYWHERE))
        self.settings = settings = settings.model_copy(update={"proxy_url": self.proxy_url})
        topics = settings.topics
        self.adapter = Adapter(self.log, topics, transactional_id="soak")
        self.runner = Runner(self.log, settings, self.agent, concurrency=STEP, instrument="none")
        self.sinks = SinkRole(self.log, self.sink, settings, flush=FlushPolicy(rows=500, age_s=0.5))
        self.producer = self.log.producer()
        self.gateway = Gateway(self.log, self.producer, settings, Health(self.log.polls, self.stop))
        transport = httpx.ASGITransport(self.gateway.app)
        self.http = await stack.enter_async_context(httpx.AsyncClient(transport=transport, base_url="http://localhost"))
        self.consumer: Consumer = self.log.consumer()
        await self.consumer.assign([Partition(topics.triplets, n) for n in range(topics.partitions)])
        self.roles = [asyncio.create_task(role.run(self.stop)) for role in (self.adapter, self.runner, self.sinks)]
        stack.push_async_callback(self.down)

    async def down(self) -> None:
        self.stop.set()
        await asyncio.wait(self.roles)
        for role in self.roles:
            role.result()

    async def watched(self, work: Coroutine[Any, Any, None]) -> None:
        """Raises what a role raises meanwhile."""
        working = asyncio.create_task(work)
        async with asyncio.timeout(300.0 + self.step_s):
            await asyncio.wait([working, *self.roles], return_when=asyncio.FIRST_COMPLETED)
        for role in self.roles:
            if role.done():
                role.result()
                raise AssertionError(f"{role} has ended")
        working.result()

    async def step(self, number: int) -> None:
        """A policy version, its rollouts, and the time that they take."""
        topics = self.settings.topics
        llm = LLM(model="policy", model_version=f"run.0.{number}")
        version = Resources(resources_id=new_id(), experiment_id="", items={"policy": llm})
        await publish_resources(self.producer, topics, version)
        arm = Arm(version=llm.model_version, upstream="policy", served_as="policy")
        await publish_control(self.producer, topics, self.routing.deploy("policy", arm).to_control())
        kinds = ["held"] * (STEP // 10) + ["failing"] * (STEP // 50)
        kinds += ["plain"] * (STEP - len(kinds))
        answered = await self.http.post("/tasks", json=[{"input": {"kind": kind}} for kind in kinds])
        tasks = answered.raise_for_status().json()["published"]
        self.published += STEP
        for _ in range(STEP // 10):
            await self.holding.get()
        for task in tasks[: STEP // 10]:
            cancelled = await self.http.post("/cancel", json={"rollout": task["rollout_id"]})
            cancelled.raise_for_status()
        self.producer.send(topics.events, b"no record", key=tasks[0]["rollout_id"])
        status = await self.http.get(f"/rollouts/{tasks[-1]['rollout_id']}")
        status.raise_for_status()
        await self.until(self.published - STEP // 50)
        jumping_clock.jump(BACKOFF_S)
        await self.until(self.published)
        jumping_clock.jump(max(self.step_s - BACKOFF_S, 0.0))
        self.log.forget(HELD)

    routing = RoutingTable()

    async def until(self, ended: int) -> None:
        while self.ends.total() < ended:
            for record in await self.consumer.poll(1000, 0.1):
                value = codec.decode(record.value)
                if isinstance(value, RolloutEnd):
                    self.ends[value.status] += 1

    def sizes(self) -> Counter[str]:
        return container_sizes(
            adapter=self.adapter, runner=self.runner, sink=self.sinks, proxy=self.proxy, gateway=self.gateway
        )


def resident_mb() -> float:
    return int(Path("/proc/self/statm").read_text().split()[1]) * os.sysconf("SC_PAGE_SIZE") / 1e6


async def run(rollouts: int, folder: Path) -> dict[str, Any]:
    steps = rollouts // STEP
    hour = Hour(3600.0 / steps, folder)
    warm = int(steps * WARM_UP)
    peaks: list[Counter[str]] = [Counter(), Counter()]  # of the first half after the warm-up, and of the second
    began, memory = time.perf_counter(), []
    async with AsyncExitStack() as stack:
        await hour.up(stack)
        for number in range(steps):
            await hour.watched(hour.step(number))
            if number >= warm and number % max(1, steps // 50) == 0:
                peaks[(number - warm) * 2 // (steps - warm)] |= hour.sizes()
                gc.collect()
                memory.append(round(resident_mb(), 1))
    growing = {
        path: (peaks[0][path], size)
        for path, size in peaks[1].items()
        if size > peaks[0][path] * 1.1 + SLACK
        and not any(path.endswith(end) and size <= limit for end, limit in BOUNDED.items())
    }
    return {
        "growing": growing,
        "ends": hour.ends,
        "records": hour.sink.records,
        "seconds": round(time.perf_counter() - began, 1),
        "resident_mb": memory,
        "largest": dict(peaks[1].most_common(20)),
    }


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--rollouts", type=int, default=2000)
    options = parser.parse_args()
    logging.basicConfig(level=logging.ERROR)
    with tempfile.TemporaryDirectory() as folder:
        json.dump(asyncio.run(run(options.rollouts, Path(folder))), sys.stdout, indent=1)
