"""docs/your-agent.md works as printed: `init`, `up`, `publish`, and the questions, on a real Kafka."""

import asyncio
import json
import os
import re
import signal
import socket
import subprocess
import sys
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest
from policy_server import PolicyServer

from examples.calculator.tasks import make_tasks
from millstream.pipeline.addresses import free_port
from millstream.pipeline.services.serve_aiohttp import serve
from millstream.schemas.config.settings import Settings

pytestmark = pytest.mark.kafka

ROOT = Path(__file__).parents[2]
PAGE = (ROOT / "docs" / "your-agent.md").read_text()
UP_S = 120  # five processes on a busy machine
TRAIN = """
run = "first"
run_dir = "runs/first"
strategy = "kafka"
tasks = "tasks.jsonl"
max_steps = 2

[algorithm]
type = "grpo"
model = "model"
groups_per_step = 2
group_size = 4
"""


def blocks() -> list[str]:
    """The shell blocks, without those that are not run."""
    return [
        match[2] for match in re.finditer(r"(<!-- not run[^\n]*\n)?```sh\n(.*?)```", PAGE, re.DOTALL) if not match[1]
    ]


@pytest.fixture
def environment(kafka_settings: Callable[..., Settings]) -> dict[str, str]:
    settings = kafka_settings()
    clean = {name: value for name, value in os.environ.items() if not name.startswith("MILLSTREAM_")}
    return clean | {
        "PATH": f"{Path(sys.executable).parent}:{clean['PATH']}",
        "MILLSTREAM_KAFKA_BOOTSTRAP_SERVERS": settings.kafka_bootstrap_servers,
        "MILLSTREAM_KAFKA_PARTITIONS": str(settings.kafka_partitions),
        "MILLSTREAM_TOPIC_PREFIX": settings.topic_prefix,
        "MILLSTREAM_PROXY_URL": f"http://127.0.0.1:{free_port()}",
        "MILLSTREAM_MODEL_URL": f"http://127.0.0.1:{free_port()}",
    }


class Up:
    """A running ``millstream up``."""

    def __init__(self, command: str, folder: Path, environment: dict[str, str]) -> None:
        self.log = folder / "up.log"
        with self.log.open("w") as log:
            self.process = subprocess.Popen(
                ["bash", "-c", f"exec {command}"],
                cwd=folder,
                env=environment,
                stdout=subprocess.PIPE,
                stderr=log,
                text=True,
            )

    def lines(self) -> Iterator[str]:
        assert self.process.stdout is not None
        return iter(self.process.stdout.readline, "")

    def children(self) -> dict[str, int]:
        """Process ids by role."""
        listed = subprocess.run(
            ["ps", "-o", "pid=,args=", "--ppid", str(self.process.pid)], capture_output=True, text=True, check=False
        ).stdout
        found = (re.match(r"\s*(\d+).* -m millstream\.pipeline (\w+)", line) for line in listed.splitlines())
        return {match[2]: int(match[1]) for match in found if match}


