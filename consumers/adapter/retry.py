"""Whether an attempt that did not succeed is made again, and when: the default policy of every task.

Two budgets. An attempt that failed by the agent's own doing (`status.RETRIED`, or what the task's ``retry_on`` names of
it) is made again while fewer than ``max_attempts`` have failed so. One that was lost through no doing of the agent is
made again ``max_lost_attempts`` times, at no cost to the first budget. Each attempt has a number of its own, so
those that failed are ``attempt - lost_attempts``. What was cancelled is never made again.
"""

from collections.abc import Callable
from dataclasses import replace
from typing import Final

from millstream.schemas.wire import status
from millstream.schemas.wire.records import RolloutTask
from millstream.schemas.wire.topics import PRIORITIES

# Base and cap in seconds. A lost attempt's next runner is as good as ever, so it need hardly wait; the cap keeps a task
# that kills its runners from taking them down in a row. What has failed may have met a service that is overloaded, and
# what ran out of time surely waited for something: that gets time to recover.
BACKOFF_S: Final = {
    status.LOST: (0.1, 10.0),
    status.FAILED: (1.0, 60.0),
    status.TIMEOUT: (2.0, 60.0),
    status.UNRESPONSIVE: (2.0, 60.0),
}


def backoff_s(how: str, times: int, random: Callable[[], float]) -> float:
    """Seconds until the next attempt, after ``times`` of that kind. Exponential with full jitter: those that failed
    together don't come back together. (M. Brooker, "Exponential Backoff And Jitter", AWS Architecture Blog, 2015.)"""
    base, cap = BACKOFF_S[how]
    return random() * min(cap, base * 2.0 ** min(times - 1, 32))


def refusal(task: RolloutTask, how: str, retry_override: str | None = None) -> str | None:
    """Why ``task``, an attempt of which ended as ``how``, gets no other attempt; None if it gets one.

    ``retry_override`` is a hook's decision, "yes" or "no", instead of ``retry_on``; the budgets still hold."""
    if how == status.LOST:
        return None if task.lost_attempts < task.max_lost_attempts else "lost_attempts_exhausted"
    wanted = how in (task.retry_on or status.RETRIED) if retry_override is None else retry_override == "yes"
    if how not in status.RETRIED or not wanted:
        return "not_retried"
    return None if task.attempt - task.lost_attempts < task.max_attempts else "attempts_exhausted"


def next_task(task: RolloutTask, how: str, state: bytes | None) -> RolloutTask:
    """The next attempt's task; it goes on from ``state``, the last that the agent saved."""
    return replace(
        task,
        attempt=task.attempt + 1,
        lost_attempts=task.lost_attempts + (how == status.LOST),
        state=state,
        priority=task.priority if task.priority in PRIORITIES else "normal",  # some other publisher's
    )
