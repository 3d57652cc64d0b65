"""The replicas of a model server: which one is asked, and which one is left alone for a while.

A replica that fails several times in a row is left alone (a circuit breaker). A policy's replica is back when its
``/health`` answers; any other when one call that tries it succeeds, after a pause that grows. While a policy has no
replica, its calls wait: a trainer that was killed, or a vLLM, is started again within minutes.
"""

import asyncio
import logging
import math
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from email.utils import parsedate_to_datetime
from types import TracebackType
from typing import Any, Final

import orjson
from pydantic import SecretStr

from millstream.pipeline.proxy.upstreams.http_client import ConnectionPolicy, Exchange, HttpError, Server
from millstream.producers.supervisor import Background, supervisor
from millstream.schemas.config.upstreams import Upstream
from millstream.schemas.ids import rank

logger = logging.getLogger(__name__)

RETRIED: Final = frozenset({408, 409, 425, 429, 500, 502, 503, 504, 529})  # statuses that may pass
MAX_ERROR_BODY: Final = 64 << 10  # bytes of a retried status's body that are kept for the client


@dataclass(frozen=True, slots=True, kw_only=True)
class ReplicaPolicy:
    """When a replica is left alone, and how often and how soon a call is retried."""

    failures: int = 3  # in a row, then the replica is left alone
    cooldown_s: float = 1.0  # of such a replica, doubled with each further failure
    max_cooldown_s: float = 30.0  # so that a server that is back is found within half a minute
    health_s: float = 2.0  # for an answer of /health, which takes milliseconds
    away_s: float = 180.0  # for which calls wait while a policy has no replica; vLLM loads a model in a minute or two
    tries: int = 6  # of a call; the pauses between them add up to 8 s at most
    backoff_s: float = 0.25  # doubled with each try, and of that a random part ("full jitter")
    max_backoff_s: float = 8.0
    load_bound: float = 1.25  # a replica's share of the calls under way, until another one takes a rollout's
    connections: ConnectionPolicy = field(default_factory=ConnectionPolicy)


class Failed(Exception):
    """A try that failed and may succeed when repeated; ``status`` and ``body`` are the server's, if it answered."""

    def __init__(
        self,
        message: str,
        *,
        status: int = 502,
        body: bytes = b"",
        headers: Mapping[str, str] | None = None,
        broken: bool = True,
    ) -> None:
        super().__init__(message)
        self.status = status
        self.body = body
        self.headers = headers or {}
        self.retry_after_s = retry_after_s(self.headers.get("retry-after", ""))
        self.broken = broken  # this speaks against the replica


@dataclass(eq=False)
class Replica:
    """One server."""

    url: str
    server: Server
    max_failures: int
    checked: bool = False  # its health tells when it is back
    in_flight: int = 0
    failures: int = 0  # in a row
    cooldown_until: float = 0.0
    trying: bool = False  # one call finds out whether it is back

    @property
    def down(self) -> bool:
        return self.failures >= self.max_failures

    def usable(self, now: float) -> bool:
        return not self.down or not (self.checked or self.trying or now < self.cooldown_until)


