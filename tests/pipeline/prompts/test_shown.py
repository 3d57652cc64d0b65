"""Candidates as commands and pages show them."""

import json
import uuid
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
from starlette.testclient import TestClient
from typer.testing import CliRunner

from millstream.consumers.sink.clickhouse_writer import ClickHouseWriter
from millstream.consumers.sink.rows import to_rows
from millstream.pipeline.cli.main import app
from millstream.pipeline.store.candidates import changes
from millstream.pipeline.ui.app import ui_app
from millstream.pipeline.ui.source import Source
from millstream.schemas.config.settings import Settings, load_settings
from millstream.schemas.control import PromptTemplate, PromptVersion, Resources
from millstream.schemas.errors import ConfigError
from millstream.schemas.wire import codec
from millstream.schemas.wire.log import LogRecord, Partition
from millstream.schemas.wire.records import Control

HOSTILE = "<script>alert(1)</script>"
BEST = f"Say {{x}} twice.\nBe short.\n{HOSTILE}"


def version(number: int, text: str, **given: Any) -> Control:
    templates = {"system": PromptTemplate(template=text)}
    values = {"round": 0, "experiment_id": "e1", "resources_id": f"v{number}", "templates": templates, **given}
    return PromptVersion(number=number, **values).to_control(number + 1)


RECORDS = [
    Control(kind="experiment", name="e1", experiment_id="e1", body='{"run": "words"}', created_at=1),
    version(0, "Say {x}.\nBe short.", score=0.25),
    version(1, BEST, parent="v0", critique=f"vague {HOSTILE}", score=0.5, batch_score=1.0),
    version(2, "Say it.", parent="v0", critique="?", refused="it lost {x}", rollout_id="r9"),
    Resources(resources_id="w", experiment_id="e1", items={"system": PromptTemplate(template=BEST)}).to_control(9),
]


@pytest.fixture(scope="module")
def settings(folder: Path) -> Iterator[Settings]:
    settings = load_settings(clickhouse_dsn=f"chdb://{folder}", clickhouse_database=f"p{uuid.uuid4().hex}")
    writer = ClickHouseWriter(settings)
    writer.migrate()
    place = Partition(settings.topics.control, 0)
    records = [LogRecord(place, n, 1, None, codec.encode(value)) for n, value in enumerate(RECORDS)]
    tables, unusable = to_rows(records, settings.topics.events)
    assert not unusable
    for rows in tables:
        rows.insert(writer, uuid.uuid4().hex)
    yield settings
    writer.close()


@pytest.fixture
def said(settings: Settings, monkeypatch: pytest.MonkeyPatch) -> Any:
    monkeypatch.setenv("MILLSTREAM_CLICKHOUSE_DSN", settings.clickhouse_dsn)
    monkeypatch.setenv("MILLSTREAM_CLICKHOUSE_DATABASE", settings.clickhouse_database)

    def run(*arguments: str) -> str:
        done = CliRunner().invoke(app, ["prompts", *arguments])
        if done.exception is not None and not isinstance(done.exception, SystemExit):
            raise done.exception
        return done.output

    return run


def test_the_list_names_parents_scores_and_what_is_current(said: Any) -> None:
    rows = json.loads(said("list", "words", "--json"))
    assert [(row["number"], row["parent_number"], row["score"], row["current"]) for row in rows] == [
        (0, None, 0.25, False),
        (1, 0, 0.5, True),
        (2, 0, None, False),
    ]
    assert "it lost {x}" in said("list", "e1")


def test_a_candidate_is_shown_with_its_critique(said: Any) -> None:
    shown = said("show", "words", "1")
    assert f"critique of its parent:\nvague {HOSTILE}" in shown
    assert "system (f-string):\nSay {x} twice." in shown
    assert said("show", "words", "v1") == shown


def test_a_diff_is_that_from_the_parent(said: Any) -> None:
    expected = f"system: candidate 0 → 1\n- Say {{x}}.\n+ Say {{x}} twice.\n  Be short.\n+ {HOSTILE}\n"
    assert said("diff", "words", "1") == expected
    assert "candidate 2 → 1" in said("diff", "words", "1", "2")
    assert json.loads(said("diff", "words", "1", "--json"))[0] == {
        "template": "system",
        "sign": "-",
        "line": "Say {x}.",
    }
    assert said("diff", "words", "1", "v1") == "They have the same texts.\n"
    with pytest.raises(ConfigError, match="candidate 0 has no parent"):
        said("diff", "words", "0")


def test_what_is_not_there_or_was_refused_is_named(said: Any) -> None:
    with pytest.raises(ConfigError, match="no candidate 7; there are: 0, 1, 2"):
        said("show", "words", "7")
    with pytest.raises(ConfigError, match=r"candidate 2 was refused: it lost \{x\}"):
        said("rollback", "words", "--to", "2")
    with pytest.raises(ConfigError, match=r"'1' is not VERSION=SHARE, as 7=0\.5"):
        said("split", "words", "1")


def test_a_name_that_one_side_lacks_is_a_difference() -> None:
    assert list(changes({"a": "x"}, {"a": "x", "b": "y"})) == [("b", "+", "y")]
    assert list(changes({"b": "y\nz"}, {"b": "y"})) == [("b", " ", "y"), ("b", "-", "z")]


def test_the_page_of_the_experiment_lists_them(settings: Settings) -> None:
    source = Source(settings)
    with TestClient(ui_app(source), base_url="http://127.0.0.1:8700") as browser:
        page = browser.get("/experiments/e1").text
        rollouts = browser.get("/rollouts?resources=v1&experiment=e1")
    source.close()
    assert "3 candidates" in page
    assert "vague &lt;script&gt;" in page
    assert HOSTILE not in page
    assert "+ Say {x} twice." in page
    assert "it lost {x}" in page
    assert page.count('s-succeeded">current') == 1
    assert "/rollouts/r9" in page
    assert "resources=v1" in page
    assert rollouts.status_code == 200
    assert 'value="v1"' in rollouts.text
