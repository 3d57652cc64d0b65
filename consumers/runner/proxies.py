"""A runner's side of the LLM proxies: which one an attempt calls, with which key, and that it is closed there."""

import time
from collections.abc import Sequence
from typing import Final

import aiohttp

from millstream.consumers.runner.claims import Claim
from millstream.schemas.attempt_keys import attempt_key, attempt_path
from millstream.schemas.control import LLM
from millstream.schemas.errors import MillstreamError
from millstream.schemas.ids import rank

CLOSE_S: Final = 30.0  # to let an attempt's last calls end
AVOIDED_S: Final = 10.0  # a proxy at which an attempt could not be closed gets no new ones for so long


class ProxyNotClosed(MillstreamError):
    """The proxy did not say how many calls there were; names its address."""


class Proxies:
    """Of one runner. An attempt stays with one proxy, which counts its calls."""

    def __init__(self, urls: Sequence[str], secret: str) -> None:
        """``urls`` hold unless an attempt's resources name others. None at all: there is no proxy."""
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
        """What the attempt shows there; good for as long as it may run."""
        task = claim.task
        resources_id = claim.resources.resources_id if claim.resources is not None else ""
        return attempt_key(
            self._secret, task.rollout_id, claim.attempt_id, valid_s=task.timeout_s, resources_id=resources_id
        )

    async def close_attempt(self, claim: Claim, url: str, key: str) -> int:
        """No more model calls; how many there were. Closing twice does no harm. Raises `ProxyNotClosed`."""
        if self._http is None:
            self._http = aiohttp.ClientSession(timeout=aiohttp.ClientTimeout(total=CLOSE_S))
        address = url.rstrip("/") + attempt_path(claim.task.rollout_id, claim.attempt_id) + "/close"
        for last in (False, True):
            try:
                async with self._http.post(address, headers={"Authorization": f"Bearer {key}"}) as response:
                    if response.status != 200:
                        raise ValueError(f"{response.status} {(await response.text())[:200]}")
                    return int((await response.json())["spans"])
            except (aiohttp.ClientError, TimeoutError, ValueError) as error:
                if isinstance(error, aiohttp.ClientConnectionError) and not last:
                    continue  # a connection kept alive that the proxy has dropped
                self._avoided[url] = time.monotonic() + AVOIDED_S
                cause = str(error) or type(error).__name__
                raise ProxyNotClosed(f"it could not be closed at the proxy {url}: {cause}") from error
        raise AssertionError("unreachable")

    async def close(self) -> None:
        if self._http is not None:
            await self._http.close()
