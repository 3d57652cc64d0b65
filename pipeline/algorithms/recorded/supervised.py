"""Learning from recorded examples: fine-tuning and preferences."""

import hashlib
import logging
from collections.abc import Sequence
from functools import partial
from typing import Any, Final

from millstream.pipeline.algorithms.policy_gradient import NothingToLearn
from millstream.pipeline.algorithms.recorded.examples import ExampleLearner
from millstream.pipeline.algorithms.recorded.loop import FromRecords, Lesson
from millstream.pipeline.algorithms.rows import Row
from millstream.pipeline.training.datasets import Rollout, why_none

logger = logging.getLogger(__name__)

NAMED: Final = 3  # reasons in a message


class Supervised(FromRecords[Sequence[Row]]):
    """An `Algorithm`: learns from the rows that ``learner`` makes of ``rollouts``; see `FromRecords`. A step trains on
    ``rows_per_step`` of them, and keeps the rows of a pair together.

    Raises `NothingToLearn` with the commonest reason if nothing is chosen, or none of it can be learnt from."""

    def __init__(
        self,
        learner: ExampleLearner,
        rollouts: Sequence[Rollout],
        *,
        epochs: int = 3,
        rows_per_step: int = 512,
        **loop: Any,
    ) -> None:
        rows, refused = learner.rows(rollouts)
        for reason, count in refused.most_common(NAMED):
            logger.warning("%d examples are not learnt: %s", count, reason)
        if not rows:
            raise NothingToLearn(refused.most_common(1)[0][0] if refused else why_none(rollouts, "those recorded"))
        units = [rows[i : i + learner.unit] for i in range(0, len(rows), learner.unit)]
        units_per_step = max(1, rows_per_step // learner.unit)
        super().__init__(learner, units, _digest(rows), epochs=epochs, items_per_step=units_per_step, **loop)
        self.arguments = {
            "learner": learner,
            "rows": len(rows),
            "epochs": epochs,
            "rows_per_step": rows_per_step,
            "validate_every": self.validate_every,
        }

    def lesson(self, items: Sequence[Sequence[Row]]) -> Lesson:
        rows = [row for unit in items for row in unit]
        return Lesson(
            learn=partial(self.learner.learn, rows),
            reward=sum(sum(row.rewards) for row in rows) / len(rows),
            rollouts=len({row.rollout_id for row in rows}),
            tokens=sum(bool(ce or rl) for row in rows for ce, rl in zip(row.ce, row.rl, strict=True)),
        )


def _digest(rows: Sequence[Row]) -> str:
    """SHA-256 of the rows' tokens and weights."""
    found = hashlib.sha256()
    for row in rows:
        found.update(f"{row.rollout_id} {row.prompt} {row.response} {row.ce}\n".encode())
    return found.hexdigest()
