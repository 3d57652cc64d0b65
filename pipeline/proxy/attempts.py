"""The attempts that call models here: their keys, how many calls each has made, and which are closed."""

import asyncio
import hmac
import time
from collections import OrderedDict
from collections.abc import Callable
from dataclasses import dataclass, field

from millstream.pipeline.proxy.limits import Limiter, limited
from millstream.schemas.attempt_keys import BadKey, claims_of
from millstream.schemas.config.upstreams import Limits


@dataclass(frozen=True, slots=True, kw_only=True)
class AttemptPolicy:
    """How long attempts are remembered, and how exact clocks are."""

    kept_s: float = 3600.0  # after its last call; longer than a call of it can be under way
    skew_s: float = 5.0  # by which a runner's clock may be behind this one's


@dataclass(slots=True)
class ProxiedAttempt:
    """One attempt, as this proxy knows it."""

    rollout_id: str
    attempt_id: str
    key: bytes  # the last one that was accepted
    expires: float  # s since the epoch
    issued: float
    resources_id: str = ""
    limiter: Limiter | None = None
    spans: int = 0
    in_flight: int = 0
    closed: bool = False
    touched: float = 0.0  # monotonic, s
    drained: asyncio.Event = field(default_factory=asyncio.Event)

    def enter(self) -> None:
        """A call begins."""
        self.in_flight += 1
        self.drained.clear()

    def leave(self) -> None:
        """A call has ended and is recorded."""
        self.in_flight -= 1
        self.touched = time.monotonic()
        if not self.in_flight:
            self.drained.set()


class Attempts:
    """Those that called within the last hour. ``shared_key`` is accepted for every attempt, unless it is empty."""

    def __init__(
        self,
        secret: str,
        *,
        shared_key: str = "",
        limits: Limits | None = None,
        policy: AttemptPolicy = AttemptPolicy(),
        clock: Callable[[], float] = time.time,
    ) -> None:
        self._secret = secret
        self._shared_key = shared_key.encode()
        self._limits = limits or Limits()
        self._policy = policy
        self._clock = clock
        self._started = clock()
        self._known: OrderedDict[str, ProxiedAttempt] = OrderedDict()  # least recently used first

    @property
    def in_flight(self) -> int:
        return sum(attempt.in_flight for attempt in self._known.values())

    def authorised(self, rollout_id: str, attempt_id: str, key: str) -> ProxiedAttempt:
        """Raises `BadKey`."""
        attempt = self._known.get(attempt_id)
        if attempt is None or attempt.rollout_id != rollout_id:
            attempt = self._new(rollout_id, attempt_id, key)
            self._known[attempt_id] = attempt
        elif not hmac.compare_digest(key.encode(), attempt.key) or attempt.expires < self._clock():
            other = self._new(rollout_id, attempt_id, key)
            attempt.key, attempt.expires = other.key, other.expires
        attempt.touched = time.monotonic()
        self._known.move_to_end(attempt_id)
        self._forget_old()
        return attempt

    def may_have_lost_calls(self, attempt: ProxiedAttempt) -> bool:
        """Whether it began before this proxy did, so that another process may have counted calls of it."""
        return attempt.issued < self._started - self._policy.skew_s

    def _new(self, rollout_id: str, attempt_id: str, key: str) -> ProxiedAttempt:
        limiter = Limiter(f"attempt {attempt_id}", self._limits) if limited(self._limits) else None
        if self._shared_key and hmac.compare_digest(key.encode(), self._shared_key):
            return ProxiedAttempt(rollout_id, attempt_id, key.encode(), float("inf"), self._clock(), limiter=limiter)
        if not key:
            raise BadKey(f"no API key was given; that of attempt {attempt_id} is needed")
        claims = claims_of(self._secret, rollout_id, attempt_id, key, now=self._clock())
        return ProxiedAttempt(
            rollout_id, attempt_id, key.encode(), claims.expires, claims.issued, claims.resources_id, limiter
        )

    def _forget_old(self) -> None:
        horizon = time.monotonic() - self._policy.kept_s
        while self._known:
            oldest = next(iter(self._known.values()))
            if oldest.in_flight or oldest.touched > horizon:
                return
            del self._known[oldest.attempt_id]
