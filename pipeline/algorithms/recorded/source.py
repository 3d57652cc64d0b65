"""Where recorded rollouts are read from: the store, or a topic of the log."""

import asyncio

from millstream.consumers.control import find_experiment
from millstream.consumers.log.kafka_log import KafkaLog
from millstream.pipeline.algorithms.policy_gradient import NothingToLearn
from millstream.pipeline.store.clickhouse import ClickHouseStore
from millstream.pipeline.store.recorded import recorded_rollouts
from millstream.pipeline.training.datasets import read_rollouts
from millstream.schemas.config.settings import Settings
from millstream.schemas.redaction import without_passwords
from millstream.schemas.wire.records import Triplet


def recorded(
    settings: Settings,
    *,
    store: str | None = None,
    experiment: str | None = None,
    mode: str | None = "train",
    sql: str | None = None,
    topic: str | None = None,
) -> list[list[Triplet]]:
    """The triplets of rollouts that succeeded, with whole prompts, by rollout; see `recorded_rollouts`. ``store``: a
    DSN, by default the settings'. ``topic``: of the log, in place of the store. Raises `NothingToLearn` without any."""
    if topic is not None:
        found, where = asyncio.run(_from_log(settings, topic, experiment, mode)), f"topic {topic}"
    else:
        dsn = settings.clickhouse_dsn if store is None else store
        reading = ClickHouseStore(settings.model_copy(update={"clickhouse_dsn": dsn}))
        try:
            found = recorded_rollouts(reading, experiment=experiment, mode=mode, sql=sql)
        finally:
            reading.close()  # an embedded one, before the run opens its own
        where = without_passwords(dsn)
    if not found:
        searched = sql or f"experiment {experiment or 'any'}, mode {mode or 'any'}"
        raise NothingToLearn(f"{where} holds no triplets of {searched}; `millstream rollouts` lists what there is")
    return found


async def _from_log(settings: Settings, topic: str, experiment: str | None, mode: str | None) -> list[list[Triplet]]:
    log = KafkaLog(settings)
    await log.check()
    found = None if experiment is None else await find_experiment(log, settings.topics, experiment)
    return await read_rollouts(log, settings.topics, found, mode, topic)
