"""Limits: calls beyond them wait in a bounded queue."""

import asyncio

import openai
import pytest
from proxy_rig import rig_of

from millstream.pipeline.proxy.limits import Bucket, Busy, Limiter
from millstream.schemas.config.upstreams import Limits

ASKED = {"model": "policy", "messages": [{"role": "user", "content": "say one"}]}


def test_a_bucket_may_be_overdrawn_and_fills_again():
    bucket = Bucket(60, now=0.0)
    bucket.take(60, now=0.0)
    assert bucket.wait_s(0.0) == 1.0
    bucket.take(59, now=0.0)
    assert bucket.wait_s(0.0) == 60.0
    assert bucket.wait_s(60.0) == 0.0
    assert bucket.wait_s(1e6) == 0.0
    bucket.take(60, now=1e6)  # never more than a minute's worth
    assert bucket.wait_s(1e6) == 1.0


async def test_concurrent_calls_are_limited():
    limiter = Limiter("x", Limits(max_concurrency=2, max_queue=1))
    running, most, release = 0, 0, asyncio.Event()

    async def call():
        nonlocal running, most
        async with limiter.call(asyncio.get_running_loop().time() + 5):
            running += 1
            most = max(most, running)
            await release.wait()
            running -= 1

    calls = [asyncio.create_task(call()) for _ in range(3)]
    await asyncio.sleep(0)  # all three have begun
    assert limiter.waiting == 1
    with pytest.raises(Busy, match="too many calls for x"):
        await call()
    release.set()
    await asyncio.gather(*calls)
    assert most == 2


async def test_a_wait_beyond_the_deadline_is_refused_at_once_and_gives_back_its_slot():
    now = 0.0
    limiter = Limiter("x", Limits(requests_per_minute=1, max_concurrency=1), clock=lambda: now)
    async with limiter.call(deadline=10.0):
        pass
    for _ in range(2):
        with pytest.raises(Busy) as busy:
            async with limiter.call(deadline=10.0):
                pass
        assert busy.value.retry_after_s == 60.0
    now = 60.0
    async with limiter.call(deadline=61.0):
        pass


async def test_tokens_are_charged_when_they_are_known():
    now = 0.0
    limiter = Limiter("x", Limits(tokens_per_minute=60), clock=lambda: now)
    async with limiter.call(deadline=1.0):
        limiter.used(90)
    with pytest.raises(Busy) as busy:
        async with limiter.call(deadline=1.0):
            pass
    assert busy.value.retry_after_s == 31.0


@pytest.mark.parametrize(
    "limits",
    [
        {"key_limits": {"max_concurrency": 1, "max_queue": 0}},
        {"route_limits": {"pol*": {"max_concurrency": 1, "max_queue": 0}}},
        {"upstreams": {"model": {"urls": ["{url}"], "limits": {"max_concurrency": 1, "max_queue": 0}}}},
    ],
)
async def test_beyond_the_queue_a_client_gets_429_with_retry_after(limits):
    async with rig_of(**limits) as rig:
        rig.model.gate.clear()
        first = asyncio.create_task(rig.client.chat.completions.create(**ASKED))
        await rig.model.asked.wait()
        with pytest.raises(openai.RateLimitError) as refused:
            await rig.client.chat.completions.create(**ASKED)
        assert int(refused.value.response.headers["Retry-After"]) >= 1
        rig.model.gate.set()
        await first
        await rig.client.chat.completions.create(**ASKED)
        assert len(await rig.spans()) == 2
