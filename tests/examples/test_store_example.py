import dataclasses

import factories
import pytest

import millstream as ms
from examples.store.fixed import FixedStore
from millstream.schemas.errors import StoreError


def rollout(rollout_id, created_at, **fields):
    values = {f.name: None for f in dataclasses.fields(ms.Rollout)}
    return ms.Rollout(**values | {"rollout_id": rollout_id, "created_at": created_at, **fields})


def test_a_store_of_lists_answers_as_the_protocol_says():
    task = factories.task()
    store = FixedStore(
        held_rollouts=[rollout("a", 1, status="queued"), rollout("b", 2, status="succeeded", ended_at=3)],
        held_spans=[factories.span(task, "x"), factories.span(task, "y")],
    )
    assert [r.rollout_id for r in store.rollouts()] == ["b", "a"]
    assert [r.rollout_id for r in store.rollouts(status="queued")] == ["a"]
    assert store.spans(task.rollout_id, attempt_id="y") == store.held_spans[1:]
    assert store.attempts("a") == store.triplets() == store.rewards() == []
    assert store.latest_resources() is None
    assert [r.rollout_id for r in store.wait_for(["b"], timeout_s=0)] == ["b"]
    with pytest.raises(TimeoutError, match="1 of 2 rollouts have not ended"):
        store.wait_for(["a", "b"], timeout_s=0)
    for ask in (store.sql, store.sql_df, store.follow):
        with pytest.raises(StoreError, match="a FixedStore has no"):
            ask("SELECT 1")
    store.close()
