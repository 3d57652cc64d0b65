"""Records what verl's estimators and losses give for random input, with the gradients of losses.

``python tests/pipeline/algorithms/record_verl.py`` writes verl_reference.json, where verl is installed (`make verl`).
Everything is float64, so that a difference of 1e-6 is one of formulas.
"""

import json
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor
from verl.trainer.ppo import core_algos
from verl.workers.config import FSDPActorConfig

TARGET = Path(__file__).with_name("verl_reference.json")
LENGTHS = [7, 3, 1, 5, 7, 2]
GROUPS = [0, 0, 0, 1, 1, 2, 2, 2, 2, 3, 3]
CLIPS = {"narrow": (0.05, 0.1), "wide": (0.2, 0.28), "open": (1.0, 0.28)}


def loss_inputs(random: torch.Generator) -> dict[str, Tensor]:
    shape = (len(LENGTHS), max(LENGTHS))

    def normal(scale: float) -> Tensor:
        return scale * torch.randn(shape, generator=random, dtype=torch.float64)

    mask = torch.tensor([[t < length for t in range(shape[1])] for length in LENGTHS]).double()
    mask[0, 2:4] = 0  # between two turns
    logprobs = -normal(2.0).abs()
    old = logprobs + normal(0.2)
    reference = logprobs + normal(0.5)
    old[4, 1] += 30.0  # beyond every bound, in both directions
    old[4, 2] -= 30.0
    reference[4, 3] += 30.0
    return {
        "mask": mask,
        "logprobs": logprobs,
        "old": old,
        "sampled": old + normal(0.7),
        "reference": reference,
        "advantages": normal(1.0),
        "values": normal(1.0),
        "old_values": normal(1.0),
        "returns": normal(1.0),
        "rewards": normal(1.0),
    }


def with_gradient(function: Any, of: Tensor) -> dict[str, Any]:
    leaf = of.clone().requires_grad_()
    value = function(leaf)
    value.sum().backward()
    assert leaf.grad is not None
    return {"value": value.tolist(), "gradient": leaf.grad.tolist()}


def policy_losses(given: dict[str, Tensor]) -> dict[str, Any]:
    found = {}
    modes = ("token-mean", "seq-mean-token-mean", "seq-mean-token-sum-norm")
    weights = (given["old"] - given["sampled"]).clamp(-20, 20).exp().clamp(max=2.0)  # as rollout_corr_helper's "token"
    for ours, theirs in {"ppo": "vanilla", "gspo": "gspo", "cispo": "cispo", "reinforce": "gpg"}.items():
        function = core_algos.get_policy_loss_fn(theirs)
        for clip, (low, high) in CLIPS.items():
            for mode in modes:
                for correction, factor in (("bypass", None), ("decoupled", weights)):
                    config = FSDPActorConfig(
                        strategy="fsdp2",
                        rollout_n=1,
                        ppo_micro_batch_size_per_gpu=1,
                        clip_ratio_low=low,
                        clip_ratio_high=high,
                        clip_ratio_c=1e30,  # no dual clip
                    )
                    found[f"{ours}/{clip}/{mode}/{correction}"] = with_gradient(
                        lambda logprobs, function=function, mode=mode, config=config, factor=factor: function(
                            old_log_prob=given["old"],
                            log_prob=logprobs,
                            advantages=given["advantages"],
                            response_mask=given["mask"],
                            loss_agg_mode=mode,
                            config=config,
                            rollout_is_weights=factor,
                        )[0],
                        given["logprobs"],
                    )
    return found


def value_losses(given: dict[str, Tensor]) -> dict[str, Any]:
    return with_gradient(
        lambda values: core_algos.compute_value_loss(
            values, given["returns"], given["old_values"], given["mask"], cliprange_value=0.2
        )[0],
        given["values"],
    )


def divergences(given: dict[str, Tensor]) -> dict[str, Any]:
    return {
        kind: with_gradient(
            lambda logprobs, kind=kind: core_algos.kl_penalty(logprobs, given["reference"], kind) * given["mask"],
            given["logprobs"],
        )
        for kind in ("k1", "k2", "k3")
    }


def estimates(random: torch.Generator, given: dict[str, Tensor]) -> dict[str, Any]:
    """Of answers with one token, where counting turns and counting tokens are the same."""
    rewards = torch.rand(len(GROUPS), 1, generator=random, dtype=torch.float64)
    mask, index = torch.ones_like(rewards), np.array([str(group) for group in GROUPS], dtype=object)
    config = core_algos.AlgoConfig()

    def of(name: str, **options: Any) -> list[float]:
        function = core_algos.get_adv_estimator_fn(name)
        advantages, _ = function(token_level_rewards=rewards.clone(), response_mask=mask, **options)
        return [float(value) for value in advantages[:, 0]]

    advantages, returns = core_algos.compute_gae_advantage_return(
        given["rewards"], given["values"], given["mask"], torch.tensor(0.97), torch.tensor(0.9)
    )
    long = rewards.expand(-1, 3) / 3  # the same rewards for answers of three tokens
    three, _ = core_algos.get_adv_estimator_fn("reinforce_plus_plus_baseline")(
        token_level_rewards=long.clone(), response_mask=torch.ones_like(long), index=index, config=config
    )
    return {
        "rewards": rewards[:, 0].tolist(),
        "groups": GROUPS,
        "grpo_group": of("grpo", index=index),
        "dr_grpo": of("grpo", index=index, norm_adv_by_std_in_grpo=False),
        "rloo": of("rloo", index=index),
        "reinforce_pp": of("reinforce_plus_plus", config=config),
        "reinforce_pp_baseline": of("reinforce_plus_plus_baseline", index=index, config=config),
        "reinforce_pp_baseline_of_three_tokens": [float(value) for value in three[:, 0]],
        "gae": {"discount": 0.97, "decay": 0.9, "advantages": advantages.tolist(), "returns": returns.tolist()},
    }


def main() -> None:
    random = torch.Generator().manual_seed(0)
    given = loss_inputs(random)
    result = {
        "inputs": {name: tensor.tolist() for name, tensor in given.items()},
        "clips": CLIPS,
        "policy": policy_losses(given),
        "value": value_losses(given),
        "divergence": divergences(given),
        "estimates": estimates(random, given),
    }
    text = json.dumps(json.loads(json.dumps(result), parse_float=lambda text: round(float(text), 12)))
    TARGET.write_text(text + "\n")


if __name__ == "__main__":
    main()
