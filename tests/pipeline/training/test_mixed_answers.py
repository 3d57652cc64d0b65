# ruff: noqa: E402 — torch comes with the `train` extra
"""Training while long answers are sampled: weights change within them, and they are trained on."""

import json
import struct
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import openai
import pytest

torch = pytest.importorskip("torch")

import millstream as ms
from examples.calculator import model
from millstream.pipeline.algorithms.torch_learner import TorchLearner
from millstream.pipeline.models.policy import copy_weights, left_pad, load_model
from millstream.pipeline.training.groups import Group, trainable_turns
from millstream.schemas.config.settings import load_settings
from millstream.schemas.wire.records import Triplet
from millstream.schemas.wire.versions import from_text

pytestmark = pytest.mark.torch

STEPS, STALENESS, LONG = 5, 2, 200
TASKS = [{"question": f"{n} plus 3 ?"} for n in range(8)]


def agent(task: dict[str, str], rollout: ms.Rollout) -> float:
    message = {"role": "user", "content": task["question"]}
    answer = openai.OpenAI().chat.completions.create(model="policy", messages=[message], max_tokens=LONG)
    assert answer.choices[0].message.content is not None
    return float(len(answer.choices[0].message.content) % 7)


class Recorder(TorchLearner):
    """Keeps the weights of each version, and what the next one was trained on."""

    def __init__(self, *args: Any, **options: Any) -> None:
        super().__init__(*args, **options)
        self.versions: list[dict[str, torch.Tensor]] = []
        self.trained: list[list[Triplet]] = []

    def update(self, groups: Sequence[Group]) -> dict[str, float]:
        self.versions.append({name: weight.clone() for name, weight in self.weights().items()})
        self.trained.append([t for group in groups for member in group.members for t in trainable_turns(member)])
        return super().update(groups)


def test_answers_that_updates_interrupt_are_trained_on_within_the_bound(tmp_path: Path) -> None:
    model.create(tmp_path / "model", seed=1)
    config = tmp_path / "model" / "config.json"
    config.write_text(json.dumps(json.loads(config.read_text()) | {"eos_token_id": None}))  # no answer ends early
    learner = Recorder(tmp_path / "model", lr=1e-3)
    algorithm = ms.PolicyGradient(learner, groups_per_step=1, group_size=2, max_staleness=STALENESS)
    # Two rollouts at a time: the next ones are asked for while the policy learns.
    settings = load_settings(runner_concurrency=2)
    trainer = ms.Trainer(algorithm=algorithm, agent=agent, run_dir=tmp_path / "run", max_steps=STEPS, settings=settings)
    summary = trainer.fit(TASKS)
    assert len(summary.steps) == STEPS
    assert not any(step.dropped for step in summary.steps)
    mixed = 0
    for step, turns in enumerate(learner.trained):
        assert turns
        for turn in turns:
            made = struct.unpack(f"<{LONG}i", turn.response_token_ids or b"")
            said = struct.unpack(f"<{LONG}f", turn.response_logprobs or b"")
            versions = (
                from_text(turn.response_versions, LONG) if turn.response_versions else ((0, turn.model_version or ""),)
            )
            steps = [int(version.rpartition(".")[2]) for _, version in versions]
            assert step - 2 * STALENESS <= min(steps) <= max(steps) <= step
            assert summary.steps[step].staleness_max >= step - min(steps)
            mixed += len(versions) > 1
            ends = [first for first, _ in versions[1:]] + [LONG]
            for number, (first, _), end in zip(steps, versions, ends, strict=True):
                expected = logprobs(tmp_path / "model", learner.versions[number], turn, made)
                assert said[first:end] == pytest.approx(expected[first:end], abs=2e-3)
    assert mixed >= 1


def logprobs(folder: Path, weights: dict[str, torch.Tensor], turn: Triplet, made: Sequence[int]) -> list[float]:
    """Of each token, all by the same weights."""
    policy = load_model(folder).eval()
    copy_weights(policy, weights)
    ids = turn.prompt_token_ids or b""
    prompt = list(struct.unpack(f"<{len(ids) // 4}i", ids))
    with torch.inference_mode():
        logits = policy(**left_pad([prompt + list(made)])).logits[0, len(prompt) - 1 : -1]
    found: list[float] = torch.log_softmax(logits.float(), -1).gather(1, torch.tensor(made)[:, None])[:, 0].tolist()
    return found
