"""One training run: when it stops, and how it waits for a model server that restarts."""

from collections.abc import Mapping
from pathlib import Path
from typing import Any

import pytest

from millstream.consumers.log.memory_log import MemoryLog
from millstream.pipeline.models.server import UpdateFailed
from millstream.pipeline.training.run import Experiment, Run, StopRule, UpdatePolicy
from millstream.schemas.config.settings import load_settings


@pytest.mark.parametrize(
    ("rewards", "reached"),
    [
        ([], False),
        ([0.9, 0.9], False),  # patience is 3
        ([0.9, 0.5, 0.9], True),
        ([0.9, 0.4, 0.9], False),
        ([0.1, 0.5, 0.5, 0.5], True),  # only the last ones count
    ],
)
def test_training_stops_after_enough_good_steps_in_a_row(rewards: list[float], reached: bool) -> None:
    assert StopRule(100, reward=0.5, patience=3).reached(rewards) is reached
    assert not StopRule(100, reward=None, patience=3).reached(rewards)


class Server:
    """Refuses so many updates."""

    def __init__(self, failures: int, passing: bool) -> None:
        self.failures, self.passing = failures, passing
        self.versions: list[str] = []

    async def update(self, weights: Mapping[str, Any], version: str) -> None:
        self.versions.append(version)
        if len(self.versions) <= self.failures:
            raise UpdateFailed("restarting", passing=self.passing)


async def start(server: Any, folder: Path, **policy: float) -> None:
    settings = load_settings()
    update = UpdatePolicy(**{"retry_s": 0.0, **policy})
    run = Run(settings, MemoryLog(settings.topics), Experiment("r"), server=server, run_dir=folder, update=update)
    try:
        await run.start({})
        await run.publish_weights({}, 0)
    finally:
        await run.close()


async def test_an_update_waits_for_a_server_that_restarts(tmp_path: Path) -> None:
    server = Server(failures=3, passing=True)
    await start(server, tmp_path)
    assert server.versions == ["r.0.0"] * 4


async def test_an_update_gives_up_in_the_end(tmp_path: Path) -> None:
    with pytest.raises(UpdateFailed, match="restarting"):
        await start(Server(failures=10, passing=True), tmp_path, give_up_s=0.0)


async def test_an_update_that_cannot_succeed_is_not_retried(tmp_path: Path) -> None:
    server = Server(failures=1, passing=False)
    with pytest.raises(UpdateFailed, match="restarting"):
        await start(server, tmp_path)
    assert server.versions == ["r.0.0"]
