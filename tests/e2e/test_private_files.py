"""What the roles write on this machine is readable for their own user only."""

import os
from collections.abc import Iterator
from pathlib import Path

import pytest

from millstream.consumers.adapter.triplets import to_triplets
from millstream.consumers.sink.clickhouse_connection import connect
from millstream.pipeline.training.deployment import over_kafka
from millstream.pipeline.training.strategy import Setup
from millstream.pipeline.training.trainer import Trainer
from millstream.producers.blob_store import Blobs
from millstream.schemas.config.settings import load_settings
from millstream.schemas.errors import ConfigError
from millstream.schemas.spans.blobs import digest_of


@pytest.fixture(autouse=True)
def usual_umask() -> Iterator[None]:
    before = os.umask(0o022)
    yield
    os.umask(before)


def open_to_others(root: Path) -> list[Path]:
    """Files below a root that others can reach: each folder on the way lets them in."""
    if root.stat().st_mode & 0o077 == 0:
        return []
    return [root] if root.is_file() else [path for each in root.iterdir() for path in open_to_others(each)]


def test_blobs(tmp_path: Path) -> None:
    """Section F7."""
    blobs = Blobs(str(tmp_path / "runs" / "blobs"))
    blobs.put(digest_of(b"long"), b"long").result(20)
    blobs.close()
    assert open_to_others(tmp_path) == []
    (file,) = (path for path in tmp_path.rglob("*") if path.is_file())
    assert file.stat().st_mode & 0o777 == 0o600


def test_a_folder_that_exists_is_shared_as_it_was(tmp_path: Path) -> None:
    tmp_path.chmod(0o750)
    Blobs(str(tmp_path)).put(digest_of(b"long"), b"long").result(20)
    assert tmp_path.stat().st_mode & 0o777 == 0o750


def test_a_store_and_a_run(tmp_path: Path) -> None:
    tmp_path.chmod(0o755)
    connect(load_settings(clickhouse_dsn=f"chdb://{tmp_path / 'store'}")).close()
    assert [path.name for path in tmp_path.iterdir()] == ["store"]
    assert open_to_others(tmp_path) == []
    Trainer(agent=lambda task: 1.0, run_dir=tmp_path / "run").dev([{"n": 1}])
    assert open_to_others(tmp_path) == []


@pytest.mark.torch
def test_checkpoints_and_weights(tmp_path: Path) -> None:
    import torch

    from millstream.pipeline.models import weight_files
    from millstream.pipeline.training import checkpoint

    tmp_path.chmod(0o755)
    state = {"weights": {"w": torch.zeros(1)}, "optimizer": {}}
    checkpoint.save(tmp_path / "checkpoints", 0, state, {0: 1}, {})
    weight_files.save(tmp_path / "versions", {"w": torch.zeros(1)}, "r.0.1")
    assert open_to_others(tmp_path) == []
    files = [path for path in tmp_path.rglob("*") if path.is_file()]
    assert len(files) == 4
    assert {path.stat().st_mode & 0o777 for path in files} == {0o600}


async def test_the_demo_engine_listens_on_this_machine_only(tmp_path: Path, kafka_log: None) -> None:
    settings = load_settings(model_url="http://0.0.0.0:8500")
    setup = Setup(settings=settings, agent=None, to_triplets=to_triplets, run_dir=tmp_path, model=tmp_path)
    with pytest.raises(ConfigError, match="the demo engine listens on this machine only"):
        async with over_kafka(setup):
            pass


@pytest.fixture
def kafka_log(monkeypatch: pytest.MonkeyPatch) -> None:
    """The check does not need the broker."""
    from millstream.consumers.log.kafka_log import KafkaLog

    async def created(self: KafkaLog) -> None: ...

    monkeypatch.setattr(KafkaLog, "create_topics", created)
