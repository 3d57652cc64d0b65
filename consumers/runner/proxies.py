"""A runner's client of the LLM proxies: chooses an attempt's proxy, creates its key, and closes it there."""

import time
from collections.abc import Sequence
from dataclasses import dataclass

import aiohttp

from millstream.consumers.runner.claims import Claim
from millstream.schemas.attempt_keys import attempt_key, attempt_path
from millstream.schemas.control import LLM
from millstream.schemas.errors import MillstreamError
from millstream.schemas.ids import rank


@dataclass(frozen=True, slots=True)
class ProxiesPolicy:
    close_s: float = 30.0  # for an attempt's last calls to end
    avoid_s: float = 10.0  # a proxy that failed to close an attempt gets no new ones for so long


class ProxyNotClosed(MillstreamError):
    """The proxy did not report how many calls an attempt made. The message names its address."""


class Proxies:
    """An attempt stays with one proxy, which counts its calls."""

    def __init__(self, urls: Sequence[str], secret: str, policy: ProxiesPolicy = ProxiesPolicy()) -> None:
        """``urls`` are used unless an attempt's resources name others. Without any, there is no proxy."""
        self._policy = policy
        self._urls = urls
        self._secret = secret
        self._avoided: dict[str, float] = {}  # URL → until when
        self._http: aiohttp.ClientSession | None = None

    def choose(self, claim: Claim) -> str:
        """The attempt's proxy (rendezvous hashing over its id); empty if there is none."""
        items = claim.resources.items.values() if claim.resources is not None else ()
        urls = next((item.endpoints for item in items if isinstance(item, LLM) and item.endpoints), self._urls)
        now = time.monotonic()
        urls = [url for url in urls if self._avoided.get(url, 0.0) < now] or urls
        return max(urls, key=lambda url: rank(claim.attempt_id, url), default="")

    def key(self, claim: Claim) -> str:
        """The attempt's key at the proxy, valid for as long as it may run."""
        task = claim.task
        resources_id = claim.resources.resources_id if claim.resources is not None else ""
        return attempt_key(
            self._secret, task.rollout_id, claim.attempt_id, valid_s=task.timeout_s, resources_id=resources_id
        )

    async def close_attempt(self, claim: Claim, url: str, key: str) -> int:
        """Ends the attempt at the proxy. Returns how many model calls it made. Idempotent. Raises `ProxyNotClosed`."""
        if self._http is None:
            self._http = aiohttp.ClientSession(timeout=aiohttp.ClientTimeout(total=self._policy.close_s))
        address = url.rstrip("/") + attempt_path(claim.task.rollout_id, claim.attempt_id) + "/close"
        for last in (False, True):
            try:
                async with self._http.post(address, headers={"Authorization": f"Bearer {key}"}) as response:
                    if response.status != 200:
                        raise ValueError(f"{response.status} {(await response.text())[:200]}")
                    return int((await response.json())["spans"])
            except (aiohttp.ClientError, TimeoutError, ValueError) as error:
                if isinstance(error, aiohttp.ClientConnectionError) and not last:
                    continue  # a kept-alive connection that the proxy has closed
                self._avoided[url] = time.monotonic() + self._policy.avoid_s
                cause = str(error) or type(error).__name__
                raise ProxyNotClosed(f"it could not be closed at the proxy {url}: {cause}") from error
        raise AssertionError("unreachable")

    async def close(self) -> None:
        if self._http is not None:
            await self._http.close()
