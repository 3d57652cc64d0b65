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
CALLS_DROPPED: Final = Metric("millstream_calls_dropped", "LLM calls that are not trained on, since the start")
REWARDS_LEFT_OUT: Final = Metric("millstream_rewards_left_out", "Rewards that no call got, since the start")
STARVING: Final = Metric(
    "millstream_starving_seconds", "Since the lag began to grow although slots are free and the runner polls"
)
SLOTS: Final = Metric("millstream_slots", "Attempts that this runner can run at once")
RUNNING: Final = Metric("millstream_running", "Attempts that this runner has claimed and not ended")
CALLS_IN_FLIGHT: Final = Metric("millstream_calls_in_flight", "Model calls that this proxy is making")
CALLS_UNRECORDED: Final = Metric(
    "millstream_calls_unrecorded", "Model calls whose span the log did not take, since the start"
)
SINK_OUTAGE: Final = Metric("millstream_sink_outage_seconds", "Since the store began to fail; 0 while it takes records")
SINK_WAITING: Final = Metric("millstream_sink_waiting_records", "Read and not yet stored")
SINK_STORED: Final = Metric("millstream_sink_stored_records", "Stored since the start")
SINK_RETRIES: Final = Metric("millstream_sink_retries", "Batches that were tried again, since the start")
SINK_DEAD: Final = Metric("millstream_sink_dead_letters", "Written since the start")
