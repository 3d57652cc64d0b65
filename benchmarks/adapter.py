"""What the adapter costs in CPU time: the pure function from spans to triplets, and the processor around it.

The pure function gets decoded spans, 10 LLM calls of 512 + 512 tokens a rollout, each with the SDK's span and a reward
(3 spans a triplet). Its floor is what decoding one span of 500 bytes takes in the same run: the goal is at most 2.5
times that for each triplet. The processor reads encoded spans, decides and writes triplets, ends and marks in
transactions; over the in-memory log, which only hands records over: the cost is ours alone (Avro
included).

    python benchmarks/adapter.py [--quick] [--json FILE]
"""

import argparse
import asyncio
import json
import statistics
import struct
import time
from collections.abc import Callable, Iterable, Sequence
from pathlib import Path
from secrets import token_hex
from typing import Any

from prometheus_client import CollectorRegistry

from millstream.consumers.adapter.adapter import Adapter
from millstream.consumers.adapter.triplets import Trace, to_triplets
from millstream.consumers.log.memory_log import MemoryLog
from millstream.schemas.ids import new_id
from millstream.schemas.spans import semconv
from millstream.schemas.wire import codec, status
from millstream.schemas.wire.log import KIND_HEADER
from millstream.schemas.wire.prefixes import share
from millstream.schemas.wire.records import AttemptEvent, RolloutTask, Span, Triplet
from millstream.schemas.wire.topics import Topics

CALLS, TOKENS = 10, 512
ROUNDS = 7


def task() -> RolloutTask:
    rollout_id = new_id()
    return RolloutTask(
        rollout_id=rollout_id, group_id=rollout_id, input="null", timeout_s=60.0, lease_s=60.0, created_at=0
    )


def span(of: RolloutTask, source: str, kind: str, sequence: int, attributes: dict[str, str], **fields: object) -> Span:
    return Span(
        trace_id=token_hex(16),
        span_id=token_hex(8),
        name=kind,
        kind=kind,
        start=0,
        end=1,
        attributes=attributes,
        rollout_id=of.rollout_id,
        attempt_id="a",
        source=source,
        sequence=sequence,
        **fields,  # type: ignore[arg-type]
    )


def token_ids(numbers: Iterable[int]) -> bytes:
    return struct.pack(f"<{len(ids := list(numbers))}i", *ids)


def rollout(of: RolloutTask, calls: int) -> list[Span]:
    """Calls that go on from nothing, each with the agent's own span and a reward behind it."""
    spans = []
    for number in range(calls):
        prompt, response = token_ids([number, *range(TOKENS - 1)]), token_ids(range(TOKENS))
        asked = json.dumps([{"role": "user", "content": f"question {number}: " + "word " * TOKENS}])
        said = json.dumps({"role": "assistant", "content": "word " * TOKENS})
        key = {semconv.RESPONSE_ID: f"r{number}", semconv.RESPONSE_MODEL: "policy"}
        proxied = key | {semconv.REQUEST_MESSAGES: asked, semconv.RESPONSE_MESSAGE: said}
        tokens = {"prompt_token_ids": prompt, "response_token_ids": response, "response_logprobs": bytes(len(response))}
        spans += [
            span(of, semconv.SOURCE_PROXY, semconv.LLM, number + 1, proxied, **tokens),
            span(of, semconv.SOURCE_AGENT, semconv.LLM, 2 * number + 1, key),
            span(of, semconv.SOURCE_AGENT, semconv.REWARD, 2 * number + 2, {}, reward=1.0, reward_name="reward"),
        ]
    return spans


def cpu_us(work: Callable[[], object], times: int) -> float:
    """Median over the rounds of CPU microseconds of one call."""
    found = []
    for _ in range(ROUNDS):
        began = time.thread_time()
        for _ in range(times):
            work()
        found.append((time.thread_time() - began) / times * 1e6)
    return statistics.median(found)


