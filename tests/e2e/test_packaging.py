"""An agent project with `schemas/` and `pipeline.py` of its own runs unchanged, from a checkout and from the wheel."""

import os
import subprocess
import sys
import sysconfig
import venv
from contextlib import ExitStack, contextmanager
from pathlib import Path

import pytest

from millstream.consumers.log.kafka_log import KafkaLog
from millstream.pipeline.training.collector import Collector
from millstream.producers.tasks import TaskPublisher, read_tasks

ROOT = Path(__file__).parents[2]
pytestmark = [pytest.mark.slow, pytest.mark.kafka]


@pytest.fixture
def project(tmp_path):
    """A project that uses the names of Millstream's folders for modules of its own."""
    folder = tmp_path / "project"
    (folder / "schemas").mkdir(parents=True)
    (folder / "schemas" / "__init__.py").write_text("UNIT = 'apples'\n")
    (folder / "pipeline.py").write_text("def double(n):\n    return 2 * n\n")
    (folder / "consumers.py").write_text("raise RuntimeError('must not be imported')\n")
    (folder / "agent.py").write_text(
        "from pipeline import double\nfrom schemas import UNIT\n\n\n"
        "async def agent(n):\n    assert UNIT == 'apples'\n    return double(n)\n"
    )
    (folder / "tasks.jsonl").write_text("".join(f'{{"input": {n}}}\n' for n in range(10)))
    return folder


@pytest.fixture(scope="module")
def wheel_python(tmp_path_factory):
    """An interpreter with the wheel, and only the dependencies from this environment."""
    folder = tmp_path_factory.mktemp("wheel")
    subprocess.run([sys.executable, "-m", "hatchling", "build", "-t", "wheel", "-d", folder], cwd=ROOT, check=True)
    (wheel,) = folder.glob("*.whl")
    venv.create(folder / "venv", with_pip=True)
    python = folder / "venv" / "bin" / "python"
    subprocess.run([python, "-m", "pip", "install", "--quiet", "--no-index", "--no-deps", wheel], check=True)

    def printed(code):
        return subprocess.run(
            [python, "-c", code], cwd=folder, capture_output=True, text=True, check=True
        ).stdout.strip()

    # A path line: the .pth of the editable install over there is not read.
    site = Path(printed("import sysconfig; print(sysconfig.get_path('purelib'))"))
    (site / "dependencies.pth").write_text(sysconfig.get_path("purelib") + "\n")
    assert printed("import millstream; print(millstream.__file__)").startswith(str(folder))
    return python


@contextmanager
def roles_running(python, project, environment):
    with ExitStack() as stack:
        for role in (["adapter"], ["runner", "agent:agent"]):
            process = subprocess.Popen([python, "-m", "millstream.pipeline", *role], cwd=project, env=environment)
            stack.callback(process.wait, 60)
            stack.callback(process.terminate)
        yield


async def ends_of(settings, python, project):
    log = KafkaLog(settings)
    await log.create_topics()
    environment = os.environ | {
        "MILLSTREAM_KAFKA_BOOTSTRAP_SERVERS": settings.kafka_bootstrap_servers,
        "MILLSTREAM_KAFKA_PARTITIONS": str(settings.kafka_partitions),
        "MILLSTREAM_TOPIC_PREFIX": settings.topic_prefix,
        "MILLSTREAM_PROXY_URL": "",
    }
    producer = log.producer()
    collector = Collector(log, settings.topics, producer)
    await collector.start()
    with roles_running(python, project, environment):
        tasks, _ = read_tasks(project / "tasks.jsonl", settings)
        ids = [task.rollout_id for task in tasks]
        collector.expect(ids)
        await TaskPublisher(producer, settings).publish(tasks)
        finished = await collector.collect(ids)
    await collector.close()
    producer.close()
    return [rollout.end.reward for rollout in finished]


async def test_from_a_checkout(project, kafka_settings):
    assert await ends_of(kafka_settings(), Path(sys.executable), project) == [2.0 * n for n in range(10)]


async def test_from_the_wheel(project, kafka_settings, wheel_python):
    assert await ends_of(kafka_settings(), wheel_python, project) == [2.0 * n for n in range(10)]


def test_the_wheel_starts_a_broker(tmp_path, wheel_python):
    def millstream(*arguments):
        return subprocess.run(
            [wheel_python, "-m", "millstream.pipeline", "kafka", *arguments, "--data-dir", tmp_path / "kafka"],
            capture_output=True,
            text=True,
            check=False,
        )

    up = millstream("up", "--port", "0", "--json")
    assert up.returncode == 0, up.stderr
    assert "bootstrap_servers" in up.stdout
    assert millstream("down").returncode == 0
    assert millstream("status").returncode == 1
