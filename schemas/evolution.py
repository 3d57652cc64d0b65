"""What may change between two versions of a schema: records of either have to be readable by the other."""

from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from io import BytesIO
from typing import Any

from fastavro import parse_schema, schemaless_reader, schemaless_writer
from fastavro.schema import SchemaParseException
from fastavro.utils import generate_many

Schema = dict[str, Any]

SAMPLES = 30  # of each record: enough that every branch of a union is among them


@dataclass(frozen=True, slots=True)
class Finding:
    """Something that must not be released. ``field`` is a path (``events.attributes``), empty for the record itself."""

    schema: str
    field: str
    problem: str


def check_evolution(old: Schema, new: Schema) -> list[Finding]:
    """Why readers of one version can't do with records of the other. ``old`` is a schema that was released."""
    name = old["name"]
    try:
        parse_schema(new)
    except SchemaParseException as error:  # a default that doesn't fit, for one
        return [Finding(name, "", f"is no valid schema: {error}")]
    before, after = dict(_fields("", old)), dict(_fields("", new))
    found = [Finding(name, path, problem) for path, problem in _problems(before, after)]
    for path, part in after.items():
        if not part.get("doc", "").strip():
            found.append(Finding(name, path, "has no doc"))
    if not new.get("doc", "").strip():
        found.append(Finding(name, "", "has no doc"))
    if found:
        return found
    for writer, reader, which in ((old, new, "a record of the release"), (new, old, "a new record")):
        for sample in generate_many(writer, SAMPLES):
            try:
                read = _read(sample, writer, reader)
                schemaless_writer(BytesIO(), reader, read)
            except Exception as error:
                found.append(Finding(name, "", f"{which} can't be read by the other: {error}"))
                break
    return found


def _problems(before: Mapping[str, Schema], after: Mapping[str, Schema]) -> Iterator[tuple[str, str]]:
    for path, part in before.items():
        if path not in after:
            if "default" not in part:
                yield path, "was released without a default and is gone: readers of the release need it"
            continue
        now = after[path]
        if part.get("default", _NONE) != now.get("default", _NONE):
            yield path, f"default {_shown(part)} was released, now it is {_shown(now)}"
        elif problem := _type_problem(part["type"], now["type"]):
            yield path, problem
    for path, part in after.items():
        if path not in before and "default" not in part:
            yield path, "is new and has no default: records of the release lack it"


def _type_problem(before: Any, after: Any) -> str | None:
    """None also where records lie within: their own fields are compared."""
    if _record_in(before) is not None and _record_in(after) is not None:
        return None
    changed = f"its type was released as {before!r}, now it is {after!r}: "
    for writer, reader, which in ((before, after, "what the release wrote"), (after, before, "what is written now")):
        for sample in generate_many(writer, SAMPLES):
            try:
                read = _read(sample, writer, reader)
            except Exception as error:
                return f"{changed}{which} can't be read ({error})"
            if read != sample or type(read) is not type(sample):
                return f"{changed}{which} reads as something else"
    return None


def _read(sample: Any, writer: Any, reader: Any) -> Any:
    body = BytesIO()
    schemaless_writer(body, writer, sample)
    body.seek(0)
    return schemaless_reader(body, writer, reader)


def _fields(prefix: str, schema: Schema) -> Iterator[tuple[str, Schema]]:
    """Every field with its path, those of nested records too."""
    for part in schema["fields"]:
        path = f"{prefix}{part['name']}"
        yield path, part
        if (nested := _record_in(part["type"])) is not None:
            yield from _fields(f"{path}.", nested)


def _record_in(avro: Any) -> Schema | None:
    """The record that a type is made of: itself, an item of an array or map, or a branch of a union."""
    if isinstance(avro, list):
        return next((found for branch in avro if (found := _record_in(branch)) is not None), None)
    if not isinstance(avro, dict):
        return None
    if avro["type"] == "record":
        return avro
    return _record_in(avro.get("items", avro.get("values")))


_NONE = object()  # a default may be null


def _shown(part: Schema) -> str:
    return repr(part["default"]) if "default" in part else "none"
