"""A step of training as a record. Pure."""

from collections.abc import Iterator, Mapping, Sequence
from typing import SupportsFloat

from millstream.pipeline.training.groups import FinishedRollout, Group, trainable_turns
from millstream.pipeline.training.report import StepReport
from millstream.pipeline.training.reporting.stopwatch import Lap
from millstream.schemas.wire.records import TrainingStep

ID_BYTES = 4  # of a token


def step_record(
    report: StepReport,
    lap: Lap,
    *,
    experiment_id: str,
    run: str,
    model_version: str,
    trained: Sequence[str],
    restored_from: str = "",
) -> TrainingStep:
    """``model_version``: of the weights that the step produced; ``trained``: see `trained_rollouts`."""
    succeeded = report.rollouts > report.failed
    return TrainingStep(
        experiment_id=experiment_id,
        run=run,
        epoch=report.epoch,
        step=report.step + 1,
        model_version=model_version,
        started_at=lap.started_at,
        ended_at=lap.ended_at,
        wait_s=lap.phases["wait"],
        update_s=lap.phases["update"],
        save_s=lap.phases["save"],
        publish_s=lap.phases["publish"],
        other_s=lap.phases["other"],
        reward_mean=report.reward if succeeded else None,
        reward_std=report.reward_std if succeeded else None,
        validation_reward=report.validation_reward,
        rollouts=report.rollouts,
        failed=report.failed,
        groups=report.groups,
        dropped=dict(report.dropped),
        staleness_mean=report.staleness_mean,
        staleness_max=report.staleness_max,
        tokens=report.tokens,
        metrics=numbers(report.metrics),
        trained=tuple(trained),
        restored_from=restored_from,
    )


def trained_rollouts(groups: Sequence[Group]) -> list[str]:
    """Ids of the rollouts that a learner learns from: those that succeeded and have a turn that can be trained on, in
    groups with at least two of them."""
    return [member.end.rollout_id for member in _trained(groups)]


def trained_tokens(groups: Sequence[Group]) -> int:
    """Tokens of the responses of their turns."""
    return sum(
        len(turn.response_token_ids or b"") // ID_BYTES
        for member in _trained(groups)
        for turn in trainable_turns(member)
    )


def numbers(metrics: Mapping[str, SupportsFloat]) -> dict[str, float]:
    """An algorithm's metrics as records hold them: NumPy's and torch's scalars are numbers, too, and what is none is
    NaN. NaN and infinities stay."""
    return {str(name): _number(value) for name, value in metrics.items()}


def _number(value: SupportsFloat) -> float:
    try:
        return float(value)
    except OverflowError:
        return float("inf") if value > 0 else float("-inf")  # type: ignore[operator]
    except (TypeError, ValueError, RuntimeError):  # RuntimeError: a tensor with several elements
        return float("nan")


def _trained(groups: Sequence[Group]) -> Iterator[FinishedRollout]:
    for group in groups:
        members = [member for member in group.members if trainable_turns(member)]
        if len(members) > 1:
            yield from members
