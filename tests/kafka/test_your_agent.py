"""docs/your-agent.md works as printed: `init`, `up`, `publish`, and the questions, on a real Kafka."""

import asyncio
import json
import os
import re
import signal
import subprocess
import sys
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest
from policy_server import PolicyServer

from millstream.pipeline.addresses import free_port
from millstream.pipeline.services.serve_aiohttp import serve
from millstream.schemas.config.settings import Settings

pytestmark = pytest.mark.kafka

ROOT = Path(__file__).parents[2]
PAGE = (ROOT / "docs" / "your-agent.md").read_text()
UP_S = 120  # five processes on a busy machine


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


def test_a_wrong_setting_of_a_role_ends_all_with_its_error(tmp_path: Path, environment: dict[str, str]) -> None:
    (tmp_path / "broken.py").write_text("agent = 3\n")
    done = subprocess.run(
        ["millstream", "up", "broken:agent"], cwd=tmp_path, env=environment, capture_output=True, text=True, check=False
    )
    assert done.returncode == 2
    assert "agent 'broken:agent' is not callable" in done.stderr
    assert "the runner ended with exit code 2: all others are stopped" in done.stdout
