"""A model server behind HTTP: our engine's, vLLM, or anything that speaks OpenAI's chat completions."""

import json
from collections.abc import Mapping
from typing import Any, Final

import aiohttp

from millstream.pipeline.backend import BackendUnavailable, Completion

MODEL_VERSION_HEADER: Final = "x-model-version"


class HttpBackend:
    """A `Backend` for one server. Bound to the event loop of its first call."""

    def __init__(self, url: str, timeout_s: float = 600.0) -> None:
        """``url`` is the server's root, without ``/v1``. ``timeout_s`` is for a whole answer; a connection has to be
        made within 10 s."""
        self._url = f"{url.rstrip('/')}/v1/chat/completions"
        self._timeout = aiohttp.ClientTimeout(total=timeout_s, connect=None, sock_connect=10.0)
        self._session: aiohttp.ClientSession | None = None

    async def chat(self, request: Mapping[str, Any]) -> Completion:
        """See `Backend.chat`. The model version is the server's ``x-model-version`` header, None without it."""
        if self._session is None:
            # No limit of ours on connections: how many calls run at once is up to the agents and the server.
            self._session = aiohttp.ClientSession(connector=aiohttp.TCPConnector(limit=0), timeout=self._timeout)
        try:
            async with self._session.post(self._url, json=request) as response:
                text = await response.text()
        except (aiohttp.ClientError, TimeoutError) as error:
            what = str(error) or type(error).__name__
            raise BackendUnavailable(
                f"the model server at {self._url} can't be reached, or broke off: {what}"
            ) from error
        try:
            body = json.loads(text)
        except ValueError:
            body = None
        if not isinstance(body, dict):
            raise BackendUnavailable(
                f"{self._url} answered {response.status} with something else than a JSON object: {text[:200]!r}"
            )
        return Completion(response.status, body, response.headers.get(MODEL_VERSION_HEADER))

    async def close(self) -> None:
        if self._session is not None:
            await self._session.close()
