"""Schemas over time: what must not be released is found, and what an earlier release wrote is still read."""

import copy
import json
import tomllib
from io import BytesIO
from pathlib import Path
from typing import Any

import pytest
from fastavro import schemaless_writer
from typer.testing import CliRunner

from millstream.consumers.sink.rows import to_rows
from millstream.pipeline.cli.main import app
from millstream.schemas.errors import TruncatedRecord, UnknownSchema
from millstream.schemas.evolution import check_evolution
from millstream.schemas.wire import codec
from millstream.schemas.wire.codec import fingerprint_of, load_schema, released_schemas
from millstream.schemas.wire.log import LogRecord, Partition
from millstream.schemas.wire.records import RECORD_TYPES, Worker

ROOT = Path(__file__).parents[3]


def part(schema: dict[str, Any], name: str) -> dict[str, Any]:
    return next(f for f in schema["fields"] if f["name"] == name)


def changed(name: str, change: Any) -> dict[str, Any]:
    schema = copy.deepcopy(load_schema(name))
    change(schema)
    return schema


def test_every_released_schema_and_the_present_one_read_each_other() -> None:
    released = list(released_schemas())
    assert {s["name"] for s in released} == {t.__name__ for t in RECORD_TYPES}
    for schema in released:
        assert check_evolution(schema, load_schema(schema["name"])) == []


def test_this_version_has_been_frozen() -> None:
    """A release is made with its schemas under released/: its records have to be readable for ever."""
    version = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]["version"]
    frozen = {file.stem for file in (ROOT / "schemas" / "released" / version).glob("*.avsc")}
    assert frozen == {t.__name__ for t in RECORD_TYPES}


NESTED = {
    "type": "array",
    "items": {"type": "record", "name": "SpanLink", "doc": "d", "fields": [{"name": "trace_id", "type": "long"}]},
}


@pytest.mark.parametrize(
    ("change", "field", "says"),
    [
        (lambda s: part(s, "trace_state").update(default="x"), "trace_state", "default '' was released, now it is 'x'"),
        (lambda s: part(s, "trace_state").pop("default"), "trace_state", "default '' was released, now it is none"),
        (lambda s: part(s, "start").update(default=0), "start", "default none was released, now it is 0"),
        (lambda s: part(s, "name").update(doc=" "), "name", "has no doc"),
        (lambda s: s.pop("doc"), "", "has no doc"),
        (lambda s: s["fields"].append({"name": "x", "type": "long", "doc": "d"}), "x", "has no default"),
        (lambda s: s["fields"].remove(part(s, "start")), "start", "is gone"),
        (lambda s: part(s, "name").update(name="title"), "name", "is gone"),
        (lambda s: part(s, "sequence").update(type="int"), "sequence", "what the release wrote can't be read"),
        (lambda s: part(s, "start").update(type="double"), "start", "what the release wrote reads as something else"),
        (lambda s: part(s, "name").update(type="bytes"), "name", "reads as something else"),
        (lambda s: part(s, "rollout_id").update(type=["null", "string"]), "rollout_id", "what is written now can't be"),
        (lambda s: part(s, "links").update(type=NESTED), "links.trace_id", "what the release wrote can't be read"),
        (lambda s: part(s, "links").update(type=NESTED), "links.span_id", "is gone"),
        (lambda s: part(s, "links").update(type="string", default=""), "links", "default [] was released"),
        (lambda s: part(s, "start").update(default="soon"), "", "is no valid schema"),
        (lambda s: s.update(name="Sp"), "", "can't be read by the other"),
    ],
)
def test_what_must_not_change_is_found_with_its_schema_and_field(change: Any, field: str, says: str) -> None:
    found = check_evolution(load_schema("Span"), changed("Span", change))
    assert [f for f in found if (f.schema, f.field) == ("Span", field) and says in f.problem], found


def test_fields_with_defaults_may_come_and_go_and_words_may_change() -> None:
    def change(schema: dict[str, Any]) -> None:
        schema["doc"] = part(schema, "name")["doc"] = "Said better."
        schema["fields"].append({"name": "x", "type": ["null", "long"], "doc": "New.", "default": None})
        schema["fields"].remove(part(schema, "trace_state"))

    assert check_evolution(load_schema("Span"), changed("Span", change)) == []


