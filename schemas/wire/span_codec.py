"""Encodes spans in Avro's binary encoding, in a third of a general writer's time: agents pay it for each span.

Specification: Apache Avro 1.11, "Binary Encoding". A test compares it with fastavro.
"""

import struct
from collections.abc import Mapping
from functools import lru_cache

from millstream.schemas.wire.records import Span, SpanEvent, SpanLink

_NULL = b"\0"  # in a union; also an empty string, and the end of a map or an array
_VALUE = b"\2"  # in a union of null and something else: something else follows
UNFIT = (TypeError, ValueError, AttributeError, OverflowError, struct.error)
_double = struct.Struct("<d").pack


def span_bytes(span: Span) -> bytes:
    """The body of the record. Raises one of `UNFIT` if a field does not fit."""
    events, links = span.events, span.links
    return b"".join(
        (
            _repeated(span.trace_id),
            text(span.span_id),
            _repeated(span.parent_id, span.trace_state),
            text(span.name),
            _repeated(span.kind, span.span_kind),
            long(span.start),
            long(span.end),
            _repeated(span.status),
            text(span.status_message) if span.status_message else _NULL,
            _map(span.attributes),
            b"".join([long(len(events)), *map(_event, events), _NULL]) if events else _NULL,
            b"".join([long(len(links)), *map(_link, links), _NULL]) if links else _NULL,
            _resource(span.resource),
            _repeated(span.scope_name, span.scope_version, span.rollout_id, span.attempt_id, span.source),
            long(span.sequence),
            _NULL if span.prompt_token_ids is None else _VALUE + binary(span.prompt_token_ids),
            _NULL if span.response_token_ids is None else _VALUE + binary(span.response_token_ids),
            _NULL if span.response_logprobs is None else _VALUE + binary(span.response_logprobs),
            _NULL if span.reward is None else _VALUE + _double(span.reward),
            _NULL if span.reward_name is None else _VALUE + text(span.reward_name),
            _NULL if span.model_version is None else _VALUE + text(span.model_version),
        )
    )


def long(value: int) -> bytes:
    """Zigzag, 7 bits a byte."""
    if not -(1 << 63) <= value < 1 << 63:
        raise OverflowError(f"{value} has more than 64 bits")
    return _varint(value << 1 ^ value >> 63)


def _varint(value: int) -> bytes:
    if value < 0x80:
        return _BYTES[value]
    if value < 0x4000:
        return bytes((value & 0x7F | 0x80, value >> 7))
    low = (value & 0x7F | 0x80, value >> 7 & 0x7F | 0x80)
    if value < 1 << 28:
        return bytes(low) + _varint(value >> 14)
    # A time: what is above its last quarter of a second comes again and again.
    return bytes((*low, value >> 14 & 0x7F | 0x80, value >> 21 & 0x7F | 0x80)) + _high_bits(value >> 28)


_BYTES = tuple(bytes((value,)) for value in range(0x80))
_LENGTHS = tuple(_varint(length << 1) for length in range(0x80))
_high_bits = lru_cache(maxsize=1 << 6)(_varint)


def binary(value: bytes) -> bytes:
    size = len(value)
    return (_LENGTHS[size] if size < 0x80 else _varint(size << 1)) + value


def text(value: str) -> bytes:
    return binary(value.encode())


@lru_cache(maxsize=1 << 12)
def _repeated(*values: str) -> bytes:
    """Short strings that repeat."""
    return b"".join(map(text, values))


def _map(values: Mapping[str, str]) -> bytes:
    if not values:
        return _NULL
    parts = [_varint(len(values) << 1)]
    for key, value in values.items():
        parts += (_repeated(key), text(value))
    parts.append(_NULL)
    return b"".join(parts)


_last_resource: tuple[Mapping[str, str], bytes] = ({}, _NULL)  # nearly always the same


def _resource(resource: Mapping[str, str]) -> bytes:
    global _last_resource
    last, encoded = _last_resource
    if last is not resource:
        encoded = _map(resource)
        _last_resource = (resource, encoded)
    return encoded


def _event(event: SpanEvent) -> bytes:
    return text(event.name) + long(event.time) + _map(event.attributes)


def _link(link: SpanLink) -> bytes:
    return text(link.trace_id) + text(link.span_id) + _map(link.attributes)
