"""Searching rollouts for a text: part by part it finds what the whole view holds."""

import time
from dataclasses import replace
from pathlib import Path
from uuid import uuid4

import factories
import pytest
from factories import T0

from millstream.consumers.sink.clickhouse_writer import ClickHouseWriter
from millstream.pipeline.store import search
from millstream.pipeline.store.clickhouse import ClickHouseStore
from millstream.pipeline.store.search import RolloutSearch, find_rollouts
from millstream.schemas.config.settings import Settings, load_settings
from millstream.schemas.ids import derived_id
from millstream.schemas.wire import status
from millstream.schemas.wire.records import ErrorInfo
from tests.pipeline.ui.rig import S, Writing, conversation_of, ended, triplets_of

WHOLE = """
SELECT rollout_id FROM rollouts
WHERE experiment_id IN ('e0', 'e1') AND (
    position(lower(concat(input, ' ', ifNull(output, ''), ' ', error_message, ' ', ifNull(reason, ''))), 'needle') > 0
    OR rollout_id IN (SELECT rollout_id FROM triplets WHERE position(lower(response), 'needle') > 0)
)
"""
ROLLOUTS = 36


@pytest.fixture
def settings(folder: Path) -> Settings:
    return load_settings(clickhouse_dsn=f"chdb://{folder}", clickhouse_database=f"d{uuid4().hex}")


@pytest.fixture
def hay(writer: ClickHouseWriter, settings: Settings) -> list[str]:
    """Rollouts, the oldest first; most have the text somewhere. One in six had it in an attempt that was retried."""
    topics, writing, made = settings.topics, Writing(settings.topics), []
    for n in range(ROLLOUTS):
        task = factories.task(
            rollout_id=derived_id(T0 + n * 10**6, n),
            experiment_id=f"e{n % 2}",
            created_at=T0 + n * 10**6,
            input='{"of": "a Needle"}' if n % 6 == 0 else "{}",
        )
        made.append(task.rollout_id)
        writing(task, topic=topics.tasks("normal"))
        writing(factories.event(task, "a", status.PREPARING))
        error = ErrorInfo(type="ValueError", message="no NEEDLE", stack="") if n % 6 in (2, 3) else None
        if n % 6 == 3:
            writing(factories.event(task, "a", status.FAILED, error=error))
            task = replace(task, attempt=2)
            writing(factories.event(task, "b", status.PREPARING))
        attempt = "b" if n % 6 == 3 else "a"
        state = status.FAILED if n % 6 == 2 else status.SUCCEEDED
        output = '"a needle"' if n % 6 == 5 else None
        writing(factories.event(task, attempt, state, error=error if n % 6 == 2 else None, output=output))
        spans = conversation_of(task, attempt, "?", ["the needle" if n % 6 == 1 else "hay"], T0)
        writing(*triplets_of(task, attempt, spans, 1.0), topic=topics.triplets)
        writing(ended(task, state, attempt, reason="needle" if n % 6 == 4 else None))
    writing.flush(writer)
    return made


@pytest.mark.parametrize("most", [5000, 2])
@pytest.mark.parametrize("experiment", ["", "e1"])
def test_all_parts_together_are_the_whole(
    hay: list[str], store: ClickHouseStore, experiment: str, most: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(search, "MOST_OPEN", most)
    whole = [row[0] for row in store.sql(WHOLE).rows if not experiment or hay.index(row[0]) % 2]
    found: list[str] = []
    looked, before, parts = 0, "", 0
    while before or not parts:
        wanted = RolloutSearch(text="needle", experiment_id=experiment, before=before)
        page = find_rollouts(store.sql, wanted, 100, window=7)
        assert page.looked is not None
        found += [row["rollout_id"] for row in page.rows]
        looked, before, parts = looked + page.looked.rollouts, page.looked.before, parts + 1
    assert found == sorted(whole, reverse=True)
    assert len(found) == (ROLLOUTS * 5 // 6 if not experiment else ROLLOUTS // 3)
    assert looked == (ROLLOUTS if not experiment else ROLLOUTS // 2)
    assert parts > 2


def test_an_id_is_found_however_old(hay: list[str], store: ClickHouseStore) -> None:
    page = find_rollouts(store.sql, RolloutSearch(text=hay[0][-12:]), 10, window=2)
    assert [row["rollout_id"] for row in page.rows] == hay[:1]
    assert page.looked is not None
    assert (page.looked.rollouts, page.looked.since, page.looked.before) == (2, T0 + (ROLLOUTS - 2) * 10**6, hay[-2])


def test_of_nothing_nothing_is_looked_through(hay: list[str], store: ClickHouseStore) -> None:
    page = find_rollouts(store.sql, RolloutSearch(text="needle", experiment_id="another"), 10)
    assert page.rows == []
    assert page.looked is not None
    assert (page.looked.rollouts, page.looked.before) == (0, "")


@pytest.mark.parametrize("filters", [{}, {"status": "succeeded"}, {"status": "running"}, {"experiment_id": "e1"}])
def test_a_page_of_the_last_minutes_is_that_part_of_the_view(
    writer: ClickHouseWriter, settings: Settings, store: ClickHouseStore, filters: dict[str, str]
) -> None:
    writing, now = Writing(settings.topics), time.time_ns()
    for n in range(24):
        task = factories.task(created_at=now - n * 60 * S, experiment_id=f"e{n % 2}")
        writing(task, topic=settings.topics.tasks("normal"))
        if n % 4:
            writing(factories.event(task, "a", status.PREPARING, time=task.created_at + n * S))
        if n % 4 > 1:
            writing(ended(task, status.SUCCEEDED, "a", reward=n % 5 / 4, turns=n % 3, ended_at=now - n * S))
    writing.flush(writer)
    known = "".join(f" AND {name} = '{value}'" for name, value in filters.items())
    for order in search.orders():
        for descending, direction in ((True, "DESC"), (False, "ASC")):
            wanted = RolloutSearch(since_s=930, sort_by=order, descending=descending, **filters)
            page = [row["rollout_id"] for row in find_rollouts(store.sql, wanted, 3, 1).rows]
            whole = (
                f"SELECT rollout_id FROM rollouts WHERE created_at >= now64(9) - toIntervalSecond(930){known} ORDER BY"
            )
            rows = store.sql(f"{whole} {order} {direction} NULLS LAST, rollout_id {direction} LIMIT 3 OFFSET 1").rows
            assert page == [row[0] for row in rows], (order, direction)
            assert page
