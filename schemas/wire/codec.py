"""Avro single-object encoding: ``C3 01``, the schema's CRC-64-AVRO fingerprint (8 bytes), the body.

A reader finds the writer's schema among the packaged ``.avsc`` files (``schemas/avro``), so a topic may hold several
kinds of record, without a schema registry. Specification: Apache Avro 1.11, "Single-object encoding".
"""

import json
from collections.abc import Callable, Iterator, Mapping
from dataclasses import fields
from functools import partial
from importlib.resources import files
from io import BytesIO
from operator import attrgetter
from typing import Any, TypeVar, cast

from fastavro import parse_schema, schemaless_reader, schemaless_writer
from fastavro.schema import fingerprint, to_parsing_canonical_form
from fastavro.validation import validate

from millstream.schemas.errors import CodecError, TruncatedRecord, UnknownSchema, WrongType
from millstream.schemas.spans.text import safe_repr, valid
from millstream.schemas.wire import records
from millstream.schemas.wire.records import LONGEST_ATTEMPT_S, LONGEST_LEASE_S, RECORD_TYPES, Record, Span
from millstream.schemas.wire.span_codec import UNFIT, span_bytes

MAGIC = b"\xc3\x01"
HEADER_SIZE = 10  # magic and fingerprint

R = TypeVar("R", bound=Record)

Check = tuple[Callable[[Any], bool], str]  # whether a value fits, and what fits

# fastavro's writer accepts any object as a boolean; writer and reader accept numbers that are too wide for an int.
CHECKS: dict[str, Check] = {
    "boolean": (lambda value: isinstance(value, bool), "a boolean"),
    "int": (lambda value: -(1 << 31) <= value < 1 << 31, "an int"),
}
LONGEST_S = {
    "lease_s": LONGEST_LEASE_S,
    "timeout_s": LONGEST_ATTEMPT_S,
    "unresponsive_s": LONGEST_ATTEMPT_S,
}


def _checks(schema: Mapping[str, Any]) -> Iterator[tuple[str, Check]]:
    for field in schema["fields"]:
        name, kind = field["name"], field["type"]
        optional = isinstance(kind, list) and kind[0] == "null"
        check = _seconds(LONGEST_S[name]) if name in LONGEST_S else CHECKS.get(str(kind[1] if optional else kind))
        if check is not None:
            yield name, _optionally(*check) if optional else check


def _optionally(fits: Callable[[Any], bool], what: str) -> Check:
    return lambda value: value is None or fits(value), what


def _seconds(longest: float) -> Check:
    return lambda value: 0 < value <= longest, f"a number of seconds above 0 and up to {longest:,.0f}"


class RecordCodec:
    """Encoder and decoder of one record type."""

    def __init__(self, record_type: type[Record], schema: dict[str, Any]) -> None:
        self.record_type = record_type
        self.name = record_type.__name__
        self.schema = cast("dict[str, Any]", parse_schema(schema))
        self.fingerprint = fingerprint_of(self.schema)
        self.prefix = MAGIC + self.fingerprint
        self.field_names = tuple(f["name"] for f in schema["fields"])
        self._values = attrgetter(*self.field_names)
        self._conversions = _conversions(schema)
        self._checks = list(_checks(schema))

    def encode(self, record: Record) -> bytes:
        """The record with its header, lone surrogates replaced. Raises `WrongType` naming the field."""
        try:
            return self._encode(record)
        except UnicodeEncodeError:
            return self._encode(valid(record))

    def _encode(self, record: Record) -> bytes:
        datum = dict(zip(self.field_names, self._values(record), strict=True))
        out = BytesIO()
        out.write(self.prefix)
        try:
            for name, (to_plain, _) in self._conversions.items():
                datum[name] = to_plain(datum[name])
            for name, (fits, what) in self._checks:
                if not fits(datum[name]):
                    raise self._unfit(name, datum[name], what)
            schemaless_writer(out, self.schema, datum)
        except (UnicodeEncodeError, WrongType):
            raise
        except Exception as error:
            raise self._wrong_type(datum, error) from error
        return out.getvalue()

    def decode_dict(self, data: bytes) -> dict[str, Any]:
        """Field values of an encoded record; nested records stay dicts."""
        source = BytesIO(data)
        source.seek(HEADER_SIZE)
        try:
            datum = cast("dict[str, Any]", schemaless_reader(source, self.schema, None))
        except Exception as error:
            raise self._unreadable(data, error) from error
        if source.tell() != len(data):
            raise WrongType(f"{self.name}: {len(data) - source.tell()} bytes follow the record")
        for name, (fits, what) in self._checks:
            if not fits(datum[name]):
                raise self._unfit(name, datum[name], what)
        return datum

    def decode(self, data: bytes) -> Record:
        datum = self.decode_dict(data)
        for name, (_, to_record) in self._conversions.items():
            datum[name] = to_record(datum[name])
        return self.record_type(**datum)

    def _unfit(self, name: str, value: Any, what: str) -> WrongType:
        return WrongType(f"{self.name}.{name}: {safe_repr(value)[:100]} is not {what}")

    def _wrong_type(self, datum: Mapping[str, Any], error: Exception) -> WrongType:
        for part in self.schema["fields"]:
            name = part["name"]
            try:
                validate(datum[name], part["type"])
                schemaless_writer(BytesIO(), part["type"], datum[name])
            except Exception:
                shown = safe_repr(datum[name])[:100]
                return WrongType(f"{self.name}.{name}: {shown} does not fit {json.dumps(part['type'])[:100]}")
        return WrongType(f"{self.name}: {error}")

    def _unreadable(self, data: bytes, error: Exception) -> CodecError:
        """Reads field by field to name the one at which the body breaks."""
        source = BytesIO(data)
        source.seek(HEADER_SIZE)
        for part in self.schema["fields"]:
            try:
                schemaless_reader(source, part["type"], None)
            except Exception as cause:
                # Within a number fastavro raises IndexError; the last byte then says that more should follow.
                within_number = isinstance(cause, IndexError) and source.tell() == len(data) and data[-1] & 0x80
                if isinstance(cause, EOFError) or within_number:
                    return TruncatedRecord(f"{self.name}.{part['name']}: the body ends here, after {len(data)} bytes")
                return WrongType(f"{self.name}.{part['name']}: {type(cause).__name__}: {cause}")
        return CodecError(f"{self.name}: {type(error).__name__}: {error}")


