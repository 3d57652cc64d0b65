"""The replicas of a model server: which of them is asked, which is left alone for a while, and when to ask again.

A replica that fails `FAILURES` times in a row is left alone (a circuit breaker), for longer each time. A policy's
replica is back when its ``/health`` says so; any other when one call that tries it succeeds.
"""

import asyncio
import logging
import math
import random
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from email.utils import parsedate_to_datetime
from types import TracebackType
from typing import Any, Final

import orjson
from pydantic import SecretStr

from millstream.pipeline.proxy.http_client import Exchange, HttpError, Server
from millstream.schemas.config.upstreams import Upstream
from millstream.schemas.ids import rank

logger = logging.getLogger(__name__)

FAILURES: Final = 3
COOLDOWN_S: Final = 1.0  # of a replica that failed, doubled each time up to
MAX_COOLDOWN_S: Final = 30.0
HEALTH_S: Final = 2.0  # for an answer of /health
TRIES: Final = 6
BACKOFF_S: Final = 0.25  # doubled with each try, and of that a random part ("full jitter")
MAX_BACKOFF_S: Final = 8.0
RETRIED: Final = frozenset({408, 409, 425, 429, 500, 502, 503, 504, 529})
# A replica may have this much more than its share of the calls under way before another one takes a rollout's.
BOUND: Final = 1.25


class Failed(Exception):
    """A try that another one may make good; ``status`` and ``body`` are the server's, if it answered."""

    def __init__(
        self, message: str, *, status: int = 502, body: bytes = b"", retry_after_s: float = 0.0, broken: bool = True
    ) -> None:
        super().__init__(message)
        self.status = status
        self.body = body
        self.retry_after_s = retry_after_s
        self.broken = broken  # it speaks against the replica


@dataclass(eq=False)
class Replica:
    """One server."""

    url: str
    server: Server
    in_flight: int = 0
    failures: int = 0  # in a row
    cooldown_until: float = 0.0
    trying: bool = False  # one call finds out whether it is back

    def usable(self, now: float) -> bool:
        return self.failures < FAILURES or (now >= self.cooldown_until and not self.trying)


class Replicas:
    """Of one upstream. ``clock`` is monotonic, in seconds."""

    def __init__(
        self, name: str, upstream: Upstream, key: SecretStr, clock: Callable[[], float] = time.monotonic
    ) -> None:
        self.name = name
        self.upstream = upstream
        self.all = [Replica(url, Server(url, upstream.max_connections)) for url in upstream.urls]
        self.key = key
        self._clock = clock
        self._checks: dict[Replica, asyncio.Task[None]] = {}

    def close(self) -> None:
        for check in self._checks.values():
            check.cancel()
        for replica in self.all:
            replica.server.close()

    def pick(self, rollout_id: str, avoid: Sequence[Replica] = ()) -> Replica | None:
        """A rollout's calls go to the same replica, whose prefix cache knows its prompts, unless that has more than its
        share (consistent hashing with bounded loads: Mirrokni et al. 2018). None if all of them rest."""
        now = self._clock()
        usable = [replica for replica in self.all if replica.usable(now)]
        usable = [replica for replica in usable if replica not in avoid] or usable
        if len(usable) < 2:
            return usable[0] if usable else None
        most = math.ceil(BOUND * (sum(replica.in_flight for replica in usable) + 1) / len(usable))
        fitting = [replica for replica in usable if replica.in_flight < most] or usable
        return max(fitting, key=lambda replica: rank(rollout_id, replica.url))

    def tries(self, rollout_id: str, deadline: float) -> "Tries":
        return Tries(self, rollout_id, deadline, self._clock)

    def cooldown_left_s(self) -> float:
        """Until a replica may be tried again; all of them rest."""
        if self.upstream.trainable:  # its health is looked at
            return COOLDOWN_S
        return max(0.0, min(replica.cooldown_until for replica in self.all) - self._clock())

    def post(self, replica: Replica, path: str, body: bytes, headers: dict[str, str], deadline: float) -> "Post":
        exchange = replica.server.request("POST", path, headers, body)
        return Post(self.name, replica, exchange, max(0.0, deadline - self._clock()))

    async def get(self, path: str, timeout_s: float) -> Any:
        """JSON of the first replica that can be used. Raises `Failed`."""
        replica = self.pick("")
        if replica is None:
            raise Failed(f"{self.name} does not answer")
        try:
            async with (
                asyncio.timeout(timeout_s),
                replica.server.request("GET", path, self.authorization()) as answer,
            ):
                text = await answer.read()
                if answer.status != 200:
                    raise Failed(f"{self.name} answered {answer.status} to {path}")
                return orjson.loads(text)
        except (HttpError, TimeoutError, orjson.JSONDecodeError) as error:
            what = str(error) or type(error).__name__
            raise Failed(f"{self.name} can't be asked for {path}: {what}") from error

    def authorization(self) -> dict[str, str]:
        key = self.key.get_secret_value()
        if not key:
            return {}
        return {"x-api-key": key} if self.upstream.kind == "anthropic" else {"Authorization": f"Bearer {key}"}

    def failed(self, replica: Replica, error: Failed) -> None:
        if not error.broken:
            return
        replica.failures += 1
        if replica.failures < FAILURES:
            return
        cooldown = min(MAX_COOLDOWN_S, COOLDOWN_S * 2 ** (replica.failures - FAILURES))
        replica.cooldown_until = self._clock() + cooldown
        logger.warning("replica %s of %s is not used for %.0f s: %s", replica.url, self.name, cooldown, error)
        if self.upstream.trainable and replica not in self._checks:
            check = asyncio.create_task(self._until_healthy(replica))
            self._checks[replica] = check
            check.add_done_callback(lambda _: self._checks.pop(replica, None))

    def succeeded(self, replica: Replica) -> None:
        replica.failures = 0

    async def _until_healthy(self, replica: Replica) -> None:
        while replica.failures >= FAILURES:
            await asyncio.sleep(COOLDOWN_S)
            try:
                async with asyncio.timeout(HEALTH_S), replica.server.request("GET", "/health", {}) as answer:
                    if answer.status == 200:
                        self.succeeded(replica)
                        logger.info("replica %s of %s is back", replica.url, self.name)
            except (HttpError, TimeoutError):
                pass


