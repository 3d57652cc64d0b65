"""Every benchmark runs with ``--quick`` and writes the figures that benchmarks/README.md quotes."""

import json
import math
import os
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest

ROOT = Path(__file__).parents[2]
SPAN = {"sdk_us_per_span", "agent_us_per_span", "emit_us_per_span", "ratio"}
CALL = {"call_us", "instrumented_call_us", "traced_call_us"}
RUN = {"rollouts_per_second", "cpu_ms_per_rollout"}
KAFKA = ("Kafka, 1 agent process", "Kafka, 2 agent processes", "Kafka, 4 agent processes")
PLACES = ("in process, threads", "in process, 1 agent process", *KAFKA)
FIGURES = {
    "adapter": {"triplet_us", "triplets_per_cpu_second", "triplet_us_to_decode_us", "ratio_1000_to_10_calls"},
    "pipeline": {
        *(f"pipeline.{place}.{figure}" for place in PLACES for figure in RUN),
        *("kafka_rollout_to_sdk_span", "memory_rollout_to_sdk_span", "floor_to_sdk_span"),
        *(f"start.{figure}" for figure in ("start_p50_ms", "start_p99_ms")),
        *(f"memory.{figure}" for figure in ("idle_mib", "waiting_mib", "kib_per_waiting_attempt")),
        *(f"span.{figure}" for figure in SPAN | CALL),
    },
    "proxy": {
        *("cpu_ms_per_request", "passthrough_cpu_ms_per_request", "cpu_ratio", "cpu_ratio_at_8", "cpu_ratio_at_128"),
        *("direct_p50_ms", "added_p50_ms", "passthrough_added_p50_ms"),
        *("streams_s", "cpu_ms_per_stream", "rss_idle_mb", "rss_after_streams_mb"),
    },
    "store": {
        *("spans_per_cpu_second", "floor_spans_per_cpu_second", "ratio_to_floor", "freshness_p99_ms"),
        *("one_rollout_p50_ms", "one_rollout_p99_ms", "scan_by_name_ms", "bytes_per_span"),
    },
    "algorithms": {
        f"{name}.step_1" for name in ("control", "grpo", "dapo", "dr_grpo", "rloo", "gspo", "cispo", "ppo", "rft")
    },
    "scale": {
        *(f"open_rollouts.{unit}.{size}" for unit in ("record", "lease", "bytes") for size in (100, 1_000)),
        *("spans_of_a_rollout.span.999", "turns_of_a_conversation.kilobyte.100", "partitions.rollout.8"),
        *("members_of_a_group.claim.2", "versions_and_cancels.record.100", "waiting_attempts.kilobytes.50"),
        *("streams_of_a_proxy.stream.20", "stored_spans.ms for a rollout's spans, p50.200000"),
    },
    "tracing": SPAN | CALL,
    "virtual_time": {
        *("async_to_sync_step", "control_reward"),
        *(f"staleness_{n}.{figure}" for n in (0, 1, 4) for figure in ("s_per_step", "trainer_idle_share", "reward")),
    },
    "training": {
        *("async_to_sync_step", "control_reward"),
        *(f"staleness_{n}.{figure}" for n in (0, 1, 4) for figure in ("s_per_step", "trainer_idle_share")),
    },
}

pytestmark = [pytest.mark.slow, pytest.mark.kafka, pytest.mark.timeout(600)]


def flat(figures: dict[str, Any], prefix: str = "") -> dict[str, float]:
    """Nested figures by dotted name; those of a list of sizes and figures by size."""
    found: dict[str, float] = {}
    for name, value in figures.items():
        if isinstance(value, list):
            value = {str(size): figure for size, figure in value}
        found |= flat(value, f"{prefix}{name}.") if isinstance(value, dict) else {prefix + name: value}
    return found


@pytest.mark.parametrize("script", sorted(ROOT.glob("benchmarks/*.py")), ids=lambda path: path.stem)
def test_it_runs_and_writes_its_figures(script: Path, tmp_path: Path) -> None:
    file = tmp_path / "figures.json"
    done = subprocess.run(
        [sys.executable, script, "--quick", "--json", file],
        cwd=ROOT,
        env=os.environ | {"PYTHONPATH": str(ROOT)},
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        text=True,
        check=False,
    )
    assert done.returncode == 0, done.stdout[-5000:]
    figures = flat(json.loads(file.read_text()))
    assert figures.keys() >= FIGURES[script.stem]
    assert all(map(math.isfinite, figures.values())), figures
