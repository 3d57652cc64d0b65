"""A runner's client of the LLM proxies: which of them answer, an attempt's proxy, its key, and its closing there."""

import asyncio
import logging
import math
import time
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from typing import Final, NamedTuple

import aiohttp

from millstream.consumers.runner.claims import Claim
from millstream.consumers.runner.outcome import Outcome, stopped_by
from millstream.producers.supervisor import Background, supervisor
from millstream.schemas.attempt_keys import attempt_key, attempt_path
from millstream.schemas.control import LLM, Resources
from millstream.schemas.errors import MillstreamError
from millstream.schemas.ids import rank
from millstream.schemas.wire import status

logger = logging.getLogger(__name__)

_NO_PROXY: Final = (502, 503, 504)  # of a load balancer whose proxies are away, and of a proxy that can't work


@dataclass(frozen=True, slots=True)
class ProxiesPolicy:
    close_s: float = 30.0  # for an attempt's last calls to end
    probe_s: float = 2.0  # an answer counts for so long; then the proxy is asked again
    answer_s: float = 3.0  # for a proxy to answer a probe; a busy one may need one of them


class ProxyNotClosed(MillstreamError):
    """The proxy did not report how many calls an attempt made. The message names its address. ``cause``: the type of
    the error that the attempt ends with."""

    def __init__(self, message: str, cause: str) -> None:
        super().__init__(message)
        self.cause = cause


class Calls(NamedTuple):
    """The model calls of an attempt."""

    made: int
    cancelled: int  # of these, still under way when the agent had ended

    def outcome(self, outcome: Outcome) -> Outcome:
        """The attempt's outcome. An agent that returns while it calls a model has failed: its trace ends within a call,
        and how far that got depends on chance."""
        if not self.cancelled or outcome.status != status.SUCCEEDED:
            return outcome
        message = f"the agent returned with {self.cancelled} model calls under way, which were cancelled: await them"
        return stopped_by(status.FAILED, "unfinished_calls", message)


