"""What the writer does to a store: migrations, inserts, and the errors of a connection."""

import os
import subprocess
import sys
from uuid import uuid4

import factories
import pytest

from millstream.consumers.sink.clickhouse_connection import connect
from millstream.consumers.sink.clickhouse_writer import ClickHouseWriter
from millstream.consumers.sink.migrations import Migration, packaged_migrations
from millstream.consumers.sink.rows import TABLES, RowsRefused, to_rows
from millstream.schemas.config.settings import load_settings
from millstream.schemas.errors import ConfigError, StoreError
from millstream.schemas.ids import new_id
from millstream.schemas.wire import codec
from millstream.schemas.wire.log import LogRecord, Partition

EVENTS = "millstream.events"


@pytest.fixture
def settings(folder):
    return load_settings(clickhouse_dsn=f"chdb://{folder}", clickhouse_database=f"d{uuid4().hex}")


def ask(writer, query):
    return writer.client.query(query).result_rows


def test_migrating_again_changes_nothing(settings):
    writer = ClickHouseWriter(settings)
    applied = writer.migrate()
    assert applied == [m.name for m in packaged_migrations()]
    assert writer.migrate() == []
    writer.close()
    again = ClickHouseWriter(settings)
    assert again.migrate() == []
    assert ask(again, "SELECT name FROM migrations ORDER BY version") == [(name,) for name in applied]
    again.close()


def test_a_store_of_a_newer_version_is_refused(writer):
    with pytest.raises(StoreError, match=r"migration 2 \(0002_views\).*upgrade"):
        writer.migrate(packaged_migrations()[:1])


def test_there_is_a_column_for_everything_that_the_sink_writes(writer):
    for table in TABLES.values():
        rows = ask(writer, f"DESCRIBE TABLE {table.name}")
        assert set(table.columns) == {name for name, _, default, *_ in rows if default != "DEFAULT"}, table.name


def test_a_changed_migration_is_refused(writer):
    first, *others = packaged_migrations()
    with pytest.raises(StoreError, match=r"migration 1 \(0001_tables\).*other contents"):
        writer.migrate([Migration(first.version, first.name, first.sql + "\n"), *others])


def test_a_migration_that_broke_off_is_taken_up_again(writer):
    sql = "CREATE TABLE IF NOT EXISTS extra (a Int8) ENGINE = MergeTree ORDER BY a;\nSELECT nonsense;\n"
    with pytest.raises(StoreError, match="nonsense"):
        writer.migrate([*packaged_migrations(), Migration(1000, "1000_extra", sql)])
    fixed = Migration(1000, "1000_extra", sql.replace("nonsense", "1"))
    assert writer.migrate([*packaged_migrations(), fixed]) == ["1000_extra"]
    assert ask(writer, "SELECT count() FROM extra") == [(0,)]


def test_a_folder_that_another_process_holds(writer, settings):
    code = (
        "from millstream.consumers.sink.clickhouse_connection import connect\n"
        "from millstream.schemas.config.settings import load_settings\n"
        "from millstream.schemas.errors import StoreError\n"
        f"try: connect(load_settings(clickhouse_dsn={settings.clickhouse_dsn!r}))\n"
        "except StoreError as error: print(error)"
    )
    other = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True, timeout=60)
    assert f"held by another process (pid {os.getpid()})" in other.stdout
    assert "--query-port 8123" in other.stdout


def test_a_store_whose_creation_a_full_disk_has_cut_off_is_created_again(tmp_path):
    (tmp_path / "metadata").mkdir()
    (tmp_path / "metadata" / "millstream.sql").touch()  # the engine creates the file, and can't write it
    code = (
        "from millstream.consumers.sink.clickhouse_writer import ClickHouseWriter\n"
        "from millstream.schemas.config.settings import load_settings\n"
        f"writer = ClickHouseWriter(load_settings(clickhouse_dsn='chdb://{tmp_path}'))\n"
        "print(writer.migrate())"
    )
    other = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, timeout=60)
    assert "0001_tables" in other.stdout, other.stderr
    assert "metadata/millstream.sql is empty" in other.stderr


