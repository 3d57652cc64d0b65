"""Records on the wire: what goes in comes out, and what is broken is named."""

import struct
import typing
from collections.abc import Mapping
from dataclasses import MISSING, fields, is_dataclass, replace
from io import BytesIO
from typing import Any, cast

import pytest
from fastavro import schemaless_writer
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from millstream.schemas.errors import CodecError, TruncatedRecord, UnknownSchema, WrongType
from millstream.schemas.wire import records
from millstream.schemas.wire.codec import (
    CODECS,
    HEADER_SIZE,
    LONGEST_S,
    MAGIC,
    decode,
    decode_as,
    encode,
    load_schema,
    type_of,
)
from millstream.schemas.wire.records import (
    RECORD_TYPES,
    Control,
    ErrorInfo,
    Record,
    RolloutTask,
    Settled,
    Span,
    SpanEvent,
)
from millstream.schemas.wire.span_codec import long

by_type = pytest.mark.parametrize("record_type", RECORD_TYPES, ids=lambda t: t.__name__)


def values(avro: Any) -> st.SearchStrategy[Any]:
    """Everything that an Avro type can hold, as the record classes hold it."""
    if isinstance(avro, list):
        return st.one_of(*map(values, avro))
    if isinstance(avro, dict):
        if avro["type"] == "map":
            return st.dictionaries(st.text(max_size=5), values(avro["values"]), max_size=3)
        if avro["type"] == "array":
            return st.lists(values(avro["items"]), max_size=3).map(tuple)
        cls = getattr(records, avro["name"])
        return st.builds(cls, **{f["name"]: values(f["type"]) for f in avro["fields"]})
    simple: dict[str, st.SearchStrategy[Any]] = {
        "null": st.none(),
        "string": st.text(max_size=20),
        "bytes": st.binary(max_size=20),
        "int": st.integers(-(2**31), 2**31 - 1),
        "long": st.integers(-(2**63), 2**63 - 1),
        "double": st.floats(allow_nan=False),
        "boolean": st.booleans(),
    }
    return simple[avro]


def field_values(name: str, avro: Any) -> st.SearchStrategy[Any]:
    seconds = st.floats(0, LONGEST_S.get(name, 0), exclude_min=name in LONGEST_S)
    return values(avro) if name not in LONGEST_S else st.none() | seconds if isinstance(avro, list) else seconds


STRATEGIES: dict[type[Record], st.SearchStrategy[Record]] = {
    t: st.builds(t, **{f["name"]: field_values(f["name"], f["type"]) for f in load_schema(t.__name__)["fields"]})
    for t in RECORD_TYPES
}


def example(record_type: type[Record]) -> Record:
    """A record with something in each of its fields."""
    return record_type(**{f["name"]: sample(f["type"]) for f in load_schema(record_type.__name__)["fields"]})


def sample(avro: Any) -> Any:
    if isinstance(avro, list):
        return sample(avro[1])
    if isinstance(avro, dict):
        if avro["type"] == "map":
            return {"k": sample(avro["values"])}
        if avro["type"] == "array":
            return (sample(avro["items"]),)
        return getattr(records, avro["name"])(**{f["name"]: sample(f["type"]) for f in avro["fields"]})
    return {"string": "text", "bytes": b"bytes", "int": 7, "long": 7_000_000_000, "double": 0.5, "boolean": True}[avro]


@by_type
@settings(max_examples=40, suppress_health_check=[HealthCheck.too_slow])
@given(data=st.data())
def test_what_is_encoded_is_decoded(record_type: type[Record], data: st.DataObject) -> None:
    record = data.draw(STRATEGIES[record_type])
    encoded = encode(record)
    assert decode(encoded) == record
    assert decode_as(record_type, encoded) == record
    assert type_of(encoded) is record_type


@settings(max_examples=300, suppress_health_check=[HealthCheck.too_slow])
@given(span=STRATEGIES[Span])
def test_spans_are_encoded_as_fastavro_does(span: Span) -> None:
    assert encode(span) == CODECS[Span].encode(span)


