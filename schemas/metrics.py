"""The names of all metrics, and what each of them means."""

from typing import Final, NamedTuple


class Metric(NamedTuple):
    """``name`` as Prometheus has it, and its meaning for people."""

    name: str
    meaning: str


POLL_AGE: Final = Metric("millstream_poll_age_seconds", "Since the consumer that has polled least recently did so")
HEARTBEAT_AGE: Final = Metric(
    "millstream_heartbeat_age_seconds", "Since the oldest of the last acknowledged heartbeats"
)
TRANSACTION_AGE: Final = Metric("millstream_transaction_call_seconds", "Since the call to the log under way began")
STARVING: Final = Metric(
    "millstream_starving_seconds", "Since the lag began to grow although slots are free and the runner polls"
)
SLOTS: Final = Metric("millstream_slots", "Attempts that this runner can run at once")
RUNNING: Final = Metric("millstream_running", "Attempts that this runner has claimed and not ended")
