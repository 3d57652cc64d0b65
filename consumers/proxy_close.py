"""The end of an attempt at the proxy: no more model calls, and how many there were."""

import aiohttp

from millstream.consumers.claims import Claim
from millstream.schemas.errors import MillstreamError
from millstream.schemas.identity import attempt_key, attempt_path

CLOSE_S = 30.0  # for the proxy to let an attempt's last calls end


class ProxyNotClosed(MillstreamError):
    """The proxy did not say how many calls there were; names its address."""


async def close_at_proxy(http: aiohttp.ClientSession, proxy_url: str, secret: str, claim: Claim) -> int:
    """How many spans the attempt's calls have made. Closing twice does no harm. Raises `ProxyNotClosed`."""
    rollout_id, attempt_id = claim.task.rollout_id, claim.attempt_id
    url = proxy_url.rstrip("/") + attempt_path(rollout_id, attempt_id) + "/close"
    headers = {"Authorization": f"Bearer {attempt_key(secret, rollout_id, attempt_id)}"}
    for last in (False, True):
        try:
            async with http.post(url, headers=headers) as response:
                if response.status != 200:
                    raise ValueError(f"{response.status} {(await response.text())[:200]}")
                return int((await response.json())["spans"])
        except (aiohttp.ClientError, TimeoutError, ValueError) as error:
            if isinstance(error, aiohttp.ClientConnectionError) and not last:
                continue  # a connection kept alive that the proxy has dropped
            cause = str(error) or type(error).__name__
            raise ProxyNotClosed(f"it could not be closed at the proxy {proxy_url}: {cause}") from error
    raise AssertionError("unreachable")