class Replicas:
    """Those of one upstream. ``clock`` is monotonic, in seconds."""

    def __init__(
        self,
        name: str,
        upstream: Upstream,
        key: SecretStr,
        policy: ReplicaPolicy = ReplicaPolicy(),
        clock: Callable[[], float] = time.monotonic,
    ) -> None:
        self.name = name
        self.upstream = upstream
        self.policy = policy
        servers = (Server(url, upstream.max_connections, policy.connections) for url in upstream.urls)
        self.all = [
            Replica(url, server, policy.failures, upstream.trainable)
            for url, server in zip(upstream.urls, servers, strict=True)
        ]
        self.key = key
        self.clock = clock
        self._checks: dict[Replica, Background] = {}
        self._supervisor = supervisor()

    def close(self) -> None:
        for check in self._checks.values():
            check.cancel()
        for replica in self.all:
            replica.server.close()

    def pick(self, rollout_id: str, avoid: Sequence[Replica] = ()) -> Replica | None:
        """A rollout's calls go to the same replica, whose prefix cache knows its prompts, unless that has more than its
        share (consistent hashing with bounded loads: Mirrokni et al. 2018). None if all of them are left alone."""
        now = self.clock()
        usable = [replica for replica in self.all if replica.usable(now)]
        usable = [replica for replica in usable if replica not in avoid] or usable
        if len(usable) < 2:
            return usable[0] if usable else None
        most = math.ceil(self.policy.load_bound * (sum(replica.in_flight for replica in usable) + 1) / len(usable))
        fitting = [replica for replica in usable if replica.in_flight < most] or usable
        return max(fitting, key=lambda replica: rank(rollout_id, replica.url))

    def cooldown_left_s(self) -> float:
        """Until a replica may be tried again, when all are left alone."""
        return max(0.0, min(replica.cooldown_until for replica in self.all) - self.clock())

    async def wait_for_one(self, deadline: float) -> bool:
        """Whether a call may try: False if none whose health is checked is back in time."""
        deadline = min(deadline, self.clock() + self.policy.away_s)
        while all(replica.checked and replica.down for replica in self.all):
            if self.clock() + self.policy.cooldown_s > deadline:
                return False
            await asyncio.sleep(self.policy.cooldown_s)
        return True

    def post(self, replica: Replica, path: str, body: bytes, headers: dict[str, str], deadline: float) -> "Post":
        exchange = replica.server.request("POST", path, headers, body)
        return Post(self.name, replica, exchange, max(0.0, deadline - self.clock()))

    async def context_length(self, replica: Replica, model: str, headers: dict[str, str], deadline: float) -> int:
        """Tokens of prompt and answer together that a vLLM allows a model. Raises `Failed`."""
        body = orjson.dumps({"model": model, "prompt": ""})
        async with self.post(replica, "/tokenize", body, headers, deadline) as answer:
            text = await answer.read()
        try:
            return int(orjson.loads(text)["max_model_len"])
        except (ValueError, KeyError, TypeError) as error:
            raise Failed(f"{self.name} does not say how many tokens {model} can have", broken=False) from error

    async def get(self, path: str, timeout_s: float) -> Any:
        """JSON of the first usable replica. Raises `Failed`."""
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
        if not replica.down:
            return
        policy = self.policy
        cooldown = min(policy.max_cooldown_s, policy.cooldown_s * 2 ** (replica.failures - policy.failures))
        replica.cooldown_until = self.clock() + cooldown
        if not replica.checked:
            logger.warning("replica %s of %s is not used for %.0f s: %s", replica.url, self.name, cooldown, error)
        elif replica not in self._checks:
            logger.warning("replica %s of %s is not used until its /health answers: %s", replica.url, self.name, error)
            check = self._supervisor.job(f"check of {replica.url}", self._until_healthy(replica))
            self._checks[replica] = check
            check.task.add_done_callback(lambda _: self._checks.pop(replica, None))

    def succeeded(self, replica: Replica) -> None:
        replica.failures = 0

    async def _until_healthy(self, replica: Replica) -> None:
        while replica.down:
            await asyncio.sleep(self.policy.cooldown_s)
            try:
                async with (
                    asyncio.timeout(self.policy.health_s),
                    replica.server.request("GET", "/health", {}) as answer,
                ):
                    if answer.status < 500:  # a server may have no such path
                        self.succeeded(replica)
                        logger.info("replica %s of %s is back", replica.url, self.name)
            except (HttpError, TimeoutError):
                pass


class Post:
    """``async with`` it: a request to a replica, and the head of its answer, whatever the status. Raises `Failed` if
    the server can't be reached, breaks off, takes too long, or answers with a status that is retried.

    A class and not a generator, because each call comes through here."""

    def __init__(self, name: str, replica: Replica, exchange: Exchange, timeout_s: float) -> None:
        self._name = name
        self._replica = replica
        self._exchange = exchange
        self._timeout = asyncio.timeout(timeout_s)

    async def __aenter__(self) -> Exchange:
        self._replica.in_flight += 1
        self._replica.trying = self._replica.down
        await self._timeout.__aenter__()
        try:
            answer = await self._exchange.__aenter__()
            if answer.status in RETRIED:
                raise Failed(
                    f"{self._name} answered {answer.status}",
                    status=answer.status,
                    body=(await answer.read())[:MAX_ERROR_BODY],
                    headers=answer.headers,
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


def retry_after_s(header: str) -> float:
    """Seconds that a ``Retry-After`` asks for, given as a number or a date (RFC 9110, section 10.2.3); 0 if it is
    neither."""
    if not header:
        return 0.0
    try:
        seconds = float(header)
    except ValueError:
        try:
            seconds = parsedate_to_datetime(header).timestamp() - time.time()
        except (TypeError, ValueError, IndexError, OverflowError):
            return 0.0
    return max(0.0, seconds) if math.isfinite(seconds) else 0.0
