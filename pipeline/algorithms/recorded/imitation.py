"""Learning to answer as chosen answers do: the learner of fine-tuning, on recorded rollouts or on a step's own."""

from collections import Counter
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any, Final

from millstream.pipeline.algorithms.recorded.examples import ExampleLearner
from millstream.pipeline.algorithms.rows import Row, merged, row_of
from millstream.pipeline.training.datasets import Choice, Rollout, chosen
from millstream.schemas.errors import CodecError
from millstream.schemas.wire.prefixes import conversations
from millstream.schemas.wire.records import Triplet

BEST: Final = Choice(best_of_group=1)


class ImitationLearner(ExampleLearner):
    """An `ExampleLearner` of the cross-entropy of chosen answers; prompts, tools' results and earlier answers are read
    and not learnt.

    On the groups of a step this is rejection sampling fine-tuning (RAFT: Dong et al., arXiv:2304.06767; RFT: Yuan et
    al., arXiv:2308.01825).
    """

    def __init__(self, model: str | Path, *, choice: Choice = BEST, **learner: Any) -> None:
        super().__init__(model, **learner)
        self.arguments |= {"choice": choice}
        self._choice = choice

    def rows(self, rollouts: Sequence[Rollout]) -> tuple[list[Row], Counter[str]]:
        """See `ExampleLearner.rows`."""
        turns: dict[str, list[tuple[Triplet, float]]] = {}
        refused: Counter[str] = Counter()
        for triplet, reward in chosen(rollouts, self._choice):
            try:
                triplet = self.usable(triplet)
            except CodecError as error:
                refused[str(error)] += 1
                continue
            turns.setdefault(triplet.rollout_id, []).append((triplet, reward))
        rows = []
        for of_rollout in turns.values():
            earned = {triplet.turn: reward for triplet, reward in of_rollout}
            triplets = [triplet for triplet, _ in of_rollout]
            for part in conversations(triplets) if self.merge_turns else [[triplet] for triplet in triplets]:
                row = merged([row_of(triplet, dict.fromkeys(earned, 0.0), earned) for triplet in part])
                rows.append(replace(row, rl=[0.0] * len(row.rl), ce=row.rl))
        return rows, refused
