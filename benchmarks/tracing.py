"""What tracing costs the agent's thread in CPU time, compared with the bare SDKs in the same run.

    python benchmarks/tracing.py [--quick] [--json FILE]

- ``sdk_us_per_span``: a span of the bare OpenTelemetry SDK.
- ``agent_us_per_span``: the same span within an attempt: adds our record, its Avro encoding and the hand-over.
  ``emit_us_per_span``: the same by `emit_span`.
- ``call_us``: a chat completion of the OpenAI SDK, answered within this process. ``instrumented_call_us``: with the
  instrumentation, not recorded. ``traced_call_us``: within an attempt.

They are measured in turns, so that noise affects all alike.
"""

import argparse
import json
import multiprocessing
import socket
import statistics
import time
from collections.abc import Callable
from pathlib import Path

import httpx2
import openai
from opentelemetry.sdk.trace import SpanProcessor, TracerProvider

import millstream as ms
from millstream.consumers.runner.hosts.process_main import AttemptSender, Channel
from millstream.producers.agent.attempt import AttemptContext
from millstream.producers.agent.process_tracer import ProcessTracer
from millstream.schemas.ids import new_id
from millstream.schemas.wire.records import RolloutTask

ROUNDS = 25
SPANS_PER_CALL = 20  # a call takes as long as that many spans
ANSWER = {
    "id": "chatcmpl-1",
    "object": "chat.completion",
    "created": 1,
    "model": "policy",
    "choices": [{"index": 0, "finish_reason": "stop", "message": {"role": "assistant", "content": "12"}}],
    "usage": {"prompt_tokens": 11, "completion_tokens": 3, "total_tokens": 14},
}


def drain(connection: socket.socket) -> None:
    """The runner's part."""
    while connection.recv(1 << 16):
        pass


def new_attempt() -> AttemptContext:
    ours, theirs = socket.socketpair()
    multiprocessing.Process(target=drain, args=(theirs,), daemon=True).start()
    task = RolloutTask(rollout_id=new_id(), group_id="g", input="null", timeout_s=1.0, lease_s=1.0, created_at=0)
    running = AttemptSender(1, Channel(ours))
    return AttemptContext(task, new_id(), running.emit, running.save)


def in_turns(works: dict[str, Callable[[int], None]], count: int) -> dict[str, float]:
    """Medians over the rounds, in microseconds of this thread's CPU for one."""
    found: dict[str, list[float]] = {name: [] for name in works}
    for _ in range(ROUNDS):
        for name, work in works.items():
            began = time.thread_time()
            work(count)
            found[name].append((time.thread_time() - began) / count * 1e6)
    return {name: statistics.median(values) for name, values in found.items()}


def measure(count: int) -> dict[str, float]:
    attempt = new_attempt()
    transport = httpx2.MockTransport(lambda request: httpx2.Response(200, json=ANSWER))
    client = openai.OpenAI(api_key="k", base_url="http://model/v1", http_client=httpx2.Client(transport=transport))

    def calls(count: int) -> None:
        for _ in range(count):
            client.chat.completions.create(model="policy", messages=[{"role": "user", "content": "add 3 to 9"}])

    found = in_turns({"call_us": calls}, count // SPANS_PER_CALL)
    tracer = ProcessTracer("benchmark")  # instruments the SDK
    provider = TracerProvider()
    provider.add_span_processor(SpanProcessor())
    bare = provider.get_tracer("bare")

    def sdk(count: int) -> None:
        for number in range(count):
            bare.start_span("step", attributes={"number": number}).end()

    def agent(count: int) -> None:
        with tracer.attempt(attempt):
            for number in range(count):
                attempt.tracer.start_span("step", attributes={"number": number}).end()

    def emit(count: int) -> None:
        with tracer.attempt(attempt):
            for number in range(count):
                ms.emit_span("step", {"number": number})

    def traced_calls(count: int) -> None:
        with tracer.attempt(attempt):
            calls(count)

    found |= in_turns({"instrumented_call_us": calls, "traced_call_us": traced_calls}, count // SPANS_PER_CALL)
    found |= in_turns({"sdk_us_per_span": sdk, "agent_us_per_span": agent, "emit_us_per_span": emit}, count)
    return found | {"ratio": found["agent_us_per_span"] / found["sdk_us_per_span"]}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--quick", action="store_true", help="fewer spans, for a look")
    parser.add_argument("--json", type=Path, help="also write the figures to this file")
    options = parser.parse_args()
    found = measure(1_000 if options.quick else 5_000)
    print(
        "a span costs the agent {agent_us_per_span:.1f} µs of CPU ({emit_us_per_span:.1f} by emit_span), "
        "the bare SDK's {sdk_us_per_span:.1f}: {ratio:.2f} ×\na call of the OpenAI SDK costs {call_us:.0f} µs, "
        "instrumented {instrumented_call_us:.0f}, and traced {traced_call_us:.0f}".format(**found)
    )
    if options.json:
        options.json.write_text(json.dumps(found, indent=2) + "\n")


if __name__ == "__main__":
    main()
