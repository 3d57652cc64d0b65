"""Rows as tensors, and a policy's log-probabilities of them."""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from millstream.pipeline.algorithms.losses import entropy
from millstream.pipeline.algorithms.rows import Row
from millstream.pipeline.models.policy import left_pad


@dataclass(frozen=True, slots=True)
class Batch:
    """Rows as a model reads them, and the streams of their responses: (rows, longest response), padded on the left."""

    inputs: dict[str, Tensor]  # of the rows that differ
    places: Tensor  # (rows,): which of these each row is
    targets: Tensor  # token ids
    logprobs: Tensor
    advantages: Tensor
    rl: Tensor
    ce: Tensor
    ref_kl: Tensor

    @property
    def mask(self) -> Tensor:
        """Tokens that are learnt from in any way."""
        return (self.rl != 0) | (self.ce != 0) | (self.ref_kl != 0)


def batch_of(rows: Sequence[Row], device: str = "cpu") -> Batch:
    # Turns of a group often differ in their last token only: the model evaluates equal rows once.
    read = [(*row.prompt, *row.response[:-1]) for row in rows]
    places = {tokens: place for place, tokens in enumerate(dict.fromkeys(read))}
    return Batch(
        inputs={name: tensor.to(device) for name, tensor in left_pad(list(places)).items()},
        places=torch.tensor([places[tokens] for tokens in read], device=device),
        targets=left_pad([row.response for row in rows])["input_ids"].to(device),
        logprobs=stream([row.logprobs for row in rows], device),
        advantages=stream([row.advantages for row in rows], device),
        rl=stream([row.rl for row in rows], device),
        ce=stream([row.ce for row in rows], device),
        ref_kl=stream([row.ref_kl for row in rows], device),
    )


def stream(values: Sequence[Sequence[float]], device: str = "cpu") -> Tensor:
    """(rows, longest): the rows' values, after zeros."""
    longest = max(map(len, values))
    result = torch.zeros(len(values), longest)
    for i, row in enumerate(values):
        result[i, longest - len(row) :] = torch.tensor(row)
    return result.to(device)


def token_logprobs(model: Any, batch: Batch) -> tuple[Tensor, Tensor]:
    """Log-probabilities of the responses' tokens, and entropies: (rows, longest response), in float32."""
    logits = model(**batch.inputs, use_cache=False, logits_to_keep=batch.targets.shape[1]).logits.float()
    full = torch.log_softmax(logits, dim=-1)[batch.places]
    return full.gather(2, batch.targets[:, :, None])[:, :, 0], entropy(full)
