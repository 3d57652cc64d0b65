"""When consumers polled, and which refusals a role sits out."""

import time

import pytest

from millstream.consumers.log.poll_times import REFUSED_S, PollTimes
from millstream.schemas.errors import Denied, Fenced, LogError, LogUnavailable, TransactionAborted


@pytest.mark.parametrize(
    ("polled_ago_s", "error", "forgiven"),
    [
        (1.0, LogError("denied"), True),
        (1.0, TransactionAborted("?"), True),
        (1.0, LogUnavailable("away"), True),
        (1.0, Fenced("replaced"), False),
        (REFUSED_S + 1, LogError("denied"), False),
        (REFUSED_S + 1, LogUnavailable("away"), True),
        (None, LogError("denied"), False),  # at the start: the settings are wrong
        (None, LogUnavailable("away"), True),
        (None, Denied("denied"), True),  # a role that ends at once would be started again and again
        (REFUSED_S + 1, Denied("denied"), False),
    ],
)
def test_a_refusal_of_what_was_allowed_is_sat_out_for_a_while(
    polled_ago_s: float | None, error: LogError, forgiven: bool
) -> None:
    """Section B1, in each loop that reads: a permission may be away for a moment."""
    times = PollTimes(last_poll=None if polled_ago_s is None else time.monotonic() - polled_ago_s)
    assert times.forgives(error) is forgiven


def test_a_right_that_is_missing_from_the_start_is_waited_for_as_long() -> None:
    assert not PollTimes(opened=time.monotonic() - REFUSED_S - 1).forgives(Denied("denied"))


async def test_what_is_sat_out_is_said_and_what_is_not_is_raised() -> None:
    said: list[tuple[object, ...]] = []
    times = PollTimes()
    await times.sit_out(away := LogUnavailable("away"), lambda *what: said.append(what), "retrying: %s")
    assert said == [("retrying: %s", away)]
    with pytest.raises(Fenced, match="replaced"):
        await times.sit_out(Fenced("replaced"), lambda *what: said.append(what), "retrying: %s")
    assert len(said) == 1


@pytest.mark.parametrize(("error", "counts"), [(LogUnavailable("away"), True), (LogError("denied"), False)])
def test_a_refused_poll_does_not_count_as_one(error: LogError, counts: bool) -> None:
    times = PollTimes()
    with pytest.raises(LogError), times:
        raise error
    assert (times.last_poll is not None) is counts
    assert times.polling_since is None
