"""What a trainer has done, in SQL: each step once, abandoned ones marked, and the ledger of trained rollouts."""

import json
import math
from dataclasses import replace
from io import BytesIO
from uuid import uuid4

import pytest

from millstream.consumers.sink.clickhouse_writer import ClickHouseWriter
from millstream.consumers.sink.migrations import packaged_migrations
from millstream.consumers.sink.rows import to_rows
from millstream.pipeline.store.clickhouse import ClickHouseStore
from millstream.schemas.config.settings import load_settings
from millstream.schemas.ids import new_id
from millstream.schemas.wire import codec
from millstream.schemas.wire.log import LogRecord, Partition
from millstream.schemas.wire.records import TrainingStep

T0 = 1_800_000_000_000_000_000
BOTH = pytest.mark.parametrize("encoded", [False, True], ids=["live", "encoded"])


@pytest.fixture
def settings(folder):
    return load_settings(clickhouse_dsn=f"chdb://{folder}", clickhouse_database=f"d{uuid4().hex}")


def step(number, epoch=0, **fields):
    values = {"experiment_id": "e", "run": "calc", "model_version": f"calc.{epoch}.{number}"}
    values |= {"started_at": T0 + (number - 1) * 10**9, "ended_at": T0 + number * 10**9}
    return TrainingStep(step=number, epoch=epoch, **values | fields)


def insert(writer, *steps, first=0, encoded=True):
    """As a log holds them, from the offset ``first``."""
    records = [
        LogRecord(Partition("millstream.training", 0), at, 1, None, codec.encode(value) if encoded else value)
        for at, value in enumerate(steps, first)
    ]
    tables, unusable = to_rows(records, "millstream.events")
    assert not unusable
    for rows in tables:
        rows.insert(writer, new_id())


@BOTH
def test_every_field_of_a_step_can_be_asked_for(writer, store, encoded):
    sent = step(
        3,
        1,
        wait_s=0.5,
        update_s=0.25,
        save_s=0.125,
        publish_s=0.0625,
        other_s=0.0625,
        reward_mean=0.75,
        reward_std=0.25,
        validation_reward=0.5,
        rollouts=16,
        failed=2,
        groups=3,
        dropped={"same reward": 1, "too stale": 2},
        staleness_mean=1.5,
        staleness_max=4,
        tokens=1234,
        metrics={"kl": 0.01, "entropy": 1.5},
        trained=("r1", "r2"),
        restored_from="step-00000002: the gradient is not finite",
    )
    insert(writer, sent, encoded=encoded)
    (found,) = store.sql("SELECT * FROM training_steps").records()
    for name in codec.CODECS[TrainingStep].field_names:
        value = getattr(sent, name)
        if name in ("started_at", "ended_at"):
            continue
        assert found[name] == (list(value) if isinstance(value, tuple) else value), name
    assert (found["seconds"], found["idle_share"], found["abandoned"]) == (1.0, 0.5, False)
    times = "SELECT toUnixTimestamp64Nano(started_at), toUnixTimestamp64Nano(ended_at) FROM training_steps"
    assert store.sql(times).rows == [(sent.started_at, sent.ended_at)]


def test_a_step_that_is_published_again_is_one_row_and_the_first_one_counts(writer, store):
    whole = step(1, publish_s=0.5, trained=("a", "b"))
    insert(writer, whole)
    insert(writer, replace(whole, publish_s=0.0), whole, first=7)  # as a trainer does that resumes
    assert store.sql("SELECT publish_s FROM training_steps").rows == [(0.5,)]
    assert store.sql("SELECT rollout_id FROM trained_rollouts ORDER BY rollout_id").rows == [("a",), ("b",)]
    insert(writer, whole)  # the sink reads the same record again
    assert store.sql("SELECT count(), any(publish_s) FROM training_steps").rows == [(1, 0.5)]


def test_steps_that_a_later_epoch_has_replaced_are_abandoned(writer, store):
    other = [replace(step(n), experiment_id="other") for n in (1, 2, 3)]
    first = [step(n, 0, trained=(f"a{n}",)) for n in (1, 2, 3, 4)]
    second = [step(n, 1, trained=(f"b{n}",), restored_from="step-2: reward") for n in (3, 4, 5)]
    third = [step(n, 2, trained=(f"c{n}",)) for n in (5, 6)]
    insert(writer, *other, *first, *second, *third)
    found = store.sql(
        "SELECT epoch, step, abandoned FROM training_steps WHERE experiment_id = 'e' ORDER BY epoch, step"
    )
    assert [(epoch, number) for epoch, number, abandoned in found.rows if abandoned] == [(0, 3), (0, 4), (1, 5)]
    ledger = "SELECT rollout_id FROM trained_rollouts WHERE experiment_id = 'e' AND NOT abandoned ORDER BY step"
    assert [row[0] for row in store.sql(ledger).rows] == ["a1", "a2", "b3", "b4", "c5", "c6"]
    assert store.sql("SELECT count() FROM training_steps WHERE experiment_id = 'other' AND abandoned").rows == [(0,)]


