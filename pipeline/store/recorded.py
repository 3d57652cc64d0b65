"""What past rollouts have taught: their triplets, chosen in the store."""

import logging
from collections.abc import Callable, Iterable
from itertools import groupby
from typing import Any

from millstream.pipeline.store.queries import EXPERIMENTS, Ask
from millstream.pipeline.store.results import Store
from millstream.schemas.errors import ConfigError, StoreError
from millstream.schemas.ids import LEAST_OF_AN_ID, matching_ids
from millstream.schemas.spans.text import parsed
from millstream.schemas.wire.records import Triplet

logger = logging.getLogger(__name__)

SHOWN = 5  # experiments that an error names


def record_of(ask: Ask, experiment_id: str) -> dict[str, Any] | None:
    """What a training run was started with; None if no trainer has recorded the experiment. Raises `StoreError` for a
    record that can't be read."""
    rows = ask("SELECT configuration FROM experiments WHERE experiment_id = {id:String}", {"id": experiment_id}).rows
    if not rows:
        return None
    try:
        found = parsed(rows[0][0])
    except ValueError as error:
        raise StoreError(f"the record of experiment {experiment_id} can't be read: {error}") from error
    return found if isinstance(found, dict) else {"configuration": found}


def find_experiment(store: Store, wanted: str, note: Callable[[str], object] = logger.warning) -> str:
    """The id of an experiment, which may be named by its run (then the newest, which is noted) or by a part
    of its id. Raises `ConfigError`."""
    rows = store.sql(EXPERIMENTS).records()
    if any(wanted == row["experiment_id"] for row in rows):
        return wanted
    named = [row["experiment_id"] for row in rows if wanted == row["run"]]
    if not named and len(wanted) >= LEAST_OF_AN_ID:
        named = matching_ids(wanted, (row["experiment_id"] for row in rows))
        if len(named) > 1:
            raise ConfigError(f"{wanted} is part of the ids of {len(named)} experiments: {', '.join(named[:SHOWN])}")
    if len(named) > 1:
        note(f"{len(named)} experiments are of run {wanted}; this is the newest, {named[0]}")
    if named:
        return str(named[0])
    known = [f"{row['experiment_id']} (run {row['run']})" if row["run"] else row["experiment_id"] for row in rows]
    raise ConfigError(f"the store has no experiment {wanted!r}; the newest are: {', '.join(known[:SHOWN]) or 'none'}")


def recorded_rollouts(
    store: Store, *, experiment: str | None = None, mode: str | None = "train", sql: str | None = None
) -> list[list[Triplet]]:
    """The triplets of rollouts that succeeded, with whole prompts, by rollout. ``sql``: a query whose first column are
    the ids of the rollouts, in place of ``experiment`` (an id, or the name of a run: then the newest) and ``mode``.

    The order depends on the ids alone. Raises `ConfigError` for an unknown experiment, `StoreError`."""
    if sql is not None:
        ids = [str(row[0]) for row in store.sql(sql).rows]
        return _by_rollout(store.triplets(ids)) if ids else []
    found = None if experiment is None else find_experiment(store, experiment)
    return _by_rollout(store.triplets(experiment_id=found, mode=mode))


def _by_rollout(triplets: Iterable[Triplet]) -> list[list[Triplet]]:
    """Of triplets in the order of rollouts and turns."""
    return [list(turns) for _, turns in groupby(triplets, key=lambda triplet: triplet.rollout_id)]
