"""An answer that a weight update interrupts, from the demo engine through the proxy to what is trained on."""

import json
from collections.abc import AsyncIterator
from pathlib import Path
from typing import Any

import pytest
from aiohttp.test_utils import TestServer
from proxy_rig import Rig, rig_of

pytest.importorskip("torch")

from examples.calculator import model
from millstream.consumers.adapter.triplets import Trace, to_triplets
from millstream.pipeline.models.engine import Engine
from millstream.pipeline.models.engine_http import engine_app
from millstream.pipeline.models.policy import parameters
from millstream.pipeline.training.groups import FinishedRollout, Group, Lineage, checked
from millstream.schemas.spans import semconv
from millstream.schemas.wire.records import RolloutEnd, RolloutTask

pytestmark = pytest.mark.torch

ASKED: dict[str, Any] = {
    "model": "calculator",
    "messages": [{"role": "user", "content": "8 plus 3 ?"}],
    "max_tokens": 5,
}
VERSIONS = '[[0,"run.0.1"],[2,"run.0.2"],[3,"run.0.3"]]'


@pytest.fixture
async def rig(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> AsyncIterator[Rig]:
    """The engine gets new weights after the second and the third token of each answer."""
    model.create(tmp_path / "calculator", seed=1)
    config = tmp_path / "calculator" / "config.json"
    config.write_text(json.dumps(json.loads(config.read_text()) | {"eos_token_id": None}))  # no answer ends early
    engine = Engine(tmp_path / "calculator", version="run.0.1")

    def append(job: Any, *token: Any) -> None:
        Engine._append(engine, job, *token)
        if len(job.tokens) in (2, 3):
            engine.load(parameters(engine._model), f"run.0.{len(job.tokens)}")

    monkeypatch.setattr(engine, "_append", append)
    async with (
        TestServer(engine_app(engine)) as server,
        rig_of(upstreams={"model": {"urls": [str(server.make_url("")).rstrip("/")]}}) as rig,
    ):
        yield rig
    await engine.close()


@pytest.mark.parametrize("protocol", ["chat", "chat stream", "messages", "messages stream"])
async def test_each_tokens_version_reaches_the_trainer(rig: Rig, protocol: str) -> None:
    stream = protocol.endswith("stream")
    if protocol.startswith("chat"):
        answer = await rig.client.chat.completions.create(**ASKED, stream=stream)
    else:
        answer = await rig.claude.messages.create(**ASKED, stream=stream)
    if stream:
        _ = [event async for event in answer]
    span = await rig.span()
    assert (span.model_version, span.attributes[semconv.RESPONSE_VERSIONS]) == ("mixed", VERSIONS)
    task = RolloutTask(rollout_id=rig.rollout, group_id="g", input="{}", timeout_s=1, lease_s=1, created_at=0)
    triplets = to_triplets(Trace(task, rig.attempt, [span]))
    assert [(t.trainable, t.response_versions) for t in triplets] == [(True, VERSIONS)]
    end = RolloutEnd(
        rollout_id=rig.rollout, group_id="g", group_size=1, status="succeeded", attempts=1, created_at=0, ended_at=0
    )
    group = Group("g", (FinishedRollout(end, tuple(triplets)),))
    for step, oldest in ((3, 1), (2, None)):  # the second trainer does not know run.0.3 yet
        found, at = checked(group, Lineage("run", 0, step))
        (triplet,) = found.members[0].triplets
        assert (at, triplet.trainable) == (oldest, oldest is not None)
    assert triplet.reason == "turn 0: tokens 3 to 4: made by version run.0.3, newer than the trainer's run.0.2"
