"""The attempts that call models here: their keys, how many calls each has made, and which are closed."""

import asyncio
import heapq
import hmac
import math
import time
from collections import OrderedDict
from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any

from millstream.pipeline.proxy.limits import Limiter, limited
from millstream.schemas.attempt_keys import BadKey, claims_of
from millstream.schemas.config.upstreams import Limits
from millstream.schemas.ids import derived_seed


@dataclass(frozen=True, slots=True, kw_only=True)
class AttemptPolicy:
    """How long attempts are remembered, and how exact clocks are."""

    kept_s: float = 3600.0  # after its last call, even if its key has expired: it may be closed late
    # After its agent has returned, for its last calls to end. An answer that the agent has read ends at once; a longer
    # one is a call that it did not wait for.
    last_calls_s: float = 2.0
    skew_s: float = 5.0  # by which a runner's clock may be behind this one's


@dataclass(slots=True)
class Load:
    """Calls under way. An object of its own, so that any thread may read it."""

    calls: int = 0


class CallSeeds:
    """Seeds for an attempt's model calls, derived from that of its task and numbered in the order in which the calls
    arrive. A call that fails returns its number, so that the call which repeats it has the same seed, and those behind
    it have theirs."""

    def __init__(self, seed: int) -> None:
        self._seed = seed
        self._begun = 0
        self._returned: list[int] = []  # a heap

    def take(self) -> int:
        """The number of a call that begins, from 1: the smallest that no other call has."""
        if self._returned:
            return heapq.heappop(self._returned)
        self._begun += 1
        return self._begun

    def give_back(self, number: int) -> None:
        heapq.heappush(self._returned, number)

    def seed(self, number: int) -> int:
        """63 bits."""
        return derived_seed(self._seed, number)


@dataclass(slots=True)
class ProxiedAttempt:
    """One attempt, as this proxy knows it. Times are monotonic, in seconds."""

    rollout_id: str
    attempt_id: str
    key: bytes  # the last one that was accepted
    expires: float
    issued: float
    load: Load
    resources_id: str = ""
    limiter: Limiter | None = None
    seeds: CallSeeds | None = None  # None for a task without a seed
    spans: int = 0
    in_flight: int = 0
    closed: bool = False
    touched: float = 0.0
    asking: set["asyncio.Task[Any]"] = field(default_factory=set)  # calls that are not recorded yet
    drained: asyncio.Event = field(default_factory=asyncio.Event)

    def enter(self) -> None:
        """A call begins."""
        self.in_flight += 1
        self.load.calls += 1
        self.drained.clear()

    def cancel_calls(self) -> int:
        """Ends the calls that are not recorded yet; each is recorded as aborted. Returns how many there were."""
        calls = tuple(self.asking)
        for call in calls:
            call.cancel()
        return len(calls)

    def leave(self) -> None:
        """A call has ended and is recorded."""
        self.in_flight -= 1
        self.load.calls -= 1
        self.touched = time.monotonic()
        if not self.in_flight:
            self.drained.set()


class Attempts:
    """Those whose key is valid, or that called within the last hour. ``shared_key`` is accepted for every attempt,
    unless it is empty.

    Keys hold times of a runner's clock (``clock``, s since the epoch). They are converted when a key is first seen;
    from then on ``monotonic`` counts, so that a clock which is put forward or back changes nothing."""

    def __init__(
        self,
        secret: str,
        *,
        shared_key: str = "",
        limits: Limits | None = None,
        policy: AttemptPolicy = AttemptPolicy(),
        clock: Callable[[], float] = time.time,
        monotonic: Callable[[], float] = time.monotonic,
    ) -> None:
        self._secret = secret
        self._shared_key = shared_key.encode()
        self._limits = limits or Limits()
        self._policy = policy
        self._clock = clock
        self._monotonic = monotonic
        self._started = monotonic()
        self._known: OrderedDict[str, ProxiedAttempt] = OrderedDict()
        self._load = Load()

    @property
    def in_flight(self) -> int:
        """Any thread may ask."""
        return self._load.calls

    def __len__(self) -> int:
        return len(self._known)

    def authorised(self, rollout_id: str, attempt_id: str, key: str) -> ProxiedAttempt:
        """Raises `BadKey`."""
        now = self._monotonic()
        attempt = self._known.get(attempt_id)
        if attempt is None or attempt.rollout_id != rollout_id:
            attempt = self._new(rollout_id, attempt_id, key, now)
            self._known[attempt_id] = attempt
        elif not hmac.compare_digest(key.encode(), attempt.key) or attempt.expires < now:
            other = self._new(rollout_id, attempt_id, key, now)
            attempt.key, attempt.expires = other.key, other.expires
        attempt.touched = now
        self._forget_old(now)
        return attempt

    def may_have_lost_calls(self, attempt: ProxiedAttempt) -> bool:
        """Whether it began before this proxy did, so that another process may have counted calls of it."""
        return attempt.issued < self._started - self._policy.skew_s

    def _new(self, rollout_id: str, attempt_id: str, key: str, now: float) -> ProxiedAttempt:
        limiter = Limiter(f"attempt {attempt_id}", self._limits) if limited(self._limits) else None
        if self._shared_key and hmac.compare_digest(key.encode(), self._shared_key):
            return ProxiedAttempt(rollout_id, attempt_id, key.encode(), math.inf, now, self._load, limiter=limiter)
        if not key:
            raise BadKey(f"no API key was given; that of attempt {attempt_id} is needed")
        clock = self._clock()
        claims = claims_of(self._secret, rollout_id, attempt_id, key, now=clock)
        expires, issued = now + claims.expires - clock, now + claims.issued - clock
        seeds = None if claims.seed is None else CallSeeds(claims.seed)
        return ProxiedAttempt(
            rollout_id, attempt_id, key.encode(), expires, issued, self._load, claims.resources_id, limiter, seeds
        )

    def _forget_old(self, now: float) -> None:
        """Looks at two attempts in turn, which keeps pace with those that come. As long as a key is valid, its attempt
        stays closed, counted and limited."""
        for _ in range(2):
            attempt_id, attempt = next(iter(self._known.items()))
            valid = attempt.expires > now and attempt.expires < math.inf
            if attempt.in_flight or valid or attempt.touched > now - self._policy.kept_s:
                self._known.move_to_end(attempt_id)
            else:
                del self._known[attempt_id]
            if not self._known:
                return