class Proxies:
    """An attempt stays with one proxy, which counts its calls. One that has not answered gets no new attempts until it
    answers a probe."""

    def __init__(self, urls: Sequence[str], secret: str, policy: ProxiesPolicy = ProxiesPolicy()) -> None:
        """``urls`` are used unless an attempt's resources name others. Without any, there is no proxy."""
        self._policy = policy
        self._urls = urls
        self._secret = secret
        self._answered: dict[str, float] = {}  # URL → when it answered last; none if it has not when last asked
        self._asked: dict[str, float] = {}  # URL → when
        self._probes: dict[str, Background] = {}
        self._causes: dict[str, str] = {}  # URL → why it did not answer
        self._away_since: float | None = None
        self._known_until = 0.0  # no need to look before
        self._http: aiohttp.ClientSession | None = None

    @property
    def away_s(self) -> float:
        """How long no proxy has answered."""
        since = self._away_since  # read once: other threads call this
        return 0.0 if since is None else time.monotonic() - since

    @property
    def trouble(self) -> str | None:
        """Why no attempt can begin; None if it can."""
        if self._away_since is None:
            return None
        causes = "; ".join(f"{url}: {cause}" for url, cause in list(self._causes.items()))
        return f"no proxy answers, so no task is claimed ({causes or 'not asked yet'}): start it, or set proxy_url"

    async def available(self, resources: Iterable[Resources] = ()) -> bool:
        """Whether new attempts may begin: some proxy answers, or there is none to ask. Returns within ``answer_s``.
        ``resources``: the versions that new attempts may run with."""
        now = time.monotonic()
        if now < self._known_until and self._answered:
            return True
        urls = {*self._urls, *(url for each in resources for url in _endpoints(each))}
        if not urls:
            return True
        for url in urls:
            if now - max(self._answered.get(url, -math.inf), self._asked.get(url, -math.inf)) > self._policy.probe_s:
                self._asked[url] = now
                probe = self._probes[url] = supervisor().job(f"probe of {url}", self._probe(url))
                probe.task.add_done_callback(lambda _, url=url: self._probes.pop(url, None))  # type: ignore[misc]
        pending = {probe.task for probe in self._probes.values()}
        while pending and not any(url in self._answered for url in urls):
            _, pending = await asyncio.wait(pending, return_when=asyncio.FIRST_COMPLETED)
        if any(url in self._answered for url in urls):
            if self._away_since is not None:
                logger.info("a proxy answers again after %.1f s: tasks are claimed", self.away_s)
            self._away_since, self._known_until = None, now + self._policy.probe_s
            return True
        if self._away_since is None:
            self._away_since = now
            logger.warning("%s", self.trouble)
        return False

    def choose(self, claim: Claim) -> str:
        """The attempt's proxy (rendezvous hashing over its id); empty if there is none."""
        urls = _endpoints(claim.resources) or self._urls
        urls = [url for url in urls if url in self._answered] or urls
        return max(urls, key=lambda url: rank(claim.attempt_id, url), default="")

    def key(self, claim: Claim) -> str:
        """The attempt's key at the proxy, valid for as long as it may run."""
        task = claim.task
        resources_id = claim.resources.resources_id if claim.resources is not None else ""
        return attempt_key(
            self._secret,
            task.rollout_id,
            claim.attempt_id,
            valid_s=task.timeout_s,
            resources_id=resources_id,
            seed=task.seed,
        )

    async def close_attempt(self, claim: Claim, url: str, key: str) -> Calls:
        """Ends the attempt at the proxy, and calls that it did not wait for. Idempotent. Raises `ProxyNotClosed`."""
        address = url.rstrip("/") + attempt_path(claim.task.rollout_id, claim.attempt_id) + "/close"
        headers = {"Authorization": f"Bearer {key}"}
        for last in (False, True):
            cause = "proxy"
            try:
                async with self._session.post(address, headers=headers) as response:
                    if response.status in _NO_PROXY:
                        cause = status.PROXY_AWAY
                    if response.status != 200:
                        raise ValueError(f"{response.status} {(await response.text())[:200]}")
                    answer = await response.json()
                    calls = Calls(int(answer["spans"]), int(answer.get("cancelled", 0)))
                    self._answered[url] = time.monotonic()
                    return calls
            except (aiohttp.ClientError, TimeoutError, ValueError, LookupError, TypeError) as error:
                if isinstance(error, aiohttp.ClientConnectionError):
                    if not last:
                        continue  # a kept-alive connection that the proxy has closed
                    cause = status.PROXY_AWAY
                self._failed(url, error)
                text = str(error) or type(error).__name__
                raise ProxyNotClosed(f"it could not be closed at the proxy {url}: {text}", cause) from error
        raise AssertionError("unreachable")

    async def close(self) -> None:
        for probe in self._probes.values():
            probe.cancel()
        if self._http is not None:
            await self._http.close()

    @property
    def _session(self) -> aiohttp.ClientSession:
        if self._http is None:
            self._http = aiohttp.ClientSession(timeout=aiohttp.ClientTimeout(total=self._policy.close_s))
        return self._http

    async def _probe(self, url: str) -> None:
        timeout = aiohttp.ClientTimeout(total=self._policy.answer_s)
        try:
            async with self._session.get(url.rstrip("/") + "/livez", timeout=timeout) as response:
                if response.status in _NO_PROXY:
                    raise ValueError(str(response.status))
        except (aiohttp.ClientError, TimeoutError, ValueError) as error:
            self._failed(url, error)
        else:
            self._answered[url] = time.monotonic()
            self._causes.pop(url, None)

    def _failed(self, url: str, error: Exception) -> None:
        self._answered.pop(url, None)
        self._causes[url] = str(error) or type(error).__name__


def _endpoints(resources: Resources | None) -> Sequence[str]:
    """The proxies that a resources version names."""
    items = resources.items.values() if resources is not None else ()
    return next((item.endpoints for item in items if isinstance(item, LLM) and item.endpoints), ())
