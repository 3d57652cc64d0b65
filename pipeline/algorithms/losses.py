"""Losses and estimates over tokens. Pure functions of tensors."""

from torch import Tensor, minimum


def policy_loss(log_ratio: Tensor, advantage: Tensor, clip: tuple[float, float]) -> tuple[Tensor, Tensor]:
    """−mean(min(ρA, clip(ρ, 1 − low, 1 + high) A)) over tokens, and the share of tokens whose gradient the clip holds
    back. PPO (Schulman et al., arXiv:1707.06347, eq. 7) with DAPO's two bounds (arXiv:2503.14476, eq. 10)."""
    ratio = log_ratio.exp()
    free, held = ratio * advantage, ratio.clamp(1 - clip[0], 1 + clip[1]) * advantage
    return -minimum(free, held).mean(), (held < free).float().mean()


def entropy(logprobs: Tensor) -> Tensor:
    """−Σ p ln p over the last dimension, of log-probabilities."""
    return -(logprobs.exp() * logprobs).sum(-1)


def kl(log_ratio: Tensor) -> Tensor:
    """Estimate of KL(rollout ‖ policy) from samples of the rollout policy: mean(ρ − 1 − ln ρ), the k3 of Schulman,
    "Approximating KL Divergence" (2020)."""
    return (log_ratio.exp() - 1 - log_ratio).mean()
