"""Losses and estimates over tokens. Pure functions of tensors.

Tensors are (rows, longest response), float, and padded; ``mask`` is True where a token counts. A `Loss` gives one value
for each token; `token_weights` decides how they are averaged.
"""

from collections.abc import Callable
from dataclasses import dataclass
from typing import Final, Literal, get_args

import torch
from torch import Tensor, maximum, minimum

LARGEST_LOG_RATIO: Final = 20.0  # far beyond any clip; its exponential is finite
LARGEST_SEQUENCE_LOG_RATIO: Final = 10.0  # the same for the mean over a sequence, as in verl
LARGEST_K3: Final = 10.0  # of a token's divergence, as in verl: one token that the reference excludes is not everything

Clip = tuple[float, float]  # distances from ratio 1, down and up
Aggregation = Literal["token-mean", "sequence-mean-token-mean", "sequence-mean-token-sum-norm"]
Divergence = Literal["k1", "k2", "k3"]


@dataclass(frozen=True, slots=True)
class Tokens:
    """What a `Loss` is computed from. ``logprobs`` are the policy's, with a gradient; ``old`` those of the policy that
    the ratio compares it with."""

    logprobs: Tensor
    old: Tensor
    advantages: Tensor
    mask: Tensor

    @property
    def log_ratio(self) -> Tensor:
        return (self.logprobs - self.old).clamp(-LARGEST_LOG_RATIO, LARGEST_LOG_RATIO)


# Returns the loss of each token, and 1 for each token that the clip changes (else 0).
Loss = Callable[[Tokens, Clip], tuple[Tensor, Tensor]]


def ppo_clip(tokens: Tokens, clip: Clip) -> tuple[Tensor, Tensor]:
    """−min(ρA, clip(ρ, 1 − low, 1 + high) A), with ρ = π/π_old of the token. PPO (Schulman et al., arXiv:1707.06347,
    eq. 7) with DAPO's two bounds (arXiv:2503.14476, eq. 10). The clip counts where it holds a gradient back. verl's
    "vanilla" bounds the loss of a negative advantage from above, too (dual clip, 3.0 by default); this does not."""
    return _clipped(tokens.log_ratio.exp(), tokens.advantages, clip)


def gspo(tokens: Tokens, clip: Clip) -> tuple[Tensor, Tensor]:
    """As `ppo_clip`, but all tokens of a row share one ratio, (π(y)/π_old(y))^(1/|y|), the geometric mean of its
    tokens'. GSPO (Zheng et al., arXiv:2507.18071, section 4.1), in the form that allows an advantage for each token
    (GSPO-token, section 4.3). Its clip is three orders of magnitude narrower: 3e-4 and 4e-4 in the paper."""
    lengths = tokens.mask.sum(-1, keepdim=True).clamp(min=1)
    difference = torch.where(tokens.mask, tokens.logprobs - tokens.old, 0.0).detach()
    of_row = difference.sum(-1, keepdim=True) / lengths
    log_ratio = tokens.logprobs - tokens.logprobs.detach() + of_row
    return _clipped(log_ratio.clamp(max=LARGEST_SEQUENCE_LOG_RATIO).exp(), tokens.advantages, clip)


def cispo(tokens: Tokens, clip: Clip) -> tuple[Tensor, Tensor]:
    """−sg(clip(ρ, 1 − low, 1 + high)) A ln π: the clip bounds a token's weight and never silences it. CISPO
    (MiniMax-M1, arXiv:2506.13585, section 3.1); the paper sets no lower bound, which is ``low`` = 1."""
    ratio = tokens.log_ratio.exp().detach()
    bounded = ratio.clamp(1 - clip[0], 1 + clip[1])
    return -bounded * tokens.advantages * tokens.logprobs, (bounded != ratio).float()


def reinforce(tokens: Tokens, clip: Clip) -> tuple[Tensor, Tensor]:
    """−A ln π (Williams, 1992); verl's "gpg". It has no ratio, so neither ``old`` nor ``clip`` matters: right only for
    data of the policy itself, with one epoch, or with corrections (see `importance_weights`)."""
    return -tokens.advantages * tokens.logprobs, torch.zeros_like(tokens.logprobs)


LOSSES: Final[dict[str, Loss]] = {"ppo": ppo_clip, "gspo": gspo, "cispo": cispo, "reinforce": reinforce}


def _clipped(ratio: Tensor, advantages: Tensor, clip: Clip) -> tuple[Tensor, Tensor]:
    free, held = ratio * advantages, ratio.clamp(1 - clip[0], 1 + clip[1]) * advantages
    return -minimum(free, held), (held < free).float()