def test_an_epoch_that_goes_on_where_the_last_one_ended_abandons_nothing(writer, store):
    insert(writer, step(1), step(2), step(3, 1), step(4, 4))
    assert store.sql("SELECT countIf(abandoned) FROM training_steps").rows == [(0,)]


HOSTILE_TEXT = ["", "'; DROP TABLE x --", "é\U0001f600\0", "\ud83d", "\x1b[31m", "x" * 100_000]


@BOTH
@pytest.mark.parametrize("text", HOSTILE_TEXT, ids=range(len(HOSTILE_TEXT)))
def test_any_text_in_a_step_is_stored(writer, store, encoded, text):
    sent = step(1, run=text, dropped={text: 1}, metrics={text: 1.0}, trained=(text,), restored_from=text)
    insert(writer, replace(sent, experiment_id=text), encoded=encoded)
    (found,) = store.sql("SELECT run, dropped, metrics, trained, restored_from FROM training_steps").records()
    text = text.replace("\ud83d", "\ufffd")
    expected = {"run": text, "dropped": {text: 1}, "metrics": {text: 1.0}, "trained": [text], "restored_from": text}
    assert found == expected


@BOTH
@pytest.mark.parametrize("number", [math.nan, math.inf, -math.inf, 1e308, 5e-324, -0.0])
def test_any_number_in_a_step_is_stored_and_shown(writer, store, encoded, number):
    fields = ("wait_s", "reward_mean", "reward_std", "validation_reward", "staleness_mean")
    insert(writer, step(1, metrics={"kl": number}, **dict.fromkeys(fields, number)), encoded=encoded)
    (found,) = store.sql(f"SELECT metrics['kl'] AS kl, {', '.join(fields)} FROM training_steps").records()
    for name, value in found.items():
        assert value == number or (math.isnan(value) and math.isnan(number)), name
    assert store.sql("SELECT * FROM training_steps").rows


@pytest.mark.parametrize("number", [-(2**63), 0, 2**63 - 1])
def test_the_largest_integers_are_stored(writer, store, number):
    insert(writer, step(2**31 - 1, -(2**31), tokens=number, dropped={"x": number}, started_at=0, ended_at=0))
    assert store.sql("SELECT epoch, step, tokens, dropped['x'] FROM training_steps").rows == [
        (-(2**31), 2**31 - 1, number, number)
    ]


def test_a_step_without_time_has_no_idle_share(writer, store):
    insert(writer, step(1))
    assert store.sql("SELECT seconds, idle_share FROM training_steps").rows == [(0.0, None)]


def test_a_store_from_before_there_were_steps_gets_the_table(settings):
    writer = ClickHouseWriter(settings)
    writer.migrate(packaged_migrations()[:2])
    assert "0003_training" in writer.migrate()
    insert(writer, step(1))
    store = ClickHouseStore(settings)
    assert store.sql("SELECT count() FROM training_steps").rows == [(1,)]
    store.close()
    writer.close()


def test_steps_are_kept_for_as_long_as_the_settings_say(settings):
    old = step(1, ended_at=T0 - 3000 * 86_400 * 10**9)
    writer = ClickHouseWriter(settings)
    writer.migrate()
    insert(writer, old, step(2))
    limited = ClickHouseWriter(settings.model_copy(update={"retention_days": {"training_steps": 1000}}))
    limited.migrate()
    limited.client.command("OPTIMIZE TABLE training_steps_raw FINAL")
    assert limited.client.query("SELECT step FROM training_steps").result_rows == [(2,)]
    limited.close()
    writer.close()


def test_the_json_of_a_step_is_valid_whatever_its_numbers_are(writer, store):
    insert(writer, step(1, reward_mean=math.nan, metrics={"kl": math.inf}))
    out = BytesIO()
    store.export("SELECT reward_mean, metrics FROM training_steps", out, "JSONEachRow")
    assert json.loads(out.getvalue())["reward_mean"] is None