def pure(quick: bool) -> dict[str, float]:
    few, many = task(), task()
    short, long = rollout(few, CALLS), rollout(many, 1000)

    def triplets(of: RolloutTask, spans: list[Span]) -> Sequence[Triplet]:
        return to_triplets(Trace(of, "a", spans))

    small = codec.encode(span(few, semconv.SOURCE_AGENT, semconv.SPAN, 1, {"text": "x" * 300}))
    times = 50 if quick else 500
    per_call = cpu_us(lambda: triplets(few, short), times) / CALLS
    per_call_of_many = cpu_us(lambda: triplets(many, long), max(times // 100, 1)) / 1000
    shared, shared_of_many = triplets(few, short), triplets(many, long)
    decode = cpu_us(lambda: codec.decode(small), times * CALLS)
    return {
        "span_bytes": len(small),
        "decode_us": decode,
        "triplet_us": per_call,
        "triplets_per_cpu_second": 1e6 / per_call,
        "triplet_us_to_decode_us": per_call / decode,
        "ratio_1000_to_10_calls": per_call_of_many / per_call,
        "share_us": cpu_us(lambda: share(shared), times) / CALLS,
        "share_ratio_1000_to_10_calls": (
            cpu_us(lambda: share(shared_of_many), 1) / 1000 / (cpu_us(lambda: share(shared), times) / CALLS)
        ),
    }


def records(of: RolloutTask, calls: int = CALLS) -> Sequence[tuple[bytes, bytes]]:
    """Kind and body of all that a rollout leaves on ``events``, as its runner and the proxy encode it."""
    spans = rollout(of, calls)
    common = {
        "rollout_id": of.rollout_id,
        "attempt_id": "a",
        "attempt": 1,
        "worker_id": "w",
        "time": 0,
        "lease_s": 60.0,
    }
    claim = AttemptEvent(**common, status=status.PREPARING, task=codec.encode(of))  # type: ignore[arg-type]
    counts = {semconv.SOURCE_PROXY: calls, semconv.SOURCE_AGENT: 2 * calls}
    end = AttemptEvent(**common, status=status.SUCCEEDED, span_counts=counts)  # type: ignore[arg-type]
    running = AttemptEvent(**common, status=status.RUNNING)  # type: ignore[arg-type]
    return [
        (status.PREPARING.encode(), codec.encode(claim)),
        (status.RUNNING.encode(), codec.encode(running)),
        *((s.kind.encode(), codec.encode(s)) for s in spans),
        (status.SUCCEEDED.encode(), codec.encode(end)),
    ]


async def settled(log: Any, topics: Topics, rollouts: int) -> float:
    """CPU seconds in which an adapter settles so many."""
    producer = log.producer()
    for _ in range(rollouts):
        one = task()
        for kind, body in records(one):
            producer.send(topics.events, body, key=one.rollout_id, headers={KIND_HEADER: kind})
    await asyncio.to_thread(producer.flush, 60)
    registry, stop = CollectorRegistry(), asyncio.Event()
    adapter = Adapter(log, topics, transactional_id=f"{topics.prefix}.benchmark", registry=registry)
    labels = {"mode": "train", "status": "succeeded"}
    began = time.process_time()
    running = asyncio.create_task(adapter.run(stop))
    while (registry.get_sample_value("millstream_rollouts_ended_total", labels) or 0) < rollouts:  # noqa: ASYNC110
        await asyncio.sleep(0.01)
    used = time.process_time() - began
    stop.set()
    await running
    await asyncio.to_thread(producer.close)
    return used


def processor(rollouts: int) -> float:
    """Triplets per CPU-second of an adapter at work."""
    topics = Topics()
    return rollouts * CALLS / asyncio.run(settled(MemoryLog(topics, encode=True), topics, rollouts))


def measure(quick: bool) -> dict[str, float]:
    return pure(quick) | {"processor_triplets_per_cpu_second": processor(50 if quick else 500)}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--quick", action="store_true", help="fewer rollouts, for a look")
    parser.add_argument("--json", type=Path, help="also write the figures to this file")
    options = parser.parse_args()
    found = measure(options.quick)
    print(
        f"a triplet takes {found['triplet_us']:.1f} µs of CPU, {found['triplet_us_to_decode_us']:.2f} × the decoding "
        f"of a span of {found['span_bytes']:.0f} bytes ({found['decode_us']:.1f} µs); with 1,000 calls in a rollout "
        f"{found['ratio_1000_to_10_calls']:.2f} × that\n"
        f"sharing prompts {found['share_us']:.1f} µs; "
        f"the whole processor {found['processor_triplets_per_cpu_second']:,.0f} triplets per CPU-second"
    )
    if options.json:
        options.json.write_text(json.dumps(found, indent=2) + "\n")


if __name__ == "__main__":
    main()
