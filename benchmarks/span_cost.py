"""What a span costs the agent's process, in CPU time: ours beside the bare OpenTelemetry SDK's, in one run.

Ours is all that happens in an agent process: the SDK's span, our record, its Avro encoding, the hand-over.
The runs take turns, so that a noisy machine disturbs both alike.

    python benchmarks/span_cost.py [--quick] [--json FILE]
"""

import argparse
import json
import socket
import statistics
import threading
import time
from pathlib import Path

from opentelemetry.sdk.trace import SpanProcessor, TracerProvider

import millstream as ms
from millstream.consumers.agent_process import _Channel, _Running
from millstream.producers.attempt_context import Attempt
from millstream.producers.tracer import ProcessTracer
from millstream.schemas.ids import new_id
from millstream.schemas.records import RolloutTask

ROUNDS = 7


def drain(connection: socket.socket) -> None:
    while connection.recv(1 << 20):
        pass


def measure(count: int) -> dict[str, float]:
    """Medians over the rounds, in microseconds of CPU per span, and their ratio."""
    ours, theirs = socket.socketpair()
    threading.Thread(target=drain, args=(theirs,), daemon=True).start()
    task = RolloutTask(rollout_id=new_id(), group_id="g", input="null", timeout_s=1.0, lease_s=1.0, created_at=0)
    running = _Running(1, _Channel(ours))
    attempt = Attempt(task, new_id(), running.emit, running.save)
    tracer = ProcessTracer("benchmark")
    bare_provider = TracerProvider()
    bare_provider.add_span_processor(SpanProcessor())
    bare = bare_provider.get_tracer("bare")

    def with_sdk() -> None:
        for number in range(count):
            bare.start_span("step", attributes={"number": number}).end()

    def with_us() -> None:
        with tracer.attempt(attempt):
            for number in range(count):
                ms.emit_span("step", {"number": number})

    found: dict[str, list[float]] = {"sdk_us_per_span": [], "agent_us_per_span": []}
    for _ in range(ROUNDS):
        for name, work in (("sdk_us_per_span", with_sdk), ("agent_us_per_span", with_us)):
            began = time.thread_time()
            work()
            found[name].append((time.thread_time() - began) / count * 1e6)
    medians = {name: statistics.median(values) for name, values in found.items()}
    return medians | {"ratio": medians["agent_us_per_span"] / medians["sdk_us_per_span"]}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--quick", action="store_true", help="fewer spans, for a look")
    parser.add_argument("--json", type=Path, help="also write the figures to this file")
    options = parser.parse_args()
    found = measure(2_000 if options.quick else 20_000)
    print(
        f"a span costs the agent {found['agent_us_per_span']:.1f} µs of CPU, "
        f"the bare SDK's {found['sdk_us_per_span']:.1f} µs: {found['ratio']:.2f} ×"
    )
    if options.json:
        options.json.write_text(json.dumps(found, indent=2) + "\n")


if __name__ == "__main__":
    main()
