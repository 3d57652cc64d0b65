# ruff: noqa: E402 — torch comes with the `train` extra
"""What a training file may say about its algorithm, and what is made of it."""

import asyncio
from pathlib import Path
from typing import Any

import pytest
from pydantic import TypeAdapter, ValidationError

torch = pytest.importorskip("torch")

from factories import finished, tokens

from examples.calculator import model
from millstream.pipeline.algorithms.options import Options, algorithm_of
from millstream.pipeline.algorithms.policy_gradient import PolicyGradient
from millstream.pipeline.algorithms.verl.algorithm import Verl
from millstream.pipeline.models.engine import Engine
from millstream.pipeline.tracing.rubric import Rubric
from millstream.pipeline.training.groups import Group

pytestmark = pytest.mark.torch

OPTIONS: TypeAdapter[Any] = TypeAdapter(Options)
TYPES = {
    "grpo": {},
    "dapo": {"overlong_limit": 8, "overlong_cache": 4},
    "dr_grpo": {"norm_tokens": 8},
    "rloo": {},
    "reinforce_pp": {"kl": 0.01},
    "gspo": {},
    "cispo": {},
    "ppo": {},
}


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    path = tmp_path_factory.mktemp("model")
    model.create(path, seed=1)
    return path


@pytest.fixture(scope="module")
def groups(folder: Path) -> list[Group]:
    """Answers of the model; of each group, those that end with an even token have earned something."""

    async def answers() -> list[Any]:
        engine = Engine(folder, seed=3)
        message = {"role": "user", "content": "add 3 to 8 ?"}
        request = {"messages": [message], "max_tokens": 4, "logprobs": True, "return_token_ids": True}
        try:
            return await asyncio.gather(*(engine.chat(request) for _ in range(16)))
        finally:
            await engine.close()

    turns = []
    for answer in asyncio.run(answers()):
        choice = answer.body["choices"][0]
        ids, logprobs = choice["token_ids"], [each["logprob"] for each in choice["logprobs"]["content"]]
        turns.append(tokens(answer.body["prompt_token_ids"], ids, logprobs) | {"reward": float(ids[-1] % 2)})
    return [
        Group(f"g{g}", tuple(finished(f"r{g}.{m}", [turn]) for m, turn in enumerate(turns[8 * g : 8 * g + 8])))
        for g in range(2)
    ]


@pytest.mark.parametrize("kind", TYPES)
def test_each_type_learns_and_only_with_a_learning_rate(folder: Path, groups: list[Group], kind: str) -> None:
    def after(lr: float) -> Any:
        options = OPTIONS.validate_python({"type": kind, "model": folder, "lr": lr, **TYPES[kind]})
        algorithm = algorithm_of(options)
        assert isinstance(algorithm, PolicyGradient)
        before = {name: weight.clone() for name, weight in algorithm.learner.weights().items()}
        algorithm.learner.update(groups)
        return max((before[name] - weight).abs().max().item() for name, weight in algorithm.learner.weights().items())

    assert after(0.0) == 0.0
    assert after(5e-4) > 1e-5


def test_options_of_the_loop_reach_it(folder: Path) -> None:
    given = {"type": "dapo", "model": folder, "max_staleness": 3, "checkpoint_every": 5, "groups_per_step": 2}
    loop = algorithm_of(OPTIONS.validate_python(given))
    assert isinstance(loop, PolicyGradient)
    assert (loop.max_staleness, loop.checkpoint_every, loop.groups_per_step) == (3, 5, 2)
    same, different = ([{"reward": 1.0}, {"reward": reward}] for reward in (1.0, 0.0))
    assert loop.keep is not None
    assert [
        loop.keep(Group("g", tuple(finished(f"r{n}", [t]) for n, t in enumerate(x)))) for x in (same, different)
    ] == [
        False,
        True,
    ]


@pytest.mark.parametrize("kind", [*TYPES, "rft"])
def test_a_rubric_judges_the_groups_of_every_loop(folder: Path, kind: str) -> None:
    given = {"type": kind, "model": folder, **TYPES.get(kind, {}), "rubric": {"judge": "large", "prompt": "taste"}}
    loop = algorithm_of(OPTIONS.validate_python(given))
    assert isinstance(loop, PolicyGradient)
    assert loop.rubric == Rubric(model="large", prompt="taste")


@pytest.mark.parametrize("kind", TYPES)
def test_the_preset_for_a_pretrained_model_is_what_was_published(folder: Path, kind: str) -> None:
    """lr, warm-up, one epoch, no entropy bonus and no KL as in DAPO (arXiv:2503.14476)."""
    given = {"type": kind, "model": folder, **TYPES[kind]}
    loop = algorithm_of(OPTIONS.validate_python(given | {"preset": "pretrained"}))
    assert isinstance(loop, PolicyGradient)
    learner: Any = loop.learner
    assert (learner.lr, learner.warmup, learner.epochs, learner.entropy) == (1e-6, 20, 1, 0.0)
    assert learner.kl == TYPES[kind].get("kl", 0.0)
    assert learner._optimizer.param_groups[0]["weight_decay"] == 0.1
    random = OPTIONS.validate_python(given)
    assert OPTIONS.validate_python(given | {"preset": "random"}) == random
    assert (random.lr, random.warmup, random.epochs, random.entropy) == (5e-4, 0, 2, 0.1)


def test_what_is_given_takes_precedence_over_the_preset(folder: Path) -> None:
    given = {"type": "ppo", "model": folder, "preset": "pretrained", "lr": 3e-6, "epochs": 4}
    options = OPTIONS.validate_python(given)
    assert (options.lr, options.epochs, options.entropy, options.critic_lr) == (3e-6, 4, 0.0, 1e-5)


def test_verl_is_a_type(tmp_path: Path) -> None:
    assert isinstance(algorithm_of(OPTIONS.validate_python({"type": "verl", "model": tmp_path})), Verl)


@pytest.mark.parametrize(
    ("given", "says"),
    [
        ({"type": "grppo", "model": "m"}, "'grppo'"),
        ({"model": "m"}, "type"),
        ({"type": "grpo", "model": "m", "learning_rate": 1}, "learning_rate"),
        ({"type": "dr_grpo", "model": "m"}, "norm_tokens"),
        ({"type": "grpo", "model": "m", "preset": "tuned"}, "preset"),
        ({"type": "grpo", "model": "m", "rubric": {}}, "judge"),
        ({"type": "grpo", "model": "m", "rubric": {"judge": "j"}, "data": {}}, "drop rubric, or data"),
    ],
)
def test_what_is_wrong_is_named(given: dict[str, Any], says: str) -> None:
    with pytest.raises(ValidationError, match=says):
        OPTIONS.validate_python(given)
