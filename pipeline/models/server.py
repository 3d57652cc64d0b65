"""The port of a model server: vLLM (`vllm_server`) or the demo engine (`engine`) implements it."""

from collections.abc import Mapping
from typing import TYPE_CHECKING, Protocol

from millstream.schemas.errors import MillstreamError

if TYPE_CHECKING:  # needs the `train` extra
    from torch import Tensor


class UpdateFailed(MillstreamError):
    """A version did not go live; the version before is still served. ``passing``: the server is being restarted and
    may accept the version afterwards."""

    def __init__(self, message: str, *, passing: bool = False) -> None:
        super().__init__(message)
        self.passing = passing


class ModelServer(Protocol):
    """Answers with one version of a model."""

    async def update(self, weights: Mapping[str, "Tensor"], version: str) -> None:
        """Returns when the new weights answer. Raises `UpdateFailed`."""
