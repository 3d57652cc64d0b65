"""Group relative policy optimisation, with a torch model in this process.

Sources: Shao et al., DeepSeekMath, arXiv:2402.03300 (GRPO); Yu et al., DAPO, arXiv:2503.14476 (a higher upper clip,
the mean over tokens instead of over answers, no KL penalty). The advantages are in `advantages`.
"""

from collections import defaultdict
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any, Final

import torch
from torch import Tensor

from millstream.pipeline.algorithms.losses import entropy, kl, policy_loss
from millstream.pipeline.algorithms.policy_gradient import PolicyGradient
from millstream.pipeline.algorithms.samples import Sample, padded, samples_of, usable
from millstream.pipeline.models.policy import copy_weights, left_pad, load_model, one_thread, parameters
from millstream.pipeline.training.groups import Group

LARGEST_LOG_RATIO: Final = 20.0  # far beyond any clip; its exponential is finite


def GRPO(  # noqa: N802 - as one names an algorithm
    model: str | Path,
    *,
    groups_per_step: int = 16,
    group_size: int = 8,
    max_staleness: int = 0,
    drop_above: int | None = None,
    validate_every: int = 0,
    **learner: Any,
) -> PolicyGradient:
    """The loop (`PolicyGradient`) around a `GrpoLearner`, which takes the other arguments."""
    return PolicyGradient(
        GrpoLearner(model, **learner),
        groups_per_step=groups_per_step,
        group_size=group_size,
        max_staleness=max_staleness,
        drop_above=drop_above,
        validate_every=validate_every,
    )


class GrpoLearner:
    """A `Learner`. Adam on the clipped policy objective, minus an entropy bonus."""

    def __init__(
        self,
        model: str | Path,
        *,
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
        and up. ``merge_turns`` makes one row of turns that continue each other token by token: a long conversation is
        evaluated once instead of once a turn, and ``minibatch`` is in rows. With too small an entropy bonus a policy
        with random weights settles on the first answer that earned anything: the calculator then stays at a third of
        its reward.

        Raises `ConfigError` if the folder has no model.
        """
        one_thread()
        self.model = Path(model)
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
        """See `Learner.update`. ``max_ratio_error``, |ratio − 1| before the first optimizer step, is near 0 if these
        very weights sampled the data, token by token. ``dropped_members``: see `usable`."""
        one_thread()
        groups, dropped_members = usable(groups, self._model.get_input_embeddings().num_embeddings)
        samples, turns, dropped = samples_of(groups, self.merge_turns)
        metrics = {"dropped_groups": float(dropped), "turns": float(turns), "rows": float(len(samples))}
        metrics["dropped_members"] = float(dropped_members)
        sums: dict[str, list[float]] = defaultdict(list)
        for _ in range(self.epochs):
            order = torch.randperm(len(samples), generator=self._random).tolist()
            for start in range(0, len(order), self.minibatch):
                values = self._step([samples[i] for i in order[start : start + self.minibatch]])
                error = values.pop("max_ratio_error")
                metrics.setdefault("max_ratio_error", error)
                metrics.setdefault("mismatch_kl", values["kl"])
                for name, value in values.items():
                    sums[name].append(value)
        return metrics | {name: sum(values) / len(values) for name, values in sums.items()}

    def _step(self, samples: Sequence[Sample]) -> dict[str, float]:
        logprobs, entropies = self._evaluate(samples)
        old, advantage, mask = padded(samples)
        log_ratio = (logprobs - old)[mask].clamp(-LARGEST_LOG_RATIO, LARGEST_LOG_RATIO)
        policy, clipped = policy_loss(log_ratio, advantage[mask], self.clip)
        mean_entropy = entropies[mask].mean()
        loss = policy - self.entropy * mean_entropy
        self._optimizer.zero_grad()
        loss.backward()  # type: ignore[no-untyped-call]
        norm = torch.nn.utils.clip_grad_norm_(self._model.parameters(), self.max_grad_norm)
        if not torch.isfinite(norm):
            raise FloatingPointError("the gradient is not finite; the weights are unchanged")
        self._optimizer.step()
        with torch.no_grad():
            return {
                "loss": loss.item(),
                "entropy": mean_entropy.item(),
                "clip_fraction": clipped.item(),
                "kl": kl(log_ratio).item(),
                "grad_norm": norm.item(),
                "max_ratio_error": (log_ratio.exp() - 1).abs().max().item(),
            }

    def _evaluate(self, samples: Sequence[Sample]) -> tuple[Tensor, Tensor]:
        """Log-probabilities of the responses' tokens, and entropies: (samples, longest response), padded on the
        left."""
        longest = max(len(sample.response) for sample in samples)
        # Turns of a group often differ in their last token only: the model evaluates equal rows once.
        rows = [(*sample.prompt, *sample.response[:-1]) for sample in samples]
        places = {row: place for place, row in enumerate(dict.fromkeys(rows))}
        logits = self._model(**left_pad(list(places)), use_cache=False, logits_to_keep=longest).logits.float()
        full = torch.log_softmax(logits, dim=-1)[torch.tensor([places[row] for row in rows])]
        targets = left_pad([sample.response for sample in samples])["input_ids"]
        return full.gather(2, targets[:, :, None])[:, :, 0], entropy(full)

    def weights(self) -> Mapping[str, Tensor]:
        """See `Learner.weights`: float32 tensors by parameter name, tied ones once."""
        return parameters(self._model)

    def state(self) -> dict[str, Any]:
        return {
            "weights": self.weights(),
            "optimizer": self._optimizer.state_dict(),
            "random": self._random.get_state(),
        }

    def load_state(self, state: Mapping[str, Any]) -> None:
        """See `Learner.load_state`. Raises `ConfigError` if the weights do not fit this model."""
        copy_weights(self._model, state["weights"])
        self._optimizer.load_state_dict(state["optimizer"])
        self._random.set_state(state["random"])