Conversion = tuple[Callable[[Any], Any], Callable[[Any], Any]]


def _conversions(schema: dict[str, Any]) -> dict[str, Conversion]:
    """For fields that hold a record or an array: conversions to plain data and back."""
    found: dict[str, Conversion] = {}
    for part in schema["fields"]:
        match part["type"]:
            case ["null", {"type": "record", "name": name}]:
                found[part["name"]] = _optional_plain, partial(_optional, getattr(records, name))
            case {"type": "array", "items": {"type": "record", "name": name}}:
                found[part["name"]] = _all_plain, partial(_all, getattr(records, name))
            case {"type": "array"}:
                found[part["name"]] = list, tuple
    return found


def _optional_plain(value: Any) -> Any:
    return None if value is None else _plain(value)


def _optional(cls: type, value: Any) -> Any:
    return None if value is None else cls(**value)


def _all_plain(values: Any) -> Any:
    return [_plain(value) for value in values]


def _all(cls: type, values: Any) -> Any:
    return tuple([cls(**value) for value in values])


def _plain(value: Any) -> dict[str, Any]:
    return {f.name: getattr(value, f.name) for f in fields(value)}


def load_schema(name: str) -> dict[str, Any]:
    """The packaged ``.avsc`` of a record."""
    text = files("millstream.schemas").joinpath("avro", f"{name}.avsc").read_text("utf-8")
    return cast("dict[str, Any]", json.loads(text))


def fingerprint_of(schema: dict[str, Any]) -> bytes:
    """CRC-64-AVRO, as in the header of a record. It ignores defaults and docs."""
    return bytes.fromhex(fingerprint(to_parsing_canonical_form(schema), "CRC-64-AVRO"))


CODECS: dict[type[Record], RecordCodec] = {t: RecordCodec(t, load_schema(t.__name__)) for t in RECORD_TYPES}
_SPAN_PREFIX = CODECS[Span].prefix
_BY_FINGERPRINT: dict[bytes, RecordCodec] = {c.fingerprint: c for c in CODECS.values()}


def encode(record: Record) -> bytes:
    """Encodes a record. Raises `WrongType` naming record and field."""
    if type(record) is Span:
        try:
            return _SPAN_PREFIX + span_bytes(record)
        except UNFIT:
            pass  # a field does not fit: the general writer replaces text that is not valid, or names the field
    return CODECS[type(record)].encode(record)


def codec_of(data: bytes) -> RecordCodec:
    """The codec that wrote ``data``, by its header alone. Raises `UnknownSchema`, `TruncatedRecord`."""
    if data[:2] != MAGIC:
        raise UnknownSchema(f"not Avro single-object encoding: the record begins with {data[:2].hex() or 'nothing'}")
    if len(data) < HEADER_SIZE:
        raise TruncatedRecord(f"the record ends within its header, after {len(data)} bytes")
    codec = _BY_FINGERPRINT.get(data[2:HEADER_SIZE])
    if codec is None:
        raise UnknownSchema(
            f"unknown schema fingerprint {data[2:HEADER_SIZE].hex()}: written by a newer version of Millstream? "
            "Upgrade this process, then replay the dead letter"
        )
    return codec


def type_of(value: bytes | Record) -> type[Record]:
    """The type of an encoded or live record; does not read the body."""
    return codec_of(value).record_type if isinstance(value, bytes) else type(value)


def decode(value: bytes | Record) -> Record:
    """Decodes a record; returns one that never left the process as it is. Raises `CodecError`."""
    return codec_of(value).decode(value) if isinstance(value, bytes) else value


def decode_as(record_type: type[R], value: bytes | Record) -> R:
    """Decodes a record of a given type. Raises `WrongType` if it has another type."""
    record = decode(value)
    if not isinstance(record, record_type):
        raise WrongType(f"expected {record_type.__name__}, found {type(record).__name__}")
    return record
