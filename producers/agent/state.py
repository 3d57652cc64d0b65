"""Saves and loads checkpoints of an agent's work, from which a later attempt continues if this one is lost."""

import json
from typing import Any

from millstream.producers.agent.attempt import current_attempt
from millstream.producers.agent.emit import attempt_or_warning
from millstream.schemas.errors import MillstreamError

MAX_STATE_BYTES = 1_000_000

# The first byte of a stored state: its encoding.
_JSON, _BYTES = b"J", b"B"


class StateError(MillstreamError, ValueError):
    """A state that can't be saved."""


def save_state(state: Any) -> None:
    """Saves a checkpoint, which replaces the last one. ``state`` is bytes or a JSON value, at most 1 MB as stored. When
    this returns, the state survives a crash of the agent's process; the runner writes it to the log.

    Raises `StateError` for anything else. Outside a rollout it only warns, once per process.
    """
    if isinstance(state, bytes | bytearray):
        encoded = _BYTES + bytes(state)
    else:
        try:
            encoded = _JSON + json.dumps(state).encode()
        except (TypeError, ValueError) as error:
            raise StateError(f"a state must be bytes or a JSON value: {error}") from error
    if len(encoded) - 1 > MAX_STATE_BYTES:
        raise StateError(
            f"a state of {len(encoded) - 1:,} bytes is larger than {MAX_STATE_BYTES:,}: keep the rest in a file or "
            "object store, and its name in the state"
        )
    attempt = attempt_or_warning("a state")
    if attempt is not None:
        attempt.state = encoded
        attempt.save(encoded)


def load_state() -> Any:
    """The last state that this or an earlier attempt of this rollout saved, or None."""
    attempt = current_attempt()
    if attempt is None or attempt.state is None:
        return None
    return json.loads(attempt.state[1:]) if attempt.state[:1] == _JSON else attempt.state[1:]