@given(number=st.integers(-(2**63), 2**63 - 1) | st.integers(0, 63).map(lambda bit: (1 << bit) - 1))
def test_numbers_are_encoded_as_fastavro_does(number: int) -> None:
    expected = BytesIO()
    schemaless_writer(expected, "long", number)
    assert long(number) == expected.getvalue()


@by_type
def test_class_and_schema_are_the_same(record_type: type[Record]) -> None:
    """Names, order, types and defaults: neither the fingerprint nor a round trip would notice all of them."""
    assert_same(record_type, load_schema(record_type.__name__))


def assert_same(cls: type, schema: dict[str, Any]) -> None:
    assert schema["name"] == cls.__name__
    assert schema["doc"].strip(), f"{cls.__name__} says what it is"
    assert [f["name"] for f in schema["fields"]] == [f.name for f in fields(cls)]
    hints = typing.get_type_hints(cls)
    for ours, avro in zip(fields(cls), schema["fields"], strict=True):
        where = f"{cls.__name__}.{ours.name}"
        assert avro["doc"].strip(), f"{where} says what it means"
        assert hints[ours.name] == python_type(avro["type"]), where
        default = ours.default_factory() if ours.default_factory is not MISSING else ours.default
        assert ("default" in avro) == (default is not MISSING), where
        if default is not MISSING:
            expected = () if avro["default"] == [] else avro["default"]
            assert default == expected, where
            assert type(default) is type(expected), where


def python_type(avro: Any) -> Any:
    if isinstance(avro, list):
        null, other = avro
        assert null == "null"
        return python_type(other) | None
    if isinstance(avro, dict):
        if avro["type"] == "map":
            return Mapping[str, python_type(avro["values"])]
        if avro["type"] == "array":
            return tuple[python_type(avro["items"]), ...]
        cls = getattr(records, avro["name"])
        assert_same(cls, avro)
        return cls
    return {"string": str, "bytes": bytes, "int": int, "long": int, "double": float, "boolean": bool}[avro]


def test_each_schema_has_its_own_fingerprint() -> None:
    assert len({codec.fingerprint for codec in CODECS.values()}) == len(RECORD_TYPES)


def test_the_header_is_avro_single_object_encoding() -> None:
    """Against the specification's algorithm, written out here: CRC-64-AVRO of the parsing canonical form."""
    canonical = (
        b'{"name":"millstream.Control","type":"record","fields":[{"name":"kind","type":"string"},'
        b'{"name":"name","type":"string"},{"name":"experiment_id","type":"string"},'
        b'{"name":"body","type":"string"},{"name":"created_at","type":"long"}]}'
    )
    empty = 0xC15D213AA4D7A795
    table = []
    for byte in range(256):
        value = byte
        for _ in range(8):
            value = value >> 1 ^ (empty if value & 1 else 0)
        table.append(value)
    crc = empty
    for byte in canonical:
        crc = crc >> 8 ^ table[(crc ^ byte) & 0xFF]
    encoded = encode(Control(kind="k", name="", body="", created_at=-1))
    assert encoded == b"\xc3\x01" + struct.pack("<Q", crc) + b"\x02k" + b"\x00" + b"\x00" + b"\x00" + b"\x01"


@by_type
def test_a_body_that_ends_too_early_is_named_wherever_it_ends(record_type: type[Record]) -> None:
    encoded = encode(example(record_type))
    names = [f["name"] for f in load_schema(record_type.__name__)["fields"]]
    broken: list[str] = []
    for length in range(HEADER_SIZE, len(encoded)):
        with pytest.raises(CodecError) as caught:
            decode(encoded[:length])
        assert isinstance(caught.value, TruncatedRecord), f"cut at {length}: {caught.value!r}"
        place, _, _ = str(caught.value).partition(":")
        broken.append(place.removeprefix(f"{record_type.__name__}."))
    assert list(dict.fromkeys(broken)) == names  # each field in turn


