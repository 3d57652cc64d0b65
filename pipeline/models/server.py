"""What a model is served by: vLLM (`vllm_server`) or the demo engine (`engine`)."""

from collections.abc import Mapping
from typing import TYPE_CHECKING, Protocol

from millstream.schemas.errors import MillstreamError

if TYPE_CHECKING:  # needs the `train` extra
    from torch import Tensor


class UpdateFailed(MillstreamError):
    """A version did not go live; whatever was served before it still is. ``passing``: the server is just being started
    again, and may take it then."""

    def __init__(self, message: str, *, passing: bool = False) -> None:
        super().__init__(message)
        self.passing = passing


class ModelServer(Protocol):
    """Answers with one version of a model; LoRA adapters are served beside it."""

    async def update(self, weights: Mapping[str, "Tensor"], version: str) -> None:
        """The new weights answer from now on. Raises `UpdateFailed`."""
