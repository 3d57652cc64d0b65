"""What stands behind the proxy: something that answers chat completions."""

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any, Protocol


@dataclass(frozen=True, slots=True)
class Completion:
    """An upstream answer. With status 200 ``body`` is an OpenAI chat completion in vLLM's form when asked for by
    ``return_token_ids``: ``prompt_token_ids`` at the top, ``token_ids`` in each choice."""

    status: int
    body: dict[str, Any]
    model_version: str | None  # of the weights that made the answer, where the server tells


class Backend(Protocol):
    """One model server, in this process or behind HTTP."""

    async def chat(self, request: Mapping[str, Any]) -> Completion:
        """Answers a ``/v1/chat/completions`` body. Raises `BackendUnavailable` if nobody answers."""

    async def close(self) -> None: ...


class BackendUnavailable(Exception):
    """The model server can't be reached, or broke off."""
