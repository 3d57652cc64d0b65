"""Comparing resources versions on the rollouts that come: an A/B test."""

from collections.abc import Mapping

from millstream.consumers.control import ControlFollower
from millstream.consumers.log.port import Log
from millstream.producers.control import publish_control
from millstream.producers.log.port import closing
from millstream.schemas.control import Split
from millstream.schemas.errors import ConfigError
from millstream.schemas.wire.topics import Topics


async def split(log: Log, topics: Topics, experiment_id: str, shares: Mapping[str, float]) -> Split:
    """Shares the rollouts of an experiment among resources versions, by their ids, until a version is published. Raises
    `ConfigError` for one that the experiment has not announced, and for shares that can't be."""
    control = ControlFollower(log, topics)
    await control.start()
    try:
        latest = control.latest(experiment_id)
        for version in shares:
            found = control.pinned(version)
            if found is None or found.experiment_id != experiment_id:
                raise ConfigError(
                    f"experiment {experiment_id} has no resources version {version} that rollouts could run with: a "
                    "candidate has one once it has been run"
                )
    finally:
        await control.close()
    try:
        made = Split(
            experiment_id=experiment_id, latest="" if latest is None else latest.resources_id, shares=dict(shares)
        )
    except ValueError as error:
        raise ConfigError(str(error)) from None
    async with closing(log.producer()) as producer:
        await publish_control(producer, topics, made.to_control())
    return made
