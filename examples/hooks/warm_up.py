"""Loads something once per process, before its first attempt: a model, an index, a connection."""

import threading
from collections.abc import Callable
from typing import Any, Generic, TypeVar

import millstream as ms

T = TypeVar("T")


class WarmUp(ms.Hook, Generic[T]):
    """The agent reads ``value``. If ``load`` fails, the next attempt calls it again. The time that ``load`` takes
    counts towards the attempt that waits for it."""

    timeout_s = 600.0

    def __init__(self, load: Callable[[], T]) -> None:
        super().__init__()
        self._load = load
        self._loaded: list[T] = []
        self._lock = threading.Lock()

    @property
    def value(self) -> T:
        with self._lock:
            if not self._loaded:
                self._loaded.append(self._load())
            return self._loaded[0]

    def on_rollout_start(self, agent: Any, runner: Any, rollout: Any) -> None:
        _ = self.value
