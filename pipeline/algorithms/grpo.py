"""Group relative policy optimisation, with a torch model in this process.

Sources: Shao et al., DeepSeekMath, arXiv:2402.03300 (GRPO); Yu et al., DAPO, arXiv:2503.14476 (a higher upper clip,
the mean over tokens instead of over answers, no KL penalty). The advantages are in `credit`.
"""

from collections import defaultdict
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor

from millstream.pipeline.algorithms.credit import Turns, advantages, turn_rewards
from millstream.pipeline.batches import FinishedRollout, Group
from millstream.pipeline.policy import copy_weights, left_pad, load_model, one_thread, parameters
from millstream.schemas.records import Triplet


@dataclass(frozen=True, slots=True)
class Turn:
    """One LLM call to learn from; ``logprobs`` are those of the response's tokens when they were sampled."""

    prompt: list[int]
    response: list[int]
    logprobs: list[float]
    advantage: float


class GRPO:
    """An `Algorithm`. Adam on the clipped policy objective, minus an entropy bonus."""

    def __init__(
        self,
        model: str | Path,
        *,
        groups_per_step: int = 16,
        group_size: int = 8,
        lr: float = 5e-4,
        entropy: float = 0.1,
        clip: tuple[float, float] = (0.2, 0.28),
        epochs: int = 2,
        minibatch: int = 128,
        max_grad_norm: float = 1.0,
        seed: int = 0,
    ) -> None:
        """``model`` is a Hugging Face folder, ``minibatch`` is in turns, ``clip`` are the distances from ratio 1 down
        and up. Too small an entropy bonus, and a policy that starts from random weights settles on the first answer
        that ever earned something: the calculator then stays at a third of its reward.

        Raises `ConfigError` if the folder holds no model.
        """
        one_thread()
        self.model = Path(model)
        self.groups_per_step = groups_per_step
        self.group_size = group_size
        self.entropy = entropy
        self.clip = clip
        self.epochs = epochs
        self.minibatch = minibatch
        self.max_grad_norm = max_grad_norm
        self._model = load_model(model).eval()  # no dropout: the ratio is 1 until the first step
        self._optimizer = torch.optim.Adam(self._model.parameters(), lr=lr)
        self._random = torch.Generator().manual_seed(seed)

    def update(self, groups: Sequence[Group]) -> dict[str, float]:
        """See `Algorithm.update`. ``max_ratio_error``, |ratio − 1| before the first optimizer step, is near 0 as long
        as the data were made by these very weights, token for token. Raises ValueError naming rollout and turn if a
        trainable triplet lacks tokens or log-probabilities."""
        one_thread()
        turns, dropped = batch_of(groups)
        metrics = {"dropped_groups": float(dropped), "turns": float(len(turns))}
        sums: dict[str, list[float]] = defaultdict(list)
        for _ in range(self.epochs):
            order = torch.randperm(len(turns), generator=self._random).tolist()
            for start in range(0, len(order), self.minibatch):
                values = self._step([turns[i] for i in order[start : start + self.minibatch]])
                error = values.pop("max_ratio_error")
                metrics.setdefault("max_ratio_error", error)
                for name, value in values.items():
                    sums[name].append(value)
        return metrics | {name: sum(values) / len(values) for name, values in sums.items()}

    def _step(self, turns: Sequence[Turn]) -> dict[str, float]:
        logprobs, entropies, mask = self._evaluate(turns)
        old = torch.zeros_like(logprobs)
        advantage = torch.tensor([turn.advantage for turn in turns])[:, None]
        for i, turn in enumerate(turns):
            old[i, old.shape[1] - len(turn.response) :] = torch.tensor(turn.logprobs)
        log_ratio = (logprobs - old)[mask]
        policy, clipped = policy_loss(log_ratio, advantage.expand_as(mask)[mask], self.clip)
        entropy = entropies[mask].mean()
        loss = policy - self.entropy * entropy
        self._optimizer.zero_grad()
        loss.backward()  # type: ignore[no-untyped-call]
        norm = torch.nn.utils.clip_grad_norm_(self._model.parameters(), self.max_grad_norm)
        if not torch.isfinite(norm):
            raise FloatingPointError("the gradient is not finite; the weights were left as they were")
        self._optimizer.step()
        with torch.no_grad():
            ratio = log_ratio.exp()
            return {
                "loss": loss.item(),
                "entropy": entropy.item(),
                "clip_fraction": clipped.item(),
                "kl": (ratio - 1 - log_ratio).mean().item(),  # Schulman's k3 estimate of KL(rollout ‖ policy)
                "grad_norm": norm.item(),
                "max_ratio_error": (ratio - 1).abs().max().item(),
            }

    def _evaluate(self, turns: Sequence[Turn]) -> tuple[Tensor, Tensor, Tensor]:
        """Log-probabilities of the responses' tokens, entropies at them, and which places hold one: each
        (turns, longest response), flush right."""
        longest = max(len(turn.response) for turn in turns)
        # A group asks the same first question, so many turns share all that comes before their last token: such a row
        # goes through the model once.
        rows = [(*turn.prompt, *turn.response[:-1]) for turn in turns]
        places = {row: place for place, row in enumerate(dict.fromkeys(rows))}
        logits = self._model(**left_pad(list(places)), use_cache=False, logits_to_keep=longest).logits.float()
        full = torch.log_softmax(logits, dim=-1)[torch.tensor([places[row] for row in rows])]
        targets = left_pad([turn.response for turn in turns])["input_ids"]
        lengths = torch.tensor([len(turn.response) for turn in turns])
        mask = torch.arange(longest)[None, :] >= longest - lengths[:, None]
        return full.gather(2, targets[:, :, None])[:, :, 0], -(full.exp() * full).sum(-1), mask

    def weights(self) -> Mapping[str, Tensor]:
        """See `Algorithm.weights`: float32 tensors by parameter name, tied ones once."""
        return parameters(self._model)

    def state(self) -> dict[str, Any]:
        """See `Algorithm.state`."""
        return {
            "weights": self.weights(),
            "optimizer": self._optimizer.state_dict(),
            "random": self._random.get_state(),
        }

    def load_state(self, state: Mapping[str, Any]) -> None:
        """See `Algorithm.load_state`. Raises ValueError if the weights do not fit this model."""
        copy_weights(self._model, state["weights"])
        self._optimizer.load_state_dict(state["optimizer"])
        self._random.set_state(state["random"])


