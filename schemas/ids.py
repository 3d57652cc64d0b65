"""UUIDv7 (RFC 9562, section 5.7): ids that sort by time and contain it."""

import hashlib
import os
import time
import uuid
from collections.abc import Iterable
from typing import Final

LEAST_OF_AN_ID: Final = 4  # characters that may stand for a whole id
CLOCK_SKEW_MS: Final = 60_000  # by which the clock of a record's writer may be behind that of the id's


def _uuid7(ms: int, rest: int) -> str:
    value = (ms & (1 << 48) - 1) << 80 | rest & (1 << 80) - 1
    value = value & ~(0xF << 76) | 7 << 76  # version
    value = value & ~(0x3 << 62) | 2 << 62  # variant
    return str(uuid.UUID(int=value))


def new_id() -> str:
    """A new id: 48 bits of time in ms, 74 random bits."""
    return _uuid7(time.time_ns() // 1_000_000, int.from_bytes(os.urandom(10), "big"))


def derived_id(time_ns: int, *parts: object) -> str:
    """An id that is always the same for the same time and parts, so that a second publication is recognised."""
    digest = hashlib.blake2b("\x1f".join(map(str, parts)).encode(), digest_size=10).digest()
    return _uuid7(time_ns // 1_000_000, int.from_bytes(digest, "big"))


def rank(*parts: str) -> int:
    """64 pseudo-random bits, always the same for the same parts: for traffic shares and rendezvous hashing."""
    digest = hashlib.blake2b("\x1f".join(parts).encode(), digest_size=8).digest()
    return int.from_bytes(digest, "big")


def derived_seed(seed: int, number: int) -> int:
    """A seed of 63 bits, always the same for the same seed and number: for one model call of a rollout, say."""
    return rank("seed", str(seed), str(number)) >> 1


def id_time_ms(value: str) -> int:
    """The time in a UUIDv7, in ms since the epoch. Raises ValueError for any other id."""
    parsed = uuid.UUID(value)
    if parsed.version != 7:
        raise ValueError(f"{value!r} is not a UUIDv7")
    return parsed.int >> 80


def written_since_ms(value: str) -> int:
    """No record that has this id is older, in ms since the epoch; 0 for an id without a time."""
    try:
        return max(0, id_time_ms(value) - CLOCK_SKEW_MS)
    except ValueError:
        return 0


def matching_ids(wanted: str, ids: Iterable[str]) -> list[str]:
    """Those that are ``wanted``, or else begin or end with it."""
    found = sorted(set(ids))
    return [wanted] if wanted in found else [one for one in found if one.startswith(wanted) or one.endswith(wanted)]
