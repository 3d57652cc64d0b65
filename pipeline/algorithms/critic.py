"""The critic of PPO: a value of each token, and advantages from it."""

from collections import defaultdict
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from millstream.pipeline.algorithms.batches import Batch, batch_of, stream
from millstream.pipeline.algorithms.estimators import gae, whitened
from millstream.pipeline.algorithms.losses import token_weights, value_loss
from millstream.pipeline.algorithms.rows import Row
from millstream.pipeline.models.policy import load_model


@dataclass(frozen=True, slots=True)
class CriticOptions:
    lr: float = 5e-4  # that of the policy: both begin as the same model
    clip: float = 0.2  # how far a value moves in one update before its loss grows no more; as in PPO's own code
    discount: float = 1.0  # rollouts are short, and a late success is as good as an early one
    decay: float = 0.95  # λ; Schulman et al. found .9 to .99 best
    max_grad_norm: float = 1.0  # that of the policy


class Critic:
    """A copy of the model with a value head that begins at 0. The value of a token is that of the state before it.

    Advantages are `gae` over the tokens of a rollout, through all its rows in order, then whitened over the batch.
    """

    def __init__(self, folder: str | Path, options: CriticOptions, device: str, dtype: str) -> None:
        self._options = options
        self._device, self._dtype = device, dtype
        body = load_model(folder).eval()
        self._body = body.base_model.to(device)
        self._head = torch.nn.Linear(body.config.get_text_config().hidden_size, 1).to(device)
        torch.nn.init.zeros_(self._head.weight)
        torch.nn.init.zeros_(self._head.bias)
        self._parameters = [*self._body.parameters(), *self._head.parameters()]
        self._optimizer = torch.optim.Adam(self._parameters, lr=options.lr)
        self._rows: Sequence[Row] = ()
        self._values: list[list[float]] = []
        self._returns: list[list[float]] = []
        self._explained = 0.0

    def prepare(self, rows: Sequence[Row], microbatch: int) -> list[Row]:
        """The rows with advantages by the present values. `step` learns from the same rows."""
        self._rows = rows
        self._values = self._evaluate(rows, microbatch)
        self._returns = [[0.0] * len(row.response) for row in rows]
        places: dict[tuple[str, int], list[tuple[int, int]]] = defaultdict(list)  # of a rollout's tokens, in order
        for i, row in enumerate(rows):
            # Rows without a rollout's name stand for themselves.
            key = (row.rollout_id, 0) if row.rollout_id else ("", i)
            places[key] += [(i, t) for t, weight in enumerate(row.rl) if weight]
        advantages: dict[tuple[int, int], float] = {}
        for tokens in places.values():
            rewards, values = ([of[i][t] for i, t in tokens] for of in ([row.rewards for row in rows], self._values))
            found, returns = gae(rewards, values, self._options.discount, self._options.decay)
            for (i, t), advantage, each in zip(tokens, found, returns, strict=True):
                advantages[i, t] = advantage
                self._returns[i][t] = each
        scaled = dict(zip(advantages, whitened(list(advantages.values())), strict=True))
        self._explained = _explained(
            [self._returns[i][t] for i, t in advantages], [self._values[i][t] for i, t in advantages]
        )
        return [
            replace(row, advantages=[scaled.get((i, t), 0.0) for t in range(len(row.response))])
            for i, row in enumerate(rows)
        ]

    def step(self, chosen: Sequence[int], microbatch: int) -> dict[str, float]:
        """One step of the optimizer on these of the rows that were prepared."""
        self._optimizer.zero_grad()
        shares = token_weights(stream([self._rows[i].rl for i in chosen]), "token-mean")
        loss = clipped = 0.0
        for start in range(0, len(chosen), microbatch):
            part = chosen[start : start + microbatch]
            batch = batch_of([self._rows[i] for i in part], self._device)
            old, returns = (stream([of[i] for i in part], self._device) for of in (self._values, self._returns))
            share = shares[start : start + len(part), -old.shape[1] :].to(self._device)
            by_token, held = value_loss(self._predict(batch), old, returns, self._options.clip)
            total = (by_token * share).sum()
            total.backward()  # type: ignore[no-untyped-call]
            loss += total.item()
            clipped += (held * share).sum().item()
        norm = torch.nn.utils.clip_grad_norm_(self._parameters, self._options.max_grad_norm)
        if not torch.isfinite(norm):
            raise FloatingPointError("the critic's gradient is not finite; its weights are unchanged")
        self._optimizer.step()
        return {"value_loss": loss, "value_clip_fraction": clipped, "value_explained": self._explained}

    @torch.no_grad()
    def _evaluate(self, rows: Sequence[Row], microbatch: int) -> list[list[float]]:
        found: list[list[float]] = []
        for start in range(0, len(rows), microbatch):
            part = rows[start : start + microbatch]
            values = self._predict(batch_of(part, self._device))
            found += [values[i, -len(row.response) :].tolist() for i, row in enumerate(part)]
        return found

    def _predict(self, batch: Batch) -> Tensor:
        """Values of the responses' tokens: (rows, longest response)."""
        with torch.autocast(torch.device(self._device).type, torch.bfloat16, enabled=self._dtype == "bfloat16"):
            hidden = self._body(**batch.inputs, use_cache=False).last_hidden_state[:, -batch.targets.shape[1] :]
        values: Tensor = self._head(hidden.float())[:, :, 0]
        return values[batch.places]

    def state(self) -> dict[str, Any]:
        return {
            "body": self._body.state_dict(),
            "head": self._head.state_dict(),
            "optimizer": self._optimizer.state_dict(),
        }

    def load_state(self, state: Mapping[str, Any]) -> None:
        self._body.load_state_dict(state["body"])
        self._head.load_state_dict(state["head"])
        self._optimizer.load_state_dict(state["optimizer"])


def _explained(returns: Sequence[float], values: Sequence[float]) -> float:
    """The share of the returns' variance that the values explain: 1 − Var(R − V) / Var(R), and 0 without variance."""
    found = torch.tensor(returns, dtype=torch.float64)
    if len(found) < 2 or not (variance := float(found.var())):
        return 0.0
    return 1.0 - float((found - torch.tensor(values, dtype=torch.float64)).var()) / variance