def policy_loss(log_ratio: Tensor, advantage: Tensor, clip: tuple[float, float]) -> tuple[Tensor, Tensor]:
    """−mean(min(ρA, clip(ρ, 1 − low, 1 + high) A)) over tokens, and the share of tokens where the clip holds the
    gradient back. PPO (arXiv:1707.06347, eq. 7), with DAPO's two bounds (eq. 10)."""
    ratio = log_ratio.exp()
    free, held = ratio * advantage, ratio.clamp(1 - clip[0], 1 + clip[1]) * advantage
    return -torch.minimum(free, held).mean(), (held < free).float().mean()


def batch_of(groups: Sequence[Group]) -> tuple[list[Turn], int]:
    """The turns to learn from, and how many groups were dropped because fewer than two members can be trained on."""
    kept = []
    for group in groups:
        members = [used for member in group.members if (used := _trainable(member))]
        if len(members) >= 2:
            kept.append(members)
    rewards = [[turn_rewards([(t.turn, t.reward) for t in triplets]) for triplets in members] for members in kept]
    turns = [
        _turn(triplet, credit)
        for members, earned in zip(kept, advantages(rewards), strict=True)
        for triplets, credit in zip(members, earned, strict=True)
        for triplet in triplets
    ]
    return turns, len(groups) - len(kept)


def _trainable(member: FinishedRollout) -> list[Triplet]:
    if not member.end.trainable or member.end.status != "succeeded":
        return []
    return [triplet for triplet in member.triplets if triplet.trainable]


def _turn(triplet: Triplet, credit: Turns) -> Turn:
    parts = triplet.prompt_token_ids, triplet.response_token_ids, triplet.response_logprobs
    if not all(parts) or len(parts[1] or b"") != len(parts[2] or b""):
        raise ValueError(
            f"rollout {triplet.rollout_id}, turn {triplet.turn}: a trainable triplet needs prompt tokens, and as many "
            "log-probabilities as response tokens; does the model server return both?"
        )
    prompt, response, logprobs = (
        np.frombuffer(part or b"", kind).tolist() for part, kind in zip(parts, ("<i4", "<i4", "<f4"), strict=True)
    )
    return Turn(prompt, response, logprobs, credit[triplet.turn])