class Post:
    """``async with`` it: a request to a replica, and the head of its answer, of whatever status. Raises `Failed` if the
    server can't be reached, breaks off, takes too long, or answers with a status that is tried again.

    No generator: each call comes through here."""

    def __init__(self, name: str, replica: Replica, exchange: Exchange, timeout_s: float) -> None:
        self._name = name
        self._replica = replica
        self._exchange = exchange
        self._timeout = asyncio.timeout(timeout_s)

    async def __aenter__(self) -> Exchange:
        self._replica.in_flight += 1
        self._replica.trying = self._replica.failures >= FAILURES
        await self._timeout.__aenter__()
        try:
            answer = await self._exchange.__aenter__()
            if answer.status in RETRIED:
                raise Failed(
                    f"{self._name} answered {answer.status}",
                    status=answer.status,
                    body=(await answer.read())[: 64 << 10],
                    retry_after_s=retry_after_s(answer.headers.get("retry-after", "")),
                    broken=answer.status >= 500,
                )
        except BaseException as error:
            await self.__aexit__(type(error), error, error.__traceback__)
            raise
        return answer

    async def __aexit__(
        self, kind: type[BaseException] | None, error: BaseException | None, traceback: TracebackType | None
    ) -> None:
        self._replica.in_flight -= 1
        self._replica.trying = False
        await self._exchange.__aexit__(kind, error, traceback)
        try:
            await self._timeout.__aexit__(kind, error, traceback)
        except TimeoutError as late:
            raise Failed(f"{self._name} did not answer in time", status=504, broken=False) from late
        if isinstance(error, HttpError):
            raise Failed(f"{self._name} can't be reached, or broke off: {error}") from error


class Tries:
    """One call's way through the replicas, with a pause between two tries."""

    def __init__(self, replicas: Replicas, rollout_id: str, deadline: float, clock: Callable[[], float]) -> None:
        self._replicas = replicas
        self._last: Failed | None = None
        self._rollout_id = rollout_id
        self._deadline = deadline
        self._clock = clock
        self._number = 0
        self._pause_s = 0.0  # before the next one, at least
        self._replica: Replica | None = None

    @property
    def last(self) -> Failed:
        """What went wrong last."""
        return self._last or Failed(f"no replica of {self._replicas.name} can be reached", status=503)

    async def next(self) -> Replica | None:
        """The replica to try now; None when there have been enough tries, or no time is left."""
        while self._number < TRIES:
            if self._number:
                backoff = min(MAX_BACKOFF_S, BACKOFF_S * 2 ** (self._number - 1))
                pause = max(self._pause_s, random.uniform(0, backoff))  # noqa: S311 - a jitter
                if self._clock() + pause > self._deadline:
                    return None
                await asyncio.sleep(pause)
            self._number += 1
            avoid = () if self._replica is None else (self._replica,)
            self._replica = self._replicas.pick(self._rollout_id, avoid)
            if self._replica is not None:
                return self._replica
            self._pause_s = self._replicas.cooldown_left_s()
        return None

    def failed(self, error: Failed) -> None:
        """The replica given last has failed."""
        self._last, self._pause_s = error, error.retry_after_s
        assert self._replica is not None
        self._replicas.failed(self._replica, error)

    def succeeded(self) -> None:
        assert self._replica is not None
        self._replicas.succeeded(self._replica)


def retry_after_s(header: str) -> float:
    """Seconds that a ``Retry-After`` asks for, given as a number or a date (RFC 9110, section 10.2.3); 0 if it is
    neither."""
    try:
        return max(0.0, float(header))
    except ValueError:
        pass
    try:
        return max(0.0, parsedate_to_datetime(header).timestamp() - time.time())
    except (TypeError, ValueError):
        return 0.0
