"""The transitions of an attempt's status in one table; a rollout's status as a function of its events."""

from collections.abc import Iterable
from typing import Final

from millstream.schemas.wire.records import AttemptEvent, RolloutEnd

PREPARING: Final = "preparing"
RUNNING: Final = "running"
SUCCEEDED: Final = "succeeded"
FAILED: Final = "failed"
TIMEOUT: Final = "timeout"
UNRESPONSIVE: Final = "unresponsive"
CANCELLED: Final = "cancelled"
LOST: Final = "lost"
RETRY: Final = "retry"  # the adapter's mark: the next attempt has been published

# Values of ``retry`` in a terminal event's metadata, before the task's ``retry_on``: a hook's decisions, and an attempt
# that its runner refused to run, with a dead letter of its own.
RETRY_YES: Final = "yes"
RETRY_NO: Final = "no"
RETRY_REFUSED: Final = "refused"

TERMINAL: Final = frozenset({SUCCEEDED, FAILED, TIMEOUT, UNRESPONSIVE, CANCELLED, LOST})

# Error types of lost attempts that count in a way of their own: the proxy did not answer; the process died while it ran
# several attempts, and which of them ended it is unknown.
PROXY_AWAY: Final = "proxy_away"
CRASH: Final = "crash"
RETRIED: Final = frozenset({FAILED, TIMEOUT, UNRESPONSIVE})  # caused by the agent: `retry_on` chooses from these

# None is "no event yet". A repeated status is a heartbeat.
TRANSITIONS: Final[dict[str | None, frozenset[str]]] = {
    None: frozenset({PREPARING}),
    PREPARING: frozenset({PREPARING, RUNNING}) | TERMINAL,
    RUNNING: frozenset({RUNNING}) | TERMINAL,
    SUCCEEDED: frozenset(),
    CANCELLED: frozenset(),
    FAILED: frozenset({RETRY}),
    TIMEOUT: frozenset({RETRY}),
    UNRESPONSIVE: frozenset({RETRY}),
    LOST: frozenset({RETRY}),
    RETRY: frozenset(),
}


def may_follow(current: str | None, new: str) -> bool:
    """Whether an attempt in status ``current`` may become ``new``; never to an unknown status."""
    return new in TRANSITIONS.get(current, frozenset())


def rollout_status(events: Iterable[AttemptEvent | RolloutEnd]) -> str:
    """queued, running, retrying, succeeded, failed or cancelled: a fold over a rollout's events in log order.

    An attempt whose lease expired has no terminal event; the adapter's mark (``retry``, or the `RolloutEnd`) decides.
    Later events of that attempt are ignored, as are other claims with its number (a task that was delivered twice).
    """
    status = "queued"
    retried = 0  # the highest attempt number that has been retried
    attempts: dict[str, str | None] = {}
    for event in events:
        if isinstance(event, RolloutEnd):
            return event.status
        if event.attempt <= retried:
            continue
        current = attempts.get(event.attempt_id)
        if event.status == RETRY:
            retried = event.attempt
            status = "retrying"
        elif may_follow(current, event.status):
            attempts[event.attempt_id] = event.status
            if event.status in (PREPARING, RUNNING):
                status = "running"
    return status
