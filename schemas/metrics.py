"""All Prometheus metrics of the project: their names, types, labels and meanings. Each role registers its own."""

from typing import Final, Literal, NamedTuple


class Metric(NamedTuple):
    """One metric family. ``name`` is without the ``_total`` that Prometheus clients append to counters."""

    name: str
    meaning: str
    type: Literal["gauge", "counter", "histogram"] = "gauge"
    labels: tuple[str, ...] = ()
    buckets: tuple[float, ...] = ()  # upper bounds of a histogram


# Every role
POLL_AGE: Final = Metric("millstream_poll_age_seconds", "Time since the last poll, of the consumer that polled least.")
LOOP_AGE: Final = Metric("millstream_event_loop_age_seconds", "Time since the event loop last ran.")
BACKGROUND_AGE: Final = Metric(
    "millstream_background_age_seconds", "Time since the last success, of the background task without one longest."
)
RECORDS_UNREAD: Final = Metric(
    "millstream_unread_records", "Records that retention had deleted before this process read them.", "counter"
)
HEARTBEAT_AGE: Final = Metric("millstream_heartbeat_age_seconds", "Age of the oldest heartbeat last acknowledged.")
TRANSACTION_AGE: Final = Metric("millstream_transaction_call_seconds", "Duration of the current call to the log.")

# Runner
SLOTS: Final = Metric("millstream_slots", "Attempts that this runner can run at once.")
RUNNING: Final = Metric("millstream_running", "Attempts that this runner has claimed and not ended.")
STARVING: Final = Metric(
    "millstream_starving_seconds", "Time for which the lag has grown although slots are free and the runner polls."
)
PROXY_AWAY: Final = Metric(
    "millstream_proxy_away_seconds", "Time for which no proxy has answered this runner, which claims nothing meanwhile."
)

# Adapter: it sees the end of each rollout exactly once
ROLLOUT_ENDS: Final = Metric("millstream_rollouts_ended", "Rollouts that have ended.", "counter", ("mode", "status"))
RETRIES: Final = Metric("millstream_retries", "Attempts retried, by how they had ended.", "counter", ("status",))
LOST_ATTEMPTS: Final = Metric("millstream_lost_attempts", "Attempts lost, retried or not.", "counter")
DEAD_LETTERS: Final = Metric("millstream_dead_letters", "Dead letters of the adapter.", "counter", ("reason",))
TRANSACTIONS_ABORTED: Final = Metric(
    "millstream_transactions_aborted", "Transactions aborted; their decisions are sent again.", "counter"
)
LATE_RECORDS: Final = Metric(
    "millstream_late_records",
    "Records after the end of their attempt or rollout, again when they are read again. zombie_result: a success.",
    "counter",
    ("kind",),
)
_SECONDS: Final = (0.1, 0.3, 1.0, 3.0, 10.0, 30.0, 60.0, 120.0, 300.0, 600.0, 1800.0, 3600.0)
ROLLOUT_SECONDS: Final = Metric(
    "millstream_rollout_seconds", "From the publication of a rollout to its end.", "histogram", ("mode",), _SECONDS
)
QUEUED_SECONDS: Final = Metric(
    "millstream_queued_seconds",
    "From the publication of a rollout to its first claim.",
    "histogram",
    ("mode",),
    _SECONDS,
)
CALLS_DROPPED: Final = Metric("millstream_calls_dropped", "LLM calls excluded from training.", "counter")
REWARDS_LEFT_OUT: Final = Metric("millstream_rewards_left_out", "Rewards that matched no call.", "counter")

# Proxy
CALLS_IN_FLIGHT: Final = Metric("millstream_calls_in_flight", "Model calls that this proxy is making.")
CALLS_UNRECORDED: Final = Metric(
    "millstream_calls_unrecorded", "Model calls whose span the log has not stored.", "counter"
)

# Sink
SINK_OUTAGE: Final = Metric(
    "millstream_sink_outage_seconds", "Time for which the store has been failing; 0 while it accepts records."
)
SINK_WAITING: Final = Metric("millstream_sink_waiting_records", "Records read and not yet stored.")
SINK_STORED: Final = Metric("millstream_sink_stored_records", "Records stored.", "counter")
SINK_RETRIES: Final = Metric("millstream_sink_retries", "Batches retried.", "counter")
SINK_DEAD: Final = Metric("millstream_sink_dead_letters", "Dead letters written.", "counter")
