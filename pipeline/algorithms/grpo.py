"""Group relative policy optimisation, with a torch model in this process.

Sources: Shao et al., DeepSeekMath, arXiv:2402.03300 (GRPO); Yu et al., DAPO, arXiv:2503.14476 (a higher upper clip,
the mean over tokens instead of over answers, no KL penalty).
"""

from pathlib import Path
from typing import Any

from millstream.pipeline.algorithms.policy_gradient import PolicyGradient
from millstream.pipeline.algorithms.torch_learner import TorchLearner
from millstream.pipeline.tracing.rubric import Rubric


def GRPO(  # noqa: N802 - as one names an algorithm
    model: str | Path,
    *,
    groups_per_step: int = 16,
    group_size: int = 8,
    max_staleness: int = 0,
    drop_above: int | None = None,
    validate_every: int = 0,
    rubric: Rubric | None = None,
    **learner: Any,
) -> PolicyGradient:
    """The loop (`PolicyGradient`) around a `TorchLearner`, which takes the other arguments. Its defaults are GRPO's."""
    return PolicyGradient(
        TorchLearner(model, **learner),
        groups_per_step=groups_per_step,
        group_size=group_size,
        max_staleness=max_staleness,
        drop_above=drop_above,
        validate_every=validate_every,
        rubric=rubric,
    )