def test_the_command_names_release_schema_and_field_and_fails(tmp_path: Path) -> None:
    folder = tmp_path / "0.0.1"
    folder.mkdir()
    old = changed("Worker", lambda s: part(s, "slots").update(default=3))
    (folder / "Worker.avsc").write_text(json.dumps(old))
    (folder / "Gone.avsc").write_text(json.dumps(old | {"name": "Gone"}))
    result = CliRunner().invoke(app, ["schemas", "check", str(tmp_path), "--json"])
    assert result.exit_code == 1
    gone, default = json.loads(result.output)
    assert (gone["schema"], gone["problem"]) == (
        "Gone",
        "was released and is gone: its records could not be read any more",
    )
    assert default == {
        "release": "0.0.1",
        "schema": "Worker",
        "field": "slots",
        "problem": "default 3 was released, now it is 0",
    }
    assert CliRunner().invoke(app, ["schemas", "check", str(ROOT / "schemas" / "released")]).exit_code == 0
    (folder / "Worker.avsc").write_text("[]")
    assert "Worker.avsc is no Avro schema" in str(
        CliRunner().invoke(app, ["schemas", "check", str(tmp_path)]).exception
    )
    empty = CliRunner().invoke(app, ["schemas", "check", str(tmp_path / "nowhere")])
    assert "no .avsc files" in str(empty.exception)


@pytest.fixture
def earlier(monkeypatch: pytest.MonkeyPatch) -> bytes:
    """A Worker as a release wrote it that had no slots, and a field that is gone since."""

    def change(schema: dict[str, Any]) -> None:
        schema["fields"].remove(part(schema, "slots"))
        schema["fields"].insert(1, {"name": "rack", "type": "string", "doc": "d", "default": ""})

    old = changed("Worker", change)
    monkeypatch.setattr(codec, "released_schemas", lambda: iter([old]))
    codec._earlier.cache_clear()
    body = BytesIO()
    values = {"worker_id": "w", "rack": "r7", "role": "sink", "host": "h", "version": "0", "running": 2}
    schemaless_writer(body, old, values | {"started": 1, "last_seen": 2})
    yield codec.MAGIC + fingerprint_of(old) + body.getvalue()
    codec._earlier.cache_clear()


def test_what_an_earlier_release_wrote_is_read_with_defaults(earlier: bytes) -> None:
    worker = codec.decode_as(Worker, earlier)
    assert worker == Worker(
        worker_id="w", role="sink", host="h", version="0", slots=0, running=2, started=1, last_seen=2
    )
    assert codec.type_of(earlier) is Worker
    assert codec.decode(codec.encode(worker)) == worker
    with pytest.raises(TruncatedRecord, match=r"Worker\.rack"):  # named by the fields that it was written with
        codec.decode(earlier[:13])
    with pytest.raises(UnknownSchema, match="0102030405060708"):
        codec.decode(codec.MAGIC + bytes(range(1, 9)))


def test_what_an_earlier_release_wrote_gets_its_row(monkeypatch: pytest.MonkeyPatch) -> None:
    old = changed("Control", lambda s: s["fields"].remove(part(s, "experiment_id")))
    monkeypatch.setattr(codec, "released_schemas", lambda: iter([old]))
    codec._earlier.cache_clear()
    body = BytesIO()
    schemaless_writer(body, old, {"kind": "pause", "name": "e", "body": "{}", "created_at": 5})
    value = codec.MAGIC + fingerprint_of(old) + body.getvalue()
    (rows,), unusable = to_rows([LogRecord(Partition("t.control", 0), 3, 0, "k", value)], "t.events")
    codec._earlier.cache_clear()
    assert unusable == []
    row = dict(zip(rows.column_names, (column[0] for column in rows.columns), strict=True))
    assert (row["kind"], row["experiment_id"], row["created_at"], row["offset"]) == ("pause", "", 5, 3)