async def test_the_walk_through_works_as_printed(tmp_path: Path, environment: dict[str, str]) -> None:
    """Entry B4. Besides: a role that is killed is started again, and Ctrl-C stops all of them."""
    new, start, publish, ask, *rest = blocks()
    assert not rest
    shell(new, tmp_path, environment)
    folder = tmp_path / "my-agent"
    up = Up(start.strip(), folder, environment)
    try:
        async with serve(PolicyServer().app, environment["MILLSTREAM_MODEL_URL"]):
            await asyncio.wait_for(asyncio.to_thread(until_started, up), UP_S)
            published = await asyncio.to_thread(shell, publish, folder, environment)
            assert "worker_id" in published
            assert len(re.findall(r"  succeeded  ", published)) == 8
            asked = await asyncio.to_thread(shell, ask, folder, environment)
            assert "the model said" in asked  # what the agent printed
            assert "Repeat the word" in asked
            first = up.children()
            assert first.keys() == {"adapter", "sink", "proxy", "runner"}
            os.kill(first["adapter"], signal.SIGKILL)
            again = "millstream publish tasks.jsonl --wait-s 120 --json"
            ends = json.loads(await asyncio.to_thread(shell, again, folder, environment))
            assert [end["status"] for end in ends] == ["succeeded"] * 4
            assert up.children()["adapter"] != first["adapter"]
    finally:
        up.process.send_signal(signal.SIGINT)
        code = await asyncio.wait_for(asyncio.to_thread(up.process.wait), 60)
    log = up.log.read_text()
    assert code == 0, log
    assert not up.children()
    assert "adapter was killed by SIGKILL; it is started again in" in log
    for role in ("adapter", "sink", "proxy", "runner"):
        assert re.search(rf" INFO    {role} .*: this is the {role} of millstream ", log), log
    assert re.search(r"INFO    agent stdout: the model said .* rollout=\S+ attempt=\S+", log)


def until_started(up: Up) -> None:
    for line in up.lines():
        if line.startswith("publish tasks with"):
            return
    raise AssertionError(up.log.read_text())


def shell(script: str, folder: Path, environment: dict[str, str]) -> str:
    done = subprocess.run(
        ["bash", "-ec", script], cwd=folder, env=environment, capture_output=True, text=True, check=False
    )
    assert done.returncode == 0, f"{script}\n{done.stdout}\n{done.stderr}"
    return done.stdout


@pytest.mark.torch
@pytest.mark.timeout(400)
def test_up_starts_a_broker_of_its_own_trains_and_stops_all(tmp_path: Path, environment: dict[str, str]) -> None:
    create = "import sys; from examples.calculator import model; model.create(sys.argv[1], 0)"
    python = environment | {"PYTHONPATH": str(ROOT)}
    subprocess.run([sys.executable, "-c", create, str(tmp_path / "model")], env=python, check=True)
    tasks = [json.dumps({"input": task}) for task in make_tasks(32, "train", 0)]
    (tmp_path / "tasks.jsonl").write_text("\n".join(tasks))
    (tmp_path / "train.toml").write_text(TRAIN)
    del python["MILLSTREAM_KAFKA_BOOTSTRAP_SERVERS"]
    port = free_port()
    agent = f"examples.calculator.agent:agent --train train.toml --data-dir kafka --kafka-port {port}"
    up = Up(f"millstream up {agent}", tmp_path, python)
    said = "".join(up.lines())
    code = up.process.wait(20)
    log = up.log.read_text()
    assert code == 0, said + log
    assert f"Kafka at 127.0.0.1:{port}" in said.replace("localhost", "127.0.0.1")
    query = "SELECT step, rollouts FROM training_steps ORDER BY step"
    steps = json.loads(shell(f'millstream sql --json "{query}"', tmp_path, python))
    assert steps == [{"step": 1, "rollouts": 8}, {"step": 2, "rollouts": 8}]
    asked = "SELECT status, count() AS n FROM rollouts GROUP BY status"
    assert json.loads(shell(f'millstream sql --json "{asked}"', tmp_path, python)) == [{"status": "succeeded", "n": 16}]
    with socket.socket() as there:
        assert there.connect_ex(("127.0.0.1", port)) != 0  # the broker has ended, too


def test_a_wrong_setting_of_a_role_ends_all_with_its_error(tmp_path: Path, environment: dict[str, str]) -> None:
    (tmp_path / "broken.py").write_text("agent = 3\n")
    done = subprocess.run(
        ["millstream", "up", "broken:agent"], cwd=tmp_path, env=environment, capture_output=True, text=True, check=False
    )
    assert done.returncode == 2
    assert "agent 'broken:agent' is not callable" in done.stderr
    assert "the runner ended with exit code 2: all others are stopped" in done.stdout