def cross_entropy(logprobs: Tensor) -> Tensor:
    """−ln π of each token."""
    return -logprobs


def token_weights(weights: Tensor, aggregation: Aggregation, norm_tokens: int | None = None) -> Tensor:
    """Each token's share, so that Σ share · loss is the aggregated loss. ``weights`` are the rows' own: 0 where a token
    does not count. Rows without any are left out of means over rows.

    - "token-mean": every token alike; DAPO (arXiv:2503.14476, eq. 12).
    - "sequence-mean-token-mean": every row alike, so tokens of long rows count less; GRPO (arXiv:2402.03300, eq. 3).
    - "sequence-mean-token-sum-norm": the sum over a row's tokens divided by the constant ``norm_tokens``, then the mean
      over rows; Dr. GRPO (arXiv:2503.20783, section 3.1). Without ``norm_tokens``: the longest of these rows.
    """
    of_row = weights.sum(-1, keepdim=True)
    rows = (of_row > 0).sum().clamp(min=1)
    if aggregation == "token-mean":
        shares = weights / of_row.sum().clamp(min=torch.finfo(weights.dtype).tiny)
    elif aggregation == "sequence-mean-token-mean":
        shares = weights / of_row.clamp(min=torch.finfo(weights.dtype).tiny) / rows
    elif aggregation == "sequence-mean-token-sum-norm":
        shares = weights / (norm_tokens or weights.shape[-1]) / rows
    else:
        raise ValueError(f"unknown aggregation {aggregation!r}: one of {', '.join(get_args(Aggregation))}")
    return shares


def importance_weights(old: Tensor, sampled: Tensor, cap: float) -> Tensor:
    """min(π_old/μ, ``cap``) of each token, without a gradient: truncated importance sampling (Yao et al., "Your
    efficient RL framework secretly brings you off-policy RL training", 2025).

    ``sampled`` is μ, of the policy that sampled the token. Where that is also the ``old`` policy of the ratio
    ("bypass"), all weights are 1. Where ``old`` is the policy at the beginning of the step ("decoupled": Hilton et al.,
    arXiv:2110.00641; AReaL, arXiv:2505.24298, section 5.2), they correct for the age of the data, and the clip only
    bounds the step. AReaL leaves out tokens above the cap; here they count with it.
    """
    return (old - sampled).detach().clamp(-LARGEST_LOG_RATIO, LARGEST_LOG_RATIO).exp().clamp(max=cap)


def divergence(logprobs: Tensor, reference: Tensor, kind: Divergence) -> Tensor:
    """Estimate of KL(policy ‖ reference) at each token, sampled from the policy. With d = ln π − ln π_ref, k1 is d, k2
    is d²/2, k3 is e^(−d) − 1 + d, at most 10 (Schulman, "Approximating KL Divergence", 2020).

    As a loss, k2 has the gradient of the divergence; k3 (GRPO, arXiv:2402.03300, eq. 4) has that of KL(reference ‖
    policy), near the reference the same; k1 has a gradient of mean 0 and holds nothing (Tang and Munos,
    arXiv:2506.09477): use it to measure only.
    """
    difference = logprobs - reference
    if kind == "k1":
        return difference
    if kind == "k2":
        return 0.5 * difference.square()
    return kl(-difference.clamp(-LARGEST_LOG_RATIO, LARGEST_LOG_RATIO)).clamp(max=LARGEST_K3)


def kl(log_ratio: Tensor) -> Tensor:
    """Estimate of KL(q ‖ p) at each token, sampled from q, of ``log_ratio`` = ln p − ln q: ρ − 1 − ln ρ, the k3 of
    Schulman, "Approximating KL Divergence" (2020)."""
    return log_ratio.exp() - 1 - log_ratio


def value_loss(values: Tensor, old: Tensor, returns: Tensor, clip: float) -> tuple[Tensor, Tensor]:
    """½ max((V − R)², (clip(V, V_old ± ``clip``) − R)²) of each token, and 1 where the clipped form counts. Schulman et
    al.'s implementation of PPO (openai/baselines, ppo2)."""
    bounded = minimum(maximum(values, old - clip), old + clip)
    free, held = (values - returns).square(), (bounded - returns).square()
    return 0.5 * maximum(free, held), (held > free).float()


def entropy(logprobs: Tensor) -> Tensor:
    """−Σ p ln p over the last dimension, of log-probabilities."""
    return -(logprobs.exp() * logprobs).sum(-1)