def test_a_header_that_ends_too_early_is_truncated() -> None:
    for length in range(2, HEADER_SIZE):
        with pytest.raises(TruncatedRecord, match=f"within its header, after {length} bytes"):
            decode(encode(example(Control))[:length])


@pytest.mark.parametrize("garbage", [b"", b"\xc3", b"{}", b"\x00" * 40, b"\xff\xfe garbage"])
def test_what_is_not_ours_is_told_from_what_is_broken(garbage: bytes) -> None:
    with pytest.raises(UnknownSchema, match="not Avro single-object encoding"):
        decode(garbage)


def test_an_unknown_fingerprint_is_shown() -> None:
    with pytest.raises(UnknownSchema, match=r"0102030405060708.*newer version"):
        decode(MAGIC + bytes(range(1, 9)) + b"body")


@by_type
def test_bytes_behind_the_record_are_refused(record_type: type[Record]) -> None:
    with pytest.raises(WrongType, match=f"^{record_type.__name__}: 3 bytes follow the record"):
        decode(encode(example(record_type)) + b"abc")


def test_text_that_is_not_utf8_names_its_field() -> None:
    encoded = CODECS[Control].prefix + b"\x04k\xff"
    with pytest.raises(WrongType, match=r"Control\.kind: UnicodeDecodeError"):
        decode(encoded)


def test_a_number_wider_than_an_int_names_its_field() -> None:
    worker = encode(example(records.Worker))
    head = worker[: worker.index(b"\x0e\x0e")]  # slots and running, seven each
    with pytest.raises(WrongType, match=r"Worker\.slots: 2147483648 is not an int"):
        decode(head + b"\x80\x80\x80\x80\x10" + worker[len(head) + 1 :])


@by_type
def test_a_value_of_the_wrong_type_names_its_field(record_type: type[Record]) -> None:
    good = example(record_type)
    for f in fields(record_type):
        broken = record_type(**{g.name: getattr(good, g.name) for g in fields(record_type)} | {f.name: object()})
        with pytest.raises(WrongType, match=rf"^{record_type.__name__}\.{f.name}:"):
            encode(broken)


@pytest.mark.parametrize(
    ("field", "value"),
    [
        ("attempt", 2**31),
        ("attempt", "1"),
        ("attempt", None),
        ("created_at", 2**63),
        ("created_at", "today"),
        ("created_at", None),
        ("input", b"bytes"),
        ("lease_s", float("nan")),
        ("lease_s", float("inf")),
        ("lease_s", -1.0),
        ("lease_s", 0.0),
        ("lease_s", 1e300),
        ("timeout_s", float("nan")),
        ("timeout_s", float("inf")),
        ("timeout_s", -1.0),
        ("unresponsive_s", float("-inf")),
        ("lost_attempts", -(2**31) - 1),
        ("retry_on", ("failed", 3)),
        ("metadata", {"k": 1}),
        ("state", "text"),
    ],
)
def test_what_nearly_fits_is_refused_too(field: str, value: object) -> None:
    good = {f.name: getattr(example(RolloutTask), f.name) for f in fields(RolloutTask)}
    with pytest.raises(WrongType, match=rf"^RolloutTask\.{field}:"):
        encode(RolloutTask(**good | {field: value}))


@pytest.mark.parametrize("number", [float("nan"), float("inf"), -1.0, 1e300])
@pytest.mark.parametrize("name", LONGEST_S)
def test_seconds_of_another_publisher_that_never_end_are_refused(name: str, number: float) -> None:
    """A6: a lease that never expires would hold its partition's offset for ever."""
    good = encode(replace(cast("RolloutTask", example(RolloutTask)), **{name: 0.123}))
    broken = good.replace(struct.pack("<d", 0.123), struct.pack("<d", number))
    with pytest.raises(WrongType, match=rf"^RolloutTask\.{name}: .* is not a number of seconds above 0"):
        decode(broken)


