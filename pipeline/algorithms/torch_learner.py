"""A learner with a torch model in this process, on one device."""

import math
from collections import defaultdict
from collections.abc import Mapping, Sequence
from contextlib import AbstractContextManager
from pathlib import Path
from typing import Any, Final, Literal

import torch
from torch import Tensor

from millstream.pipeline.algorithms import losses
from millstream.pipeline.algorithms.batches import Batch, batch_of, stream, token_logprobs
from millstream.pipeline.algorithms.critic import Critic, CriticOptions
from millstream.pipeline.algorithms.estimators import Estimator, grpo
from millstream.pipeline.algorithms.losses import Aggregation, Clip, Divergence, Loss, Tokens, token_weights
from millstream.pipeline.algorithms.rows import Overlong, Row, rows_of, usable
from millstream.pipeline.models.lora import Lora, LoraOptions
from millstream.pipeline.models.policy import copy_weights, load_model, one_thread, parameters
from millstream.pipeline.training.groups import Group
from millstream.schemas.errors import ConfigError

Schedule = Literal["constant", "linear", "cosine"]
QUANTILES: Final = (0.05, 0.95)  # of the ratios that a step reports
MOST_QUANTILES: Final = 2**24  # tokens; torch.quantile takes no more


class TorchLearner:
    """A `Learner`: Adam on a policy loss, minus an entropy bonus, plus a divergence from a frozen reference.

    ``model`` is a Hugging Face folder. ``estimator`` gives the advantages of turns; ``merge_turns`` makes one row of
    turns that continue each other token by token, so that a long conversation is evaluated once and not once a turn;
    ``overlong`` punishes long answers. See `rows_of`.

    One `update` goes ``epochs`` times over its rows in random order, with an
    optimizer step each ``minibatch`` rows; ``microbatch`` rows at a time are evaluated (None: all of these), which
    costs time and bounds memory.

    ``loss`` is a name in `losses.LOSSES` or a function, ``clip`` its bounds. ``correction`` says which policy the ratio
    compares with: the one that sampled ("bypass"), or the one at the beginning of the update ("decoupled": evaluated
    again, and tokens weighted by at most ``cap``; see `losses.importance_weights`).

    ``lr`` rises linearly during the first ``warmup`` updates; then it stays, or falls to 0 at update ``updates``, by
    the ``schedule``. ``weight_decay`` 0 is Adam, otherwise AdamW. ``divergence`` is multiplied with ``kl``;
    ``reference`` is a folder, by default ``model``. ``lora`` trains adapters in place of the weights, ``critic``
    computes the advantages.

    The weights, their gradients and Adam are float32; ``dtype`` "bfloat16" evaluates them in bfloat16 (autocast).

    With too small an ``entropy`` bonus a policy with random weights settles on the first answer that earned anything:
    the calculator then stays at a third of its reward.

    Raises `ConfigError` if a folder has no model, an option has no such value, or the device is missing.
    """

    unit = 1  # rows that follow each other and stay together

    def __init__(
        self,
        model: str | Path,
        *,
        estimator: Estimator = grpo,
        merge_turns: bool = False,
        overlong: Overlong | None = None,
        lr: float = 5e-4,
        schedule: Schedule = "constant",
        warmup: int = 0,
        updates: int | None = None,
        weight_decay: float = 0.0,
        max_grad_norm: float = 1.0,
        epochs: int = 2,
        minibatch: int = 128,
        microbatch: int | None = None,
        loss: str | Loss = "ppo",
        clip: Clip = (0.2, 0.28),
        aggregation: Aggregation = "token-mean",
        norm_tokens: int | None = None,
        entropy: float = 0.1,
        kl: float = 0.0,
        divergence: Divergence = "k3",
        reference: str | Path | None = None,
        correction: Literal["bypass", "decoupled"] = "bypass",
        cap: float = 2.0,
        device: str = "cpu",
        dtype: Literal["float32", "bfloat16"] = "float32",
        lora: LoraOptions | None = None,
        critic: CriticOptions | None = None,
        seed: int = 0,
    ) -> None:
        self.arguments = {name: value for name, value in locals().items() if name != "self"}  # for the record
        self.model = Path(model)
        self.estimator, self.merge_turns, self.overlong = estimator, merge_turns, overlong
        self.epochs = epochs
        self.minibatch = minibatch
        self.microbatch = microbatch or minibatch
        self.loss = _loss(loss)
        self.clip = clip
        self.aggregation, self.norm_tokens = aggregation, norm_tokens
        self.entropy = entropy
        self.kl, self.divergence = kl, divergence
        self.correction, self.cap = correction, cap
        self.max_grad_norm = max_grad_norm
        self.device, self.dtype = device, dtype
        self.lr, self.schedule, self.warmup, self.updates = lr, schedule, warmup, updates
        if schedule != "constant" and not updates:
            raise ConfigError(f"schedule {schedule!r} falls to 0 at update `updates`: give their number")
        if kl and divergence == "k1":
            raise ConfigError("divergence 'k1' has a gradient of mean 0 and holds nothing: take 'k2' or 'k3'")
        self._one_thread()
        self._model = _on(device, load_model(model)).eval()  # no dropout: the ratio is 1 until the first step
        self.vocabulary: int = self._model.get_input_embeddings().num_embeddings
        self._reference = _on(device, load_model(reference or model)).eval() if kl else None
        self._lora = Lora(self._model, lora, seed) if lora else None
        if self._lora:
            self._model = self._lora.model
        trained = [parameter for parameter in self._model.parameters() if parameter.requires_grad]
        self._optimizer = (
            torch.optim.AdamW(trained, lr=lr, weight_decay=weight_decay)
            if weight_decay
            else torch.optim.Adam(trained, lr=lr)
        )
        self._critic = Critic(model, critic, device, dtype) if critic else None
        self._random = torch.Generator().manual_seed(seed)
        self._updates = 0

    def update(self, groups: Sequence[Group]) -> dict[str, float]:
        """See `Learner.update` and `learn`. ``dropped_members``: see `usable`."""
        groups, dropped_members = usable(groups, self.vocabulary)
        rows, turns, dropped = rows_of(groups, self.estimator, self.merge_turns, self.overlong)
        counts = {"dropped_groups": dropped, "dropped_members": dropped_members, "turns": turns, "rows": len(rows)}
        return {name: float(count) for name, count in counts.items()} | self.learn(rows)

    def learn(self, rows: Sequence[Row]) -> dict[str, float]:
        """One update; no metrics without rows. ``max_ratio_error``, |ratio − 1|, and ``mismatch_kl`` are those before
        the first optimizer step: near 0 if these very weights sampled the data, token by token. ``kl`` is from the
        policy that sampled, ``ref_kl`` from the reference; ``ratio_p05`` and ``ratio_p95`` are quantiles of the
        policy's ratio to the one that sampled. Raises `FloatingPointError` if a gradient is not finite."""
        if not rows:
            return {}
        self._one_thread()
        for group in self._optimizer.param_groups:
            group["lr"] = self.lr * lr_factor(self._updates, self.schedule, self.warmup, self.updates)
        self._updates += 1
        if self._critic:
            rows = self._critic.prepare(rows, self.microbatch)
        decoupled = self.correction == "decoupled"
        old = self._evaluated(self._model, rows) if decoupled else [row.logprobs for row in rows]
        metrics: dict[str, float] = {}
        sums: dict[str, list[float]] = defaultdict(list)
        for _ in range(self.epochs):
            units = torch.randperm(len(rows) // self.unit, generator=self._random).tolist()
            order = [self.unit * i + k for i in units for k in range(self.unit)]
            for start in range(0, len(order), self.minibatch):
                chosen = order[start : start + self.minibatch]
                values = self._step([rows[i] for i in chosen], [old[i] for i in chosen])
                if self._critic:
                    values |= self._critic.step(chosen, self.microbatch)
                if "max_ratio_error" in values:
                    metrics.setdefault("mismatch_kl", values["kl"])
                    metrics.setdefault("max_ratio_error", values.pop("max_ratio_error"))
                for name, value in values.items():
                    sums[name].append(value)
        return metrics | {name: sum(values) / len(values) for name, values in sums.items()}

    def _step(self, rows: Sequence[Row], old: Sequence[Sequence[float]]) -> dict[str, float]:
        """One step of the optimizer. Shares are those of all rows, so microbatches add up to the whole."""
        self._optimizer.zero_grad()
        weights = {name: stream([getattr(row, name) for row in rows]) for name in ("rl", "ce", "ref_kl")}
        shares = {name: token_weights(each, self.aggregation, self.norm_tokens) for name, each in weights.items()}
        learnt = torch.stack([each != 0 for each in weights.values()]).any(0)
        counts = {"rl": int((weights["rl"] != 0).sum()), "any": int(learnt.sum()), "rows": len(rows)}
        sums: dict[str, float] = defaultdict(float)
        ratios = []
        for start in range(0, len(rows), self.microbatch):
            part = slice(start, start + self.microbatch)
            batch = batch_of(rows[part], self.device)
            width = batch.targets.shape[1]
            of_part = {name: share[part, -width:].to(self.device) for name, share in shares.items()}
            values, ratio = self._losses(batch, stream(old[part], self.device), of_part, counts)
            values["loss"].backward()  # type: ignore[no-untyped-call]
            for name, value in values.items():
                sums[name] += value.item()
            ratios.append(ratio)
        norm = torch.nn.utils.clip_grad_norm_(self._model.parameters(), self.max_grad_norm)
        if not torch.isfinite(norm):
            raise FloatingPointError("the gradient is not finite; the weights are unchanged")
        self._optimizer.step()
        lr = self._optimizer.param_groups[0]["lr"]
        return dict(sums) | {"grad_norm": norm.item(), "lr": lr} | _ratio_metrics(torch.cat(ratios))

    def _losses(
        self, batch: Batch, old: Tensor, shares: Mapping[str, Tensor], counts: Mapping[str, int]
    ) -> tuple[dict[str, Tensor], Tensor]:
        """The parts of the loss, "loss" with its gradient; and the ratios to the policy that sampled."""
        with self._autocast():
            logprobs, entropies = token_logprobs(self._model, batch)
        policy_mask, learnt = batch.rl != 0, batch.mask
        by_token, held = self.loss(Tokens(logprobs, old, batch.advantages, policy_mask), self.clip)
        if self.correction == "decoupled":
            by_token = by_token * losses.importance_weights(old, batch.logprobs, self.cap)
        mean_entropy = entropies[learnt].sum() / counts["any"]
        loss = _total(by_token, shares["rl"]) - self.entropy * mean_entropy
        parts = {"entropy": mean_entropy.detach()}
        if self._reference is not None:
            with torch.no_grad(), self._autocast():
                reference, _ = token_logprobs(self._reference, batch)
            parts["ref_kl"] = _total(losses.divergence(logprobs, reference, self.divergence), shares["ref_kl"])
            loss = loss + self.kl * parts["ref_kl"]
        if bool(shares["ce"].any()):
            parts["ce"] = _total(losses.cross_entropy(logprobs), shares["ce"])
            loss = loss + parts["ce"]
        with torch.no_grad():
            sampled = Tokens(logprobs, batch.logprobs, batch.advantages, policy_mask)
            log_ratio = sampled.log_ratio[policy_mask]
            parts["clip_fraction"] = held[policy_mask].sum() / max(counts["rl"], 1)
            parts["kl"] = losses.kl(log_ratio).sum() / max(counts["rl"], 1)
        return {"loss": loss} | parts, log_ratio.exp()

    @torch.no_grad()
    def _evaluated(self, model: Any, rows: Sequence[Row]) -> list[list[float]]:
        """Log-probabilities of the rows' responses by the model's present weights."""
        found: list[list[float]] = []
        for start in range(0, len(rows), self.microbatch):
            part = rows[start : start + self.microbatch]
            with self._autocast():
                logprobs, _ = token_logprobs(model, batch_of(part, self.device))
            found += [logprobs[i, -len(row.response) :].tolist() for i, row in enumerate(part)]
        return found

    def _autocast(self) -> AbstractContextManager[Any]:
        return torch.autocast(torch.device(self.device).type, torch.bfloat16, enabled=self.dtype == "bfloat16")

    def weights(self) -> Mapping[str, Tensor]:
        """See `Learner.weights`: float32 tensors by parameter name, tied ones once. Adapters are merged into them."""
        return self._lora.merged() if self._lora else parameters(self._model)

    def state(self) -> dict[str, Any]:
        state = {
            "weights": self.weights(),
            "optimizer": self._optimizer.state_dict(),
            "random": self._random.get_state(),
            "updates": self._updates,
        }
        if self._lora:
            state["lora"] = self._lora.state()
        if self._critic:
            state["critic"] = self._critic.state()
        return state

    def load_state(self, state: Mapping[str, Any]) -> None:
        """See `Learner.load_state`."""
        for name, own in (("lora", self._lora), ("critic", self._critic)):
            if (name in state) != (own is not None):
                raise ConfigError(f"the checkpoint was made {'with' if name in state else 'without'} {name}: set it so")
        if self._lora:
            self._lora.load_state(state["lora"])
        else:
            copy_weights(self._model, state["weights"])
        if self._critic:
            self._critic.load_state(state["critic"])
        self._optimizer.load_state_dict(state["optimizer"])
        self._random.set_state(state["random"])
        self._updates = state["updates"]

    def _one_thread(self) -> None:
        if self.device == "cpu":
            one_thread()


def lr_factor(update: int, schedule: Schedule, warmup: int, updates: int | None) -> float:
    """What the learning rate is multiplied with in the update of this number, counted from 0."""
    if update < warmup:
        return (update + 1) / (warmup + 1)
    if schedule == "constant" or not updates:
        return 1.0
    done = min(1.0, (update - warmup) / max(updates - warmup, 1))
    return 1.0 - done if schedule == "linear" else 0.5 * (1.0 + math.cos(math.pi * done))


def _total(by_token: Tensor, shares: Tensor) -> Tensor:
    counted = shares != 0
    return (by_token[counted] * shares[counted]).sum()


def _ratio_metrics(ratio: Tensor) -> dict[str, float]:
    if not len(ratio):
        return {}
    low, high = torch.quantile(ratio[:MOST_QUANTILES], torch.tensor(QUANTILES, device=ratio.device)).tolist()
    return {"ratio_p05": low, "ratio_p95": high, "max_ratio_error": (ratio - 1).abs().max().item()}


def _loss(loss: str | Loss) -> Loss:
    if not isinstance(loss, str):
        return loss
    if loss not in losses.LOSSES:
        raise ConfigError(f"unknown loss {loss!r}: one of {', '.join(losses.LOSSES)}, or a function")
    return losses.LOSSES[loss]


def _on(device: str, model: Any) -> Any:
    try:
        return model.to(device)
    except (RuntimeError, AssertionError) as error:  # torch: a bad name, CUDA without a driver, a build without CUDA
        raise ConfigError(f"device {device!r}: {error}") from error
