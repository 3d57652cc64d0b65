"""``make demo-vllm``: the calculator learns through a real vLLM, and not by itself."""

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest

pytest.importorskip("torch")

ROOT = Path(__file__).parents[2]
pytestmark = [pytest.mark.vllm, pytest.mark.torch, pytest.mark.slow, pytest.mark.timeout(2400)]


def run_demo(folder, *options):
    """Exit code, summary, and the model calls of each version that succeeded and failed."""
    command = [sys.executable, "-m", "examples.calculator.demo", "--vllm", "--run-dir", str(folder), *options]
    ended = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, check=False)
    assert (folder / "summary.json").exists(), ended.stdout[-3000:] + ended.stderr[-3000:]
    query = """
        SELECT ModelVersion, countIf(ResponseTokens = 1) AS answered, countIf(StatusCode != 'Ok') AS failed
        FROM spans WHERE Source = 'proxy' GROUP BY ModelVersion
    """
    asked = subprocess.run(
        [sys.executable, "-m", "millstream.pipeline", "sql", "--json", query],
        cwd=ROOT,
        env=os.environ | {"MILLSTREAM_CLICKHOUSE_DSN": f"chdb://{folder / 'store'}"},
        capture_output=True,
        text=True,
        check=True,
    )
    calls = {row["ModelVersion"]: (row["answered"], row["failed"]) for row in json.loads(asked.stdout)}
    return ended.returncode, json.loads((folder / "summary.json").read_text()), calls


def assert_new_weights_after_each_step(summary, calls):
    steps = len(summary["by_version"])
    assert [row["model_version"] for row in summary["by_version"]] == [f"calculator.0.{n}" for n in range(steps)]
    for step in range(steps):  # two calls of each of 16 × 8 rollouts, and each says who made its token
        answered, failed = calls[f"calculator.0.{step}"]
        assert (answered >= 256, failed) == (True, 0)


def test_the_agent_learns_with_new_weights_after_each_step(tmp_path):
    code, summary, calls = run_demo(tmp_path)
    assert code == 0, summary
    assert_new_weights_after_each_step(summary, calls)


@pytest.mark.kafka
def test_over_kafka_it_begins_to_learn_as_well(tmp_path):
    _, summary, calls = run_demo(tmp_path, "--kafka", "--max-steps", "10")
    assert_new_weights_after_each_step(summary, calls)
    rewards = [row["mean_reward"] for row in summary["by_version"]]
    assert len(rewards) == 10
    assert max(rewards[:2]) < 0.1
    assert min(rewards[-3:]) > 0.2  # without a learning rate it stays below 0.1: see the next test


def test_without_a_learning_rate_nothing_is_learnt(tmp_path):
    code, summary, calls = run_demo(tmp_path, "--lr", "0", "--max-steps", "6")
    assert code == 1
    assert max(row["mean_reward"] for row in summary["by_version"]) < 0.1
    assert len(calls) == 7  # new versions all the same: of six steps, and of the validation