def test_a_store_that_does_not_open_is_not_said_to_be_held(tmp_path):
    (tmp_path / "metadata").mkdir()
    (tmp_path / "metadata" / "millstream.sql").write_text("NONSENSE")
    code = (
        "from millstream.consumers.sink.clickhouse_connection import connect\n"
        "from millstream.schemas.config.settings import load_settings\n"
        "from millstream.schemas.errors import StoreError\n"
        f"try: connect(load_settings(clickhouse_dsn='chdb://{tmp_path}'))\n"
        "except StoreError as error: print(error)"
    )
    other = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True, timeout=60)
    assert "can't be opened: the engine wrote why to stderr" in other.stdout
    assert "NONSENSE" in other.stderr


def test_a_relative_folder_lies_below_the_current_one(writer, settings, folder, monkeypatch):
    monkeypatch.chdir(folder.parent.parent)
    same = ClickHouseWriter(settings.model_copy(update={"clickhouse_dsn": "chdb://a b/store"}))
    assert same.migrate() == []
    same.close()


def test_a_folder_that_cannot_be_made(tmp_path):
    (tmp_path / "file").touch()
    with pytest.raises(StoreError, match=r"file/store can't be created"):
        connect(load_settings(clickhouse_dsn=f"chdb://{tmp_path}/file/store"))


def test_a_server_that_does_not_answer_is_named_without_its_password():
    with pytest.raises(StoreError, match=r"clickhouse://me:\*\*\*@127\.0\.0\.1:1 can't be opened") as caught:
        connect(load_settings(clickhouse_dsn="clickhouse://me:secret@127.0.0.1:1"))
    assert "secret" not in str(caught.value)


def test_a_dsn_of_something_else():
    with pytest.raises(ConfigError, match="clickhouse_dsn"):
        connect(load_settings(clickhouse_dsn="postgres://somewhere"))


def test_a_token_that_comes_again_is_dropped_before_it_is_stored(writer):
    (rows,), _ = to_rows([LogRecord(Partition(EVENTS, 0), 0, 1, None, codec.encode(factories.task()))], EVENTS)
    for token, expected in [("a", 1), ("a", 1), ("b", 2)]:
        rows.insert(writer, token)
        assert ask(writer, "SELECT count() FROM tasks_raw") == [(expected,)]


def test_half_a_character_of_a_record_in_memory_is_stored_as_valid_text(writer):
    """A1: one record does not cost its batch."""
    writer.insert("controls_raw", ["kind", "name"], [["a", "half"], ["b", "\ud800"]], "h")
    assert ask(writer, "SELECT name FROM controls_raw WHERE kind = 'half'") == [("\ufffd",)]


def test_a_value_that_no_column_holds_is_named_and_the_others_can_go_on(writer):
    with pytest.raises(RowsRefused, match="controls_raw"):
        writer.insert("controls_raw", ["kind", "name"], [["a"], [7]], "t")
    with pytest.raises(RowsRefused, match="offset"):
        writer.insert("attempts_raw", ["rollout_id", "offset"], [["a"], [1 << 70]], "t")
    with pytest.raises(StoreError, match="nowhere"):
        writer.insert("nowhere", ["a"], [[1]], "t")
    writer.insert("controls_raw", ["kind", "name"], [["a"], ["b"]], "t")
    assert ask(writer, "SELECT name FROM controls_raw") == [("b",)]


def test_spans_that_are_none_are_refused_and_say_why(writer):
    task = factories.task()
    good = codec.encode(factories.call(task, "a", "r"))
    odd = codec.encode(factories.call(task, "a", "r", prompt_token_ids=b"abc"))
    for body, why in [
        (good[:-3], "EOF"),
        (good[:10], "EOF"),
        (good + b"x", "no_bytes_left_over"),
        (odd, "within a number"),
    ]:
        (rows,), _ = to_rows([LogRecord(Partition(EVENTS, 0), 7, 1, None, body)] * 2, EVENTS)
        with pytest.raises(RowsRefused, match=why):
            rows.insert(writer, new_id())
    assert ask(writer, "SELECT count() FROM spans_raw") == [(0,)]
    assert ask(writer, "SELECT count() FROM token_ids_raw") == [(0,)]


def test_each_migration_has_a_number_of_its_own():
    numbers = [migration.version for migration in packaged_migrations()]
    assert numbers == list(range(1, len(numbers) + 1))
