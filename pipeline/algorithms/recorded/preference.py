"""Learning which of two answers to a prompt is better: direct preference optimisation and its relatives."""

from collections import Counter
from collections.abc import Callable, Mapping, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any, Final, Literal

import torch
from torch import Tensor
from torch.nn.functional import logsigmoid

from millstream.pipeline.algorithms.batches import Batch, token_logprobs
from millstream.pipeline.algorithms.recorded.examples import ExampleLearner
from millstream.pipeline.algorithms.rows import Row, row_of
from millstream.pipeline.models.policy import load_model
from millstream.pipeline.training.datasets import PairChoice, Rollout, pairs
from millstream.schemas.errors import CodecError, ConfigError
from millstream.schemas.wire.records import Triplet

Reference = Literal["frozen", "recorded"]
BEST_AND_WORST: Final = PairChoice()
UNRECORDED: Final = 'no log-probabilities were recorded; reference = "frozen" needs none'


def dpo(margins: Tensor, beta: float) -> Tensor:
    """−ln σ(βm) of each pair's margin: DPO (Rafailov et al., arXiv:2305.18290, eq. 7)."""
    return -logsigmoid(beta * margins)


def ipo(margins: Tensor, beta: float) -> Tensor:
    """(m − 1/(2β))²: IPO (Azar et al., arXiv:2310.12036, eq. 17, with τ = β). It asks for that margin and no more,
    where DPO drives answers apart that were compared only once."""
    return (margins - 1 / (2 * beta)).square()


def kto(better: Tensor, worse: Tensor, beta: float, divergence: float) -> Tensor:
    """½ (1 − σ(β(b − z))) + ½ (1 − σ(β(z − w))) of each pair's log-ratios b and w, where z ≥ 0 estimates the policy's
    divergence from the reference: KTO (Ethayarajh et al., arXiv:2402.01306, eq. 8, with both λ = 1). It judges each
    answer by itself."""
    return 1 - 0.5 * (torch.sigmoid(beta * (better - divergence)) + torch.sigmoid(beta * (divergence - worse)))


MARGIN_LOSSES: Final[dict[str, Callable[[Tensor, float], Tensor]]] = {"dpo": dpo, "ipo": ipo}
KTO: Final = "kto"


class PreferenceLearner(ExampleLearner):
    """An `ExampleLearner` of pairs of answers to one prompt within a group, as ``choice`` picks them.

    ``pair_loss`` is "dpo", "ipo" or "kto". Its log-ratios, ln π − ln π_ref, are summed over the tokens of an answer;
    for "ipo" they are their mean, as in TRL, so that β means the same for answers of any length. ``reference`` is the
    ``model`` as its folder has it ("frozen": a second model in memory), or the policy that sampled the answers
    ("recorded": its log-probabilities were returned by the server). "kto" evaluates the reference at answers to other
    prompts, too, so it has to be frozen. ``minibatch`` and ``microbatch`` count rows, two a pair.

    Raises `ConfigError` for options that exclude each other.
    """

    unit = 2

    def __init__(
        self,
        model: str | Path,
        *,
        pair_loss: str = "dpo",
        beta: float = 0.1,
        reference: Reference = "frozen",
        choice: PairChoice = BEST_AND_WORST,
        **learner: Any,
    ) -> None:
        super().__init__(model, **learner)
        if pair_loss not in (*MARGIN_LOSSES, KTO):
            raise ConfigError(f"loss {pair_loss!r}: one of {', '.join((*MARGIN_LOSSES, KTO))}")
        if pair_loss == KTO and reference == "recorded":
            raise ConfigError(
                'loss = "kto" compares with answers to other prompts, of which no log-probabilities are '
                'recorded: set reference = "frozen"'
            )
        if self.minibatch % self.unit or self.microbatch % self.unit:
            raise ConfigError("minibatch and microbatch count rows, two a pair: give even numbers")
        self.arguments |= {"pair_loss": pair_loss, "beta": beta, "reference": reference, "choice": choice}
        self._pair_loss, self._beta, self._choice = pair_loss, beta, choice
        self._frozen = load_model(model).to(self.device).eval() if reference == "frozen" else None
        self._divergence = 0.0  # of the present minibatch

    def rows(self, rollouts: Sequence[Rollout]) -> tuple[list[Row], Counter[str]]:
        """See `ExampleLearner.rows`: the better answer of each pair, then the worse one, with the reference's
        log-probabilities."""
        refused: Counter[str] = Counter()
        rows: list[Row] = []
        for pair in pairs(rollouts, self._choice):
            try:
                rows += [self._row(triplet, reward) for triplet, reward in pair]
            except CodecError as error:
                refused[str(error)] += 1
        if self._frozen is None:
            return rows, refused
        found = self._evaluated(self._frozen, rows)
        return [replace(row, logprobs=logprobs) for row, logprobs in zip(rows, found, strict=True)], refused

    def _row(self, triplet: Triplet, reward: float) -> Row:
        if self._frozen is None and triplet.response_logprobs is None:
            raise CodecError(UNRECORDED)
        return row_of(self.usable(triplet), {triplet.turn: 0.0}, {triplet.turn: reward})

    def _step(self, rows: Sequence[Row], old: Sequence[Sequence[float]]) -> dict[str, float]:
        if self._pair_loss != KTO:
            return super()._step(rows, old)
        self._divergence = self._estimated_divergence(rows)
        return super()._step(rows, old) | {"divergence": self._divergence}

    def _estimated_divergence(self, rows: Sequence[Row]) -> float:
        """The mean log-ratio of answers to other prompts, at least 0 (KTO, section 4.2): each prompt of the minibatch
        with an answer of the next pair. A pair alone has none, and 0."""
        if len(rows) == self.unit:
            return 0.0
        answers = [*rows[self.unit :], *rows[: self.unit]]
        others = [replace(row, prompt=asked.prompt) for asked, row in zip(rows, answers, strict=True)]
        policy, reference = (self._evaluated(model, others) for model in (self._model, self._frozen))
        ratios = [sum(p) - sum(r) for p, r in zip(policy, reference, strict=True)]
        return max(0.0, sum(ratios) / len(ratios))

    def _losses(
        self, batch: Batch, old: Tensor, shares: Mapping[str, Tensor], counts: Mapping[str, int]
    ) -> tuple[dict[str, Tensor], Tensor]:
        """See `TorchLearner._losses`. ``margin``: β times the difference of the answers' log-ratios; ``accuracy``: the
        share of pairs with a positive one. There are no ratios of single tokens."""
        with self._autocast():
            logprobs, _ = token_logprobs(self._model, batch)
        ratios = torch.where(batch.mask, logprobs - batch.logprobs, 0.0).sum(-1)
        if self._pair_loss == "ipo":
            ratios = ratios / batch.mask.sum(-1)
        better, worse = ratios[0::2], ratios[1::2]
        margins = better - worse
        if self._pair_loss == KTO:
            by_pair = kto(better, worse, self._beta, self._divergence)
        else:
            by_pair = MARGIN_LOSSES[self._pair_loss](margins, self._beta)
        parts = {"loss": by_pair, "margin": self._beta * margins.detach(), "accuracy": (margins.detach() > 0).float()}
        count = counts["rows"] / self.unit
        return {name: values.sum() / count for name, values in parts.items()}, ratios.new_empty(0)
