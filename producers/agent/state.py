"""Checkpoints that an agent makes of its own work, for the attempt that comes after it if this one is lost."""

import json
from typing import Any

from millstream.producers.agent.attempt import current_attempt
from millstream.producers.agent.emit import attempt_or_warning
from millstream.schemas.errors import MillstreamError

MAX_STATE_BYTES = 1_000_000

# How a state is kept in records: one byte that says what follows.
_JSON, _BYTES = b"J", b"B"


class StateError(MillstreamError, ValueError):
    """A state that can't be kept."""


def save_state(state: Any) -> None:
    """Records where the agent is: ``state`` is bytes, or whatever JSON holds, of at most 1 MB as stored. The last one
    counts. When this returns the state survives the death of the agent's process; the runner writes it to the log.

    Raises `StateError` for anything else. Outside a rollout it does nothing but warn, once.
    """
    if isinstance(state, bytes | bytearray):
        encoded = _BYTES + bytes(state)
    else:
        try:
            encoded = _JSON + json.dumps(state).encode()
        except (TypeError, ValueError) as error:
            raise StateError(f"a state has to be bytes or what JSON can hold: {error}") from error
    if len(encoded) - 1 > MAX_STATE_BYTES:
        raise StateError(
            f"a state of {len(encoded) - 1:,} bytes is larger than {MAX_STATE_BYTES:,}: keep the rest in a file or "
            "object store of yours, and its name in the state"
        )
    attempt = attempt_or_warning("a state")
    if attempt is not None:
        attempt.state = encoded
        attempt.save(encoded)


def load_state() -> Any:
    """What was saved last in this rollout, by this attempt or by the one before it; None if nothing was."""
    attempt = current_attempt()
    if attempt is None or attempt.state is None:
        return None
    return json.loads(attempt.state[1:]) if attempt.state[:1] == _JSON else attempt.state[1:]