@pytest.mark.parametrize("record_type", [t for t in RECORD_TYPES if t is not Settled])  # which has no text
def test_half_a_character_in_any_text_is_replaced(record_type: type[Record]) -> None:
    """A1: no text keeps a record from being written."""

    def with_half(value: Any) -> Any:
        if isinstance(value, str):
            return value + "\ud83d"
        if isinstance(value, dict):
            return {with_half(name): with_half(inner) for name, inner in value.items()}
        if isinstance(value, tuple):
            return tuple(map(with_half, value))
        if is_dataclass(value):
            return type(value)(**{f.name: with_half(getattr(value, f.name)) for f in fields(value)})
        return value

    record = with_half(example(record_type))
    assert "\ufffd" in str(record).replace("\\ud83d", "\ufffd")
    assert str(decode(encode(record))) == str(record).replace("\\ud83d", "\ufffd")


@settings(max_examples=200)
@given(st.sampled_from(RECORD_TYPES), st.binary(max_size=60))
def test_garbage_behind_a_good_header_is_always_a_codec_error(record_type: type[Record], body: bytes) -> None:
    """Or, by chance, a record: then one that encodes again."""
    error: CodecError | None = None
    try:
        record = decode(CODECS[record_type].prefix + body)
    except CodecError as caught:
        error = caught
    assert encode(record) if error is None else str(error).startswith(record_type.__name__)


@pytest.mark.parametrize("value", [0, 1, None, "False"])
def test_only_true_and_false_are_boolean(value: object) -> None:
    good = {f.name: getattr(example(records.Triplet), f.name) for f in fields(records.Triplet)}
    with pytest.raises(WrongType, match=r"Triplet\.trainable"):
        encode(records.Triplet(**good | {"trainable": value}))


def test_decode_as_refuses_another_record() -> None:
    for value in (example(Control), encode(example(Control))):
        with pytest.raises(WrongType, match="expected Span, found Control"):
            decode_as(Span, value)


def test_a_record_that_never_left_the_process_is_returned_as_it_is() -> None:
    record = example(Control)
    assert decode(record) is record
    assert type_of(record) is Control


def test_nested_records_come_back_as_records() -> None:
    span = decode_as(Span, encode(example(Span)))
    assert span.events == (SpanEvent(name="text", time=7_000_000_000, attributes={"k": "text"}),)
    event = decode_as(records.AttemptEvent, encode(example(records.AttemptEvent)))
    assert event.error == ErrorInfo(type="text", message="text", stack="text")


REQUIRED = {
    "RolloutTask": {"rollout_id", "group_id", "input", "timeout_s", "lease_s", "created_at"},
    "AttemptEvent": {"rollout_id", "attempt_id", "attempt", "status", "worker_id", "time", "lease_s"},
    "Span": {
        *("trace_id", "span_id", "name", "kind", "start", "end", "rollout_id", "attempt_id", "source", "sequence"),
    },
    "Triplet": {"rollout_id", "attempt_id", "group_id", "turn", "span_id", "prompt", "response"},
    "RolloutEnd": {"rollout_id", "group_id", "group_size", "status", "attempts", "created_at", "ended_at"},
    "Control": {"kind", "name", "body", "created_at"},
    "Worker": {"worker_id", "role", "host", "version", "started", "last_seen"},
    "Settled": {"marks"},
    "TrainingStep": {"experiment_id", "step", "started_at", "ended_at"},
    "DeadLetter": {"topic", "partition", "offset", "timestamp", "role", "reason", "error", "time"},
}


@by_type
def test_only_fields_with_defaults_are_added(record_type: type[Record]) -> None:
    """Records outlive the process that wrote them: a field that is added later needs a default, and a field without one
    can't be removed. These are the only fields without a default that there may ever be."""
    schema = load_schema(record_type.__name__)
    assert {f["name"] for f in schema["fields"] if "default" not in f} == REQUIRED[record_type.__name__]
