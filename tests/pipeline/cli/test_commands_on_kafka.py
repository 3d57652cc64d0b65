"""Commands of the terminal, run as a user runs them, against a real broker."""

import json
import os
import re
import subprocess
import sys
from pathlib import Path

import pytest

from millstream.deploy.kafka.local import HOST, LocalKafka
from millstream.pipeline.addresses import free_port
from tests.pipeline.cli.terminal import on_a_terminal

pytestmark = pytest.mark.kafka


def test_topics_are_created_once_the_broker_answers_and_tasks_come_from_a_pipe(tmp_path: Path) -> None:
    port = free_port()
    environment = os.environ | {
        "MILLSTREAM_KAFKA_BOOTSTRAP_SERVERS": f"{HOST}:{port}",
        "MILLSTREAM_KAFKA_PARTITIONS": "2",
    }
    millstream = [sys.executable, "-m", "millstream.pipeline"]

    def command(*arguments: str, given: str = "") -> list[dict[str, object]]:
        done = subprocess.run(
            [*millstream, *arguments, "--json"],
            cwd=tmp_path,
            env=environment,
            input=given,
            capture_output=True,
            text=True,
            check=False,
        )
        assert done.returncode == 0, done.stderr
        return list(json.loads(done.stdout))

    create = [*millstream, "topics", "create", "--json", "--wait-s", "120"]
    kafka = LocalKafka(tmp_path / "kafka", port=port)
    try:
        with subprocess.Popen(create, cwd=tmp_path, env=environment, stdout=subprocess.PIPE, text=True) as creating:
            kafka.up()
            assert creating.stdout is not None
            created = json.loads(creating.stdout.read())
        assert creating.returncode == 0
        (tasks,) = (topic["topic"] for topic in created if "normal" in topic["topic"])

        (tmp_path / "tasks.jsonl").write_text('{"input": 0}\n' * 3)
        shown = on_a_terminal([*millstream, "publish", "tasks.jsonl"], tmp_path, **environment)
        assert re.search(r"publishing .*3 of 3 tasks · [\d,]+/s", shown), shown
        published = command("publish", "-", given='{"input": 1}\n{"input": 2}\n')
        assert len({task["rollout_id"] for task in published}) == 2
        listed = {topic["topic"]: topic["records"] for topic in command("topics", "list")}
        assert listed == {topic["topic"]: 0 for topic in created} | {tasks: 5}
    finally:
        kafka.down()
