"""``make demo-vllm``: the calculator learns through a real vLLM, and not by itself."""

import asyncio
import json
import os
import subprocess
import sys
from pathlib import Path

import aiohttp
import pytest

pytest.importorskip("torch")

from vllm_rig import ARGS, PYTHON

from millstream.pipeline.models.vllm_process import VllmOptions
from millstream.pipeline.models.vllm_server import VllmServer
from millstream.schemas.config.settings import load_settings

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


def test_the_agent_learns_with_new_weights_after_each_step_and_vllm_serves_the_best_ones(tmp_path):
    code, summary, calls = run_demo(tmp_path)
    assert code == 0, summary
    assert_new_weights_after_each_step(summary, calls)
    assert asyncio.run(right_answers_of_the_best(tmp_path)) > 0.9


async def right_answers_of_the_best(folder):
    """The share of the held-out questions whose first tool a new vLLM chooses rightly with the run's ``best/``."""
    options = VllmOptions(args=(*ARGS, "--tokenizer", str(folder / "tokenizer")))
    settings = load_settings(weights_root=folder, vllm_python=PYTHON)
    server = VllmServer(folder / "best", options, settings, folder / "again", version="best.0.0")
    tasks = [json.loads(line)["input"] for line in (folder / "val.jsonl").read_text().splitlines()]

    async def tool(session, question):
        messages = [{"role": "user", "content": f"{question.split(' then ')[0]} ?"}]
        body = {"model": "policy", "messages": messages, "max_tokens": 1, "temperature": 0}
        async with session.post(f"{server.urls[0]}/v1/chat/completions", json=body) as response:
            return (await response.json())["choices"][0]["message"]["content"].strip()

    try:
        await server.start()
        async with aiohttp.ClientSession() as session:
            chosen = await asyncio.gather(*(tool(session, task["question"]) for task in tasks))
    finally:
        await server.close()
    return sum(word == task["tools"][0] for word, task in zip(chosen, tasks, strict=True)) / len(tasks)


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
