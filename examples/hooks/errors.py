"""Decides by the type of the agent's exception what becomes of the attempt."""

from collections.abc import Mapping
from typing import Any

import millstream as ms


class ErrorHandler(ms.Hook):
    """``actions``: exception type → "retry", "fail" or "ignore". The nearest base class counts; for other types the
    task's ``retry_on`` decides."""

    def __init__(self, actions: Mapping[type[BaseException], str]) -> None:
        super().__init__()
        self._actions = dict(actions)

    async def on_error(self, agent: Any, runner: Any, rollout: Any, error: BaseException) -> str | None:
        return next((self._actions[kind] for kind in type(error).__mro__ if kind in self._actions), None)
