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
from millstream.pipeline.models.policy import copy_weights, left_pad, load_model, one_thread, parameters
from millstream.pipeline.training.algorithm import FinishedRollout, Group
from millstream.schemas.wire.prefixes import conversations
from millstream.schemas.wire.records import Triplet


@dataclass(frozen=True, slots=True)
class Sample:
    """A row to learn from: one turn, or several of a conversation. For each token of ``response``: its log-probability
    when it was sampled, its advantage, and whether it is learnt from (what comes between two turns is not)."""

    prompt: list[int]
    response: list[int]
    logprobs: list[float]
    advantages: list[float]
    mask: list[bool]


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
        merge_turns: bool = False,
        seed: int = 0,
    ) -> None:
        """``model`` is a Hugging Face folder, ``minibatch`` is in turns, ``clip`` are the distances from ratio 1 down
        and up. ``merge_turns`` makes one row of turns that go on from each other token by token: a long conversation
        is evaluated once instead of once a turn (``minibatch`` is in rows, then). Too small an entropy bonus, and a
        policy that starts from random weights settles on the first answer that ever earned something: the calculator
        then stays at a third of its reward.

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
        self.merge_turns = merge_turns
        self._model = load_model(model).eval()  # no dropout: the ratio is 1 until the first step
        self._optimizer = torch.optim.Adam(self._model.parameters(), lr=lr)
        self._random = torch.Generator().manual_seed(seed)

    def update(self, groups: Sequence[Group]) -> dict[str, float]:
        """See `Algorithm.update`. ``max_ratio_error``, |ratio − 1| before the first optimizer step, is near 0 as long
        as the data were made by these very weights, token for token. Raises ValueError naming rollout and turn if a
        trainable triplet lacks tokens or log-probabilities."""
        one_thread()
        samples, turns, dropped = batch_of(groups, self.merge_turns)
        metrics = {"dropped_groups": float(dropped), "turns": float(turns), "rows": float(len(samples))}
        sums: dict[str, list[float]] = defaultdict(list)
        for _ in range(self.epochs):
            order = torch.randperm(len(samples), generator=self._random).tolist()
            for start in range(0, len(order), self.minibatch):
                values = self._step([samples[i] for i in order[start : start + self.minibatch]])
                error = values.pop("max_ratio_error")
                metrics.setdefault("max_ratio_error", error)
                for name, value in values.items():
                    sums[name].append(value)
        return metrics | {name: sum(values) / len(values) for name, values in sums.items()}

    def _step(self, samples: Sequence[Sample]) -> dict[str, float]:
        logprobs, entropies = self._evaluate(samples)
        old, advantage = torch.zeros_like(logprobs), torch.zeros_like(logprobs)
        mask = torch.zeros_like(logprobs, dtype=torch.bool)
        for i, sample in enumerate(samples):
            place = (i, slice(logprobs.shape[1] - len(sample.response), None))
            old[place] = torch.tensor(sample.logprobs)
            advantage[place] = torch.tensor(sample.advantages)
            mask[place] = torch.tensor(sample.mask)
        log_ratio = (logprobs - old)[mask]
        policy, clipped = policy_loss(log_ratio, advantage[mask], self.clip)
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

    def _evaluate(self, samples: Sequence[Sample]) -> tuple[Tensor, Tensor]:
        """Log-probabilities of the responses' tokens and entropies at them: (samples, longest response), flush
        right."""
        longest = max(len(sample.response) for sample in samples)
        # A group asks the same first question, so many turns share all that comes before their last token: such a row
        # goes through the model once.
        rows = [(*sample.prompt, *sample.response[:-1]) for sample in samples]
        places = {row: place for place, row in enumerate(dict.fromkeys(rows))}
        logits = self._model(**left_pad(list(places)), use_cache=False, logits_to_keep=longest).logits.float()
        full = torch.log_softmax(logits, dim=-1)[torch.tensor([places[row] for row in rows])]
        targets = left_pad([sample.response for sample in samples])["input_ids"]
        return full.gather(2, targets[:, :, None])[:, :, 0], -(full.exp() * full).sum(-1)

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


def batch_of(groups: Sequence[Group], merge_turns: bool = False) -> tuple[list[Sample], int, int]:
    """The rows to learn from, the turns in them, and how many groups were dropped because fewer than two members can
    be trained on."""
    kept = []
    for group in groups:
        members = [member for member in group.members if _trainable(member)]
        if len(members) >= 2:
            kept.append(members)
    samples = [
        merged([_sample(triplet, credit) for triplet in run])
        for members, earned in zip(kept, advantages([list(map(_earned, members)) for members in kept]), strict=True)
        for member, credit in zip(members, earned, strict=True)
        for run in (conversations(_trainable(member)) if merge_turns else [[t] for t in _trainable(member)])
    ]
    turns = sum(len(_trainable(member)) for members in kept for member in members)
    return samples, turns, len(groups) - len(kept)


def merged(turns: Sequence[Sample]) -> Sample:
    """One row of turns of which each prompt begins with all of the turn before it."""
    row = turns[0]
    for turn in turns[1:]:
        between = turn.prompt[len(row.prompt) + len(row.response) :]
        nothing = [0.0] * len(between)
        row = Sample(
            row.prompt,
            row.response + between + turn.response,
            row.logprobs + nothing + turn.logprobs,
            row.advantages + nothing + turn.advantages,
            row.mask + [False] * len(between) + turn.mask,
        )
    return row


def _trainable(member: FinishedRollout) -> list[Triplet]:
    if not member.end.trainable or member.end.status != "succeeded":
        return []
    return [triplet for triplet in member.triplets if triplet.trainable]


def _earned(member: FinishedRollout) -> Turns:
    """What each turn to learn from earned. What a turn that can't be learnt from was given counts for those before
    it."""
    rewards = turn_rewards([(triplet.turn, triplet.reward) for triplet in member.triplets])
    return {triplet.turn: rewards[triplet.turn] for triplet in _trainable(member)}


def _sample(triplet: Triplet, credit: Turns) -> Sample:
    parts = triplet.prompt_token_ids, triplet.response_token_ids, triplet.response_logprobs
    if not all(parts) or len(parts[1] or b"") != len(parts[2] or b""):
        raise ValueError(
            f"rollout {triplet.rollout_id}, turn {triplet.turn}: a trainable triplet needs prompt tokens, and as many "
            "log-probabilities as response tokens; does the model server return both?"
        )
    prompt, response, logprobs = (
        np.frombuffer(part or b"", kind).tolist() for part, kind in zip(parts, ("<i4", "<i4", "<f4"), strict=True)
    )
    return Sample(prompt, response, logprobs, [credit[triplet.turn]] * len(response), [True] * len(response))
