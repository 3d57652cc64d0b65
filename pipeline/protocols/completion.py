"""What a policy's server answers, and how it says with which weights."""

from dataclasses import dataclass
from typing import Any, Final

MODEL_VERSION: Final = "x-model-version"
"""Header of an answer: the version of the weights that made it, ``mixed`` if they changed meanwhile. Of a stream it is
the version at its beginning; a comment ``: x-model-version=VERSION`` before ``[DONE]`` is that at its end."""


@dataclass(frozen=True, slots=True)
class Completion:
    """With status 200 ``body`` is an OpenAI chat completion in vLLM's form when asked for by ``return_token_ids``:
    ``prompt_token_ids`` at the top, ``token_ids`` in each choice."""

    status: int
    body: dict[str, Any]
    model_version: str | None  # of the weights that made the answer


class BackendUnavailable(Exception):
    """The engine has been closed."""
