"""Whether and when an attempt that did not succeed is retried.

There are two budgets. An attempt that failed because of the agent (`status.RETRIED`, or the task's ``retry_on`` of
these) is retried while fewer than ``max_attempts`` have failed so. One that was lost, which is never the agent's fault,
is retried ``max_lost_attempts`` times, at no cost to the first budget. Each attempt has its own number, so those that
failed are ``attempt - lost_attempts``. A cancelled attempt is never retried.

One that was lost because its proxy did not answer costs nothing: its ``max_lost_attempts`` grows with it, up to
`OUTAGES`. An outage of any length is survived so, and a task whose calls end its proxy each time still ends.
"""

from collections.abc import Callable
from dataclasses import replace
from typing import Final

from millstream.schemas.wire import status
from millstream.schemas.wire.records import RolloutTask
from millstream.schemas.wire.topics import PRIORITIES

# Base and cap in seconds. A lost attempt needs hardly any delay; the cap keeps a task that kills its runners from
# ending them one after the other. A failure may come from an overloaded service, and a time-out most likely does: that
# gets time to recover.
BACKOFF_S: Final = {
    status.LOST: (0.1, 10.0),
    status.FAILED: (1.0, 60.0),
    status.TIMEOUT: (2.0, 60.0),
    status.UNRESPONSIVE: (2.0, 60.0),
}

LAST_ATTEMPT: Final = (1 << 31) - 1  # its successor's number would not fit a record


# Likewise, of attempts that were lost with their proxy, which needs some time to come back.
PROXY_BACKOFF_S: Final = (1.0, 60.0)
OUTAGES: Final = 100  # lost attempts above which a proxy that did not answer costs one; some 50 minutes of backoff


def backoff_s(base_and_cap: tuple[float, float], times: int, random: Callable[[], float]) -> float:
    """Seconds until the next attempt, after ``times`` of that kind. Exponential with full jitter: attempts that failed
    together don't return together. (M. Brooker, "Exponential Backoff And Jitter", AWS Architecture Blog, 2015.)"""
    base, cap = base_and_cap
    return random() * min(cap, base * 2.0 ** min(times - 1, 32))


def is_outage(task: RolloutTask, how: str, cause: str) -> bool:
    """Whether an attempt that ended as ``how``, with an error of type ``cause``, costs none of the budgets."""
    return how == status.LOST and cause == status.PROXY_AWAY and task.lost_attempts < OUTAGES


def refusal(task: RolloutTask, how: str, retry_override: str | None = None, *, cause: str = "") -> str | None:
    """Why ``task``, whose attempt ended as ``how``, with an error of type ``cause``, is not retried; None if it is.

    ``retry_override`` (`status.RETRY_YES` …) replaces ``retry_on``; the budgets still hold."""
    if task.attempt >= LAST_ATTEMPT:
        return "attempts_exhausted"
    if how == status.LOST:
        left = task.lost_attempts < task.max_lost_attempts or is_outage(task, how, cause)
        return None if left else "lost_attempts_exhausted"
    wanted = how in (task.retry_on or status.RETRIED) if retry_override is None else retry_override == status.RETRY_YES
    if how not in status.RETRIED or not wanted:
        return "not_retried"
    return None if task.attempt - task.lost_attempts < task.max_attempts else "attempts_exhausted"


def next_task(task: RolloutTask, how: str, state: bytes | None, *, cause: str = "") -> RolloutTask:
    """The next attempt's task. ``state``: the last that the agent saved. ``cause``: type of the attempt's error."""
    return replace(
        task,
        attempt=task.attempt + 1,
        lost_attempts=task.lost_attempts + (how == status.LOST),
        max_lost_attempts=task.max_lost_attempts + is_outage(task, how, cause),
        crashes=task.crashes + (how == status.LOST and cause == status.CRASH),
        state=state,
        priority=task.priority if task.priority in PRIORITIES else "normal",  # of a foreign publisher
    )
