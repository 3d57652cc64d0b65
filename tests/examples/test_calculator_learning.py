"""Engine, agent and GRPO in a bare loop, without a log: the example learns, and only with a learning rate."""

import asyncio
import importlib
import struct
import threading
from collections.abc import Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from statistics import fmean
from types import SimpleNamespace
from typing import Any

import pytest

pytest.importorskip("torch")

from examples.calculator import model
from examples.calculator.tasks import make_tasks
from millstream.pipeline.algorithms.torch_learner import TorchLearner
from millstream.pipeline.models.engine import Engine
from millstream.pipeline.training.groups import FinishedRollout, Group
from millstream.schemas.wire.records import RolloutEnd, Triplet

GROUPS_PER_STEP, GROUP_SIZE = 16, 8
STEPS = 25
pytestmark = [pytest.mark.torch, pytest.mark.slow]


def ints(values: Sequence[int]) -> bytes:
    return struct.pack(f"<{len(values)}i", *values)


class BareLoop:
    """Runs the agent in threads, its client wired to the engine, its rewards to this object."""

    def __init__(self, folder: Path, monkeypatch: pytest.MonkeyPatch, seed: int = 0, **settings: Any) -> None:
        model.create(folder, seed)
        self.engine = Engine(folder, seed=seed)
        self.algorithm = TorchLearner(folder, seed=seed, **settings)
        self.local = threading.local()
        self.loop = asyncio.new_event_loop()
        self.thread = threading.Thread(target=self.loop.run_forever)
        self.thread.start()
        self.pool = ThreadPoolExecutor(32)
        monkeypatch.setenv("OPENAI_API_KEY", "unused")
        self.agent = importlib.import_module("examples.calculator.agent")
        completions = SimpleNamespace(create=self._create)
        monkeypatch.setattr(self.agent, "client", SimpleNamespace(chat=SimpleNamespace(completions=completions)))
        monkeypatch.setattr(self.agent, "score", lambda step, right, rollout: self.local.rewards.append(right / 2))
        monkeypatch.setattr(self.agent, "tool_called", lambda word, known: None)

    def close(self) -> None:
        asyncio.run_coroutine_threadsafe(self.engine.close(), self.loop).result()
        self.loop.call_soon_threadsafe(self.loop.stop)
        self.thread.join()
        self.loop.close()
        self.pool.shutdown()

    def _create(self, **request: Any) -> Any:
        asked = self.engine.chat(request | {"logprobs": True, "return_token_ids": True})
        answer = asyncio.run_coroutine_threadsafe(asked, self.loop).result()
        assert answer.status == 200, answer.body
        self.local.answers.append(answer)
        message = SimpleNamespace(**answer.body["choices"][0]["message"])
        return SimpleNamespace(choices=[SimpleNamespace(message=message)])

    def rollout(self, task: dict[str, Any], group: int) -> FinishedRollout:
        self.local.answers, self.local.rewards = [], []
        self.agent.agent(task)
        triplets = []
        for turn, (answer, reward) in enumerate(zip(self.local.answers, self.local.rewards, strict=True)):
            choice = answer.body["choices"][0]
            logprobs = [token["logprob"] for token in choice["logprobs"]["content"]]
            triplets.append(
                Triplet(
                    rollout_id="r",
                    attempt_id="a",
                    group_id=str(group),
                    turn=turn,
                    span_id="s",
                    prompt="",
                    response=choice["message"]["content"],
                    prompt_token_ids=struct.pack(
                        f"<{len(answer.body['prompt_token_ids'])}i", *answer.body["prompt_token_ids"]
                    ),
                    response_token_ids=ints(choice["token_ids"]),
                    response_logprobs=struct.pack(f"<{len(logprobs)}f", *logprobs),
                    reward=reward,
                    model_version=answer.model_version,
                )
            )
        end = RolloutEnd(
            rollout_id="r",
            group_id=str(group),
            group_size=GROUP_SIZE,
            status="succeeded",
            attempts=1,
            reward=sum(self.local.rewards),
            created_at=0,
            ended_at=0,
        )
        return FinishedRollout(end, tuple(triplets))

    def reward(self, tasks: Sequence[dict[str, Any]]) -> float:
        return fmean(m.end.reward or 0.0 for m in self.pool.map(self.rollout, tasks, range(len(tasks))))

    def step(self, number: int, seed: int = 0) -> tuple[float, dict[str, float]]:
        size = GROUP_SIZE
        tasks = make_tasks(GROUPS_PER_STEP, "train", seed=1000 * seed + number)
        jobs = [(task, g) for g, task in enumerate(tasks) for _ in range(size)]
        members = list(self.pool.map(self.rollout, *zip(*jobs, strict=True)))
        groups = [Group(str(g), tuple(members[g * size : (g + 1) * size])) for g in range(len(tasks))]
        metrics = self.algorithm.update(groups)
        self.engine.load(self.algorithm.weights(), f"0.0.{number + 1}")
        return fmean(m.end.reward or 0.0 for m in members), metrics


@pytest.fixture
def bare_loop(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, request: pytest.FixtureRequest) -> Iterator[BareLoop]:
    """With the settings of GRPO that the test's parameter names."""
    loop = BareLoop(tmp_path, monkeypatch, **{"lr": 1e-3} | getattr(request, "param", {}))
    try:
        yield loop
    finally:
        loop.close()


def test_it_learns_questions_that_it_has_not_seen(bare_loop: BareLoop) -> None:
    validation = make_tasks(128, "val")
    first, metrics = bare_loop.step(0)
    assert first < 0.4
    for number in range(1, STEPS):
        _, metrics = bare_loop.step(number)
        assert metrics["max_ratio_error"] < 1e-3  # trains on exactly the tokens that were sampled
        assert metrics["dropped_groups"] == 0
        if number % 5 == 4 and bare_loop.reward(validation) >= 0.9:
            return
    pytest.fail(f"validation reward {bare_loop.reward(validation):.2f} after {STEPS} steps")


@pytest.mark.parametrize("bare_loop", [{"lr": 0.0}], indirect=True)
def test_without_a_learning_rate_it_stays_at_nothing(bare_loop: BareLoop) -> None:
    validation = make_tasks(128, "val")
    for number in range(4):
        reward, _ = bare_loop.step(number)
        assert reward < 0.1
    assert bare_loop.reward(validation) < 0.1
