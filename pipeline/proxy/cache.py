"""Whole answers that are given again to the same request. Pure."""

import hashlib
import time
from collections import OrderedDict
from collections.abc import Callable


class AnswerCache:
    """Keeps each answer for ``ttl_s``, and at most ``max_bytes`` of them; the oldest go first."""

    def __init__(self, ttl_s: float, max_bytes: int, clock: Callable[[], float] = time.monotonic) -> None:
        """``ttl_s`` 0: keeps nothing."""
        self._ttl_s = ttl_s
        self._max_bytes = max_bytes
        self._clock = clock
        self._kept: OrderedDict[bytes, tuple[float, bytes]] = OrderedDict()  # by key: expiry, answer; oldest first
        self.size = 0  # bytes

    @property
    def enabled(self) -> bool:
        return self._ttl_s > 0

    def get(self, key: bytes) -> bytes | None:
        expires, answer = self._kept.get(key, (0.0, b""))
        return answer if expires > self._clock() else None

    def put(self, key: bytes, answer: bytes) -> None:
        self._drop(key)
        self._kept[key] = (self._clock() + self._ttl_s, answer)
        self.size += len(answer)
        while self.size > self._max_bytes:
            self._drop(next(iter(self._kept)))

    def _drop(self, key: bytes) -> None:
        _, answer = self._kept.pop(key, (0.0, b""))
        self.size -= len(answer)


def cache_key(upstream: str, path: str, request: bytes) -> bytes:
    return hashlib.sha256(f"{path}\0{upstream}\0".encode() + request).digest()
