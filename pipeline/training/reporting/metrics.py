"""A training run's metrics. They are those of the trainer's own steps: a trainer that goes on counts from 0."""

from collections.abc import Iterable, Mapping

from prometheus_client import CollectorRegistry
from prometheus_client import Metric as Family

from millstream.pipeline.training.report import StepReport
from millstream.pipeline.training.reporting.steps import numbers
from millstream.producers.instruments import Exported, counter, gauge
from millstream.schemas import metrics


class TrainingMetrics:
    """A collector. Register it while the run goes on: what is no longer registered is no longer exported."""

    def __init__(self) -> None:
        self._registry = CollectorRegistry()
        self._step = gauge(metrics.TRAIN_STEP, self._registry)
        self._reward = gauge(metrics.TRAIN_REWARD, self._registry)
        self._phases = counter(metrics.TRAIN_PHASE_SECONDS, self._registry)
        self._staleness = gauge(metrics.TRAIN_STALENESS, self._registry)
        self._groups = counter(metrics.TRAIN_GROUPS, self._registry)
        self._dropped = counter(metrics.TRAIN_GROUPS_DROPPED, self._registry)
        self._tokens = counter(metrics.TRAIN_TOKENS, self._registry)
        self._numbers: Mapping[tuple[str, ...], float] = {}
        self._registry.register(Exported(metrics.TRAIN_METRIC, lambda: self._numbers or None))

    def ended(self, report: StepReport) -> None:
        """A step has ended."""
        experiment_id = report.experiment_id
        self._step.labels(experiment_id).set(report.step + 1)
        if report.rollouts > report.failed:
            self._reward.labels(experiment_id, "train").set(report.reward)
        if report.validation_reward is not None:
            self._reward.labels(experiment_id, "val").set(report.validation_reward)
        for phase, seconds in report.phases.items():
            self._phases.labels(experiment_id, phase).inc(max(seconds, 0.0))
        self._staleness.labels(experiment_id, "mean").set(report.staleness_mean)
        self._staleness.labels(experiment_id, "max").set(report.staleness_max)
        without = report.dropped.get("no_signal", 0) + report.flat_groups
        self._groups.labels(experiment_id, "none").inc(without)
        self._groups.labels(experiment_id, "some").inc(max(report.groups - report.flat_groups, 0))
        for reason, groups in report.dropped.items():
            self._dropped.labels(experiment_id, reason).inc(groups)
        self._tokens.labels(experiment_id).inc(report.tokens)
        # As a whole: a metric that the algorithm no longer reports is absent, not what it once was.
        self._numbers = {(experiment_id, name): value for name, value in numbers(report.metrics).items()}

    def collect(self) -> Iterable[Family]:
        """From any thread."""
        return self._registry.collect()

    def describe(self) -> Iterable[Family]:
        """The registry that it is registered with compares the names with its own."""
        return self._registry.collect()
