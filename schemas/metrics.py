"""All Prometheus metrics of the project: names, types, labels and meanings. Each role registers its own from here.

Labels are bounded: never a rollout, group, attempt, worker or model version. Experiments are labels at the trainer
alone, whose process has one. `millstream.pipeline.services.metrics_page` writes docs/metrics.md from this file.
"""

from typing import Final, Literal, NamedTuple


class Metric(NamedTuple):
    """One metric family. ``name`` is without the ``_total`` that Prometheus clients append to counters."""

    name: str
    meaning: str
    type: Literal["gauge", "counter", "histogram"] = "gauge"
    labels: tuple[str, ...] = ()
    buckets: tuple[float, ...] = ()  # upper bounds of a histogram

    @property
    def exported(self) -> str:
        """The name in rules and dashboards; a histogram also has ``_bucket``, ``_sum`` and ``_count``."""
        return f"{self.name}_total" if self.type == "counter" else self.name

    @property
    def unit(self) -> str:
        """The base unit, which Prometheus' conventions put at the end of the name; empty for numbers of things."""
        return next((unit for unit in ("seconds", "bytes") if self.name.endswith(f"_{unit}")), "")


_SECONDS: Final = (0.1, 0.3, 1.0, 3.0, 10.0, 30.0, 60.0, 120.0, 300.0, 600.0, 1800.0, 3600.0)  # of rollouts, attempts
_CALL_SECONDS: Final = (0.01, 0.03, 0.1, 0.3, 1.0, 3.0, 10.0, 30.0, 60.0, 120.0, 300.0)  # of model calls
_WRITE_SECONDS: Final = (0.003, 0.01, 0.03, 0.1, 0.3, 1.0, 3.0, 10.0)  # of transactions and inserts

# Every role
BUILD_INFO: Final = Metric(
    "millstream_build_info", "1. The labels say what runs in this process.", labels=("version", "role")
)
POLL_AGE: Final = Metric("millstream_poll_age_seconds", "Time since the last poll, of the consumer that polled least.")
LOOP_AGE: Final = Metric("millstream_event_loop_age_seconds", "Time since the event loop last ran.")
BACKGROUND_AGE: Final = Metric(
    "millstream_background_age_seconds", "Time since the last success, of the background task without one longest."
)
RECORDS_UNREAD: Final = Metric(
    "millstream_unread_records", "Records that retention had deleted before this process read them.", "counter"
)
LOG_BYTES: Final = Metric(
    "millstream_log_bytes",
    "Bytes of records' values, uncompressed, that this process has written to the log (written) or read (read).",
    "counter",
    ("direction",),
)
DEAD_LETTERS: Final = Metric(
    "millstream_dead_letters", "Dead letters that this process has written.", "counter", ("role", "reason")
)
CONSUMER_LAG: Final = Metric(
    "millstream_consumer_lag_seconds",
    "Adapter and sink: age of the oldest record that is not yet folded, or not yet stored; 0 without any.",
    labels=("group",),
)
CONSUMER_LAG_RECORDS: Final = Metric(
    "millstream_consumer_lag_records",
    "Adapter and sink: records of their partitions that are not yet folded, or not yet stored. Those that are not even "
    "read are counted every few seconds, transaction markers included.",
    labels=("group",),
)
CONTAINER_MEMORY_LIMIT: Final = Metric(
    "millstream_container_memory_limit_bytes",
    "Memory that the container of this process may hold, agent processes included; absent without a limit.",
)
SPANS: Final = Metric("millstream_spans", "Spans written to the log, by what made them.", "counter", ("source",))

# Runner
SLOTS: Final = Metric("millstream_runner_slots", "Attempts that this runner can run at once.")
RUNNING: Final = Metric("millstream_runner_running", "Attempts that this runner has claimed and not ended.")
STARVING: Final = Metric(
    "millstream_starving_seconds", "Time for which the lag has grown although slots are free and the runner polls."
)
PROXY_AWAY: Final = Metric(
    "millstream_proxy_away_seconds", "Time for which no proxy has answered this runner, which claims nothing meanwhile."
)
HEARTBEAT_AGE: Final = Metric("millstream_heartbeat_age_seconds", "Age of the oldest heartbeat last acknowledged.")
ATTEMPTS: Final = Metric("millstream_attempts", "Attempts whose end this runner has written.", "counter", ("status",))
ATTEMPT_SECONDS: Final = Metric(
    "millstream_attempt_seconds", "From the claim of an attempt to its end.", "histogram", (), _SECONDS
)
AGENT_PROCESSES_ENDED: Final = Metric(
    "millstream_agent_processes_ended",
    "Agent processes that have ended. stopped: by the runner, as planned; killed: with an attempt; memory: above "
    "--memory-limit; frame: it sent what can't be read; signal, exit: by itself.",
    "counter",
    ("reason",),
)
AGENT_CPU: Final = Metric(
    "millstream_agent_process_cpu_seconds",
    "CPU time of all agent processes, ended ones included.",
    "counter",
)
AGENT_MEMORY: Final = Metric(
    "millstream_agent_process_resident_memory_bytes", "Resident memory of the agent processes that live, in all."
)
MEMORY_LIMIT: Final = Metric(
    "millstream_memory_limit_bytes", "Memory that one agent process may hold (--memory-limit); absent without a limit."
)

# Adapter: it sees the end of each rollout exactly once
ROLLOUT_ENDS: Final = Metric("millstream_rollouts_ended", "Rollouts that have ended.", "counter", ("mode", "status"))
RETRIES: Final = Metric("millstream_retries", "Attempts retried, by how they had ended.", "counter", ("status",))
LOST_ATTEMPTS: Final = Metric("millstream_lost_attempts", "Attempts lost, retried or not.", "counter")
LATE_RECORDS: Final = Metric(
    "millstream_late_records",
    "Records after the end of their attempt or rollout, again when they are read again. zombie_result: a success.",
    "counter",
    ("kind",),
)
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
OPEN_ROLLOUTS: Final = Metric("millstream_open_rollouts", "Rollouts that are claimed and not ended.")
TRANSACTIONS: Final = Metric(
    "millstream_transactions",
    "Transactions. aborted: its decisions are sent again; reduced: a record could not be written, and was cut.",
    "counter",
    ("result",),
)
TRANSACTION_SECONDS: Final = Metric(
    "millstream_transaction_seconds", "Duration of the transactions committed.", "histogram", (), _WRITE_SECONDS
)
TRANSACTION_AGE: Final = Metric("millstream_transaction_call_seconds", "Duration of the current call to the log.")
CALLS_DROPPED: Final = Metric("millstream_calls_dropped", "LLM calls excluded from training.", "counter")
REWARDS_LEFT_OUT: Final = Metric("millstream_rewards_left_out", "Rewards that matched no call.", "counter")

# Proxy. Upstreams are those of the settings.
CALLS_IN_FLIGHT: Final = Metric("millstream_calls_in_flight", "Model calls that this proxy is making.")
CALLS_UNRECORDED: Final = Metric(
    "millstream_calls_unrecorded", "Model calls whose span the log has not stored.", "counter"
)
MODEL_CALLS: Final = Metric(
    "millstream_model_calls",
    "Model calls that have ended, by the status that the client got. 499: the client left; broken: a stream ended with "
    "an error.",
    "counter",
    ("upstream", "code"),
)
MODEL_CALL_SECONDS: Final = Metric(
    "millstream_model_call_seconds",
    "From the request of a model call to the end of its answer, with waiting for limits and with retries.",
    "histogram",
    ("upstream",),
    _CALL_SECONDS,
)
FIRST_TOKEN_SECONDS: Final = Metric(
    "millstream_first_token_seconds",
    "From the request of a streamed model call to its first piece of answer.",
    "histogram",
    ("upstream",),
    _CALL_SECONDS,
)
TOKENS: Final = Metric(
    "millstream_tokens", "Tokens that the model servers have reported.", "counter", ("kind", "upstream")
)
MODEL_RETRIES: Final = Metric("millstream_model_retries", "Further tries of model calls.", "counter", ("upstream",))
PROXY_BYTES: Final = Metric(
    "millstream_proxy_bytes",
    "Bytes of the bodies of model calls: received from agents, sent to them.",
    "counter",
    ("direction",),
)
LIMITED: Final = Metric(
    "millstream_limited",
    "Model calls refused with 429 by a limit of this proxy: of an attempt, a model or an upstream.",
    "counter",
    ("limit",),
)

# Sink
SINK_OUTAGE: Final = Metric(
    "millstream_sink_outage_seconds", "Time for which the store has been failing; 0 while it accepts records."
)
SINK_WAITING: Final = Metric("millstream_sink_waiting_records", "Records read and not yet stored.")
SINK_STORED: Final = Metric("millstream_sink_stored_records", "Records stored.", "counter")
SINK_RETRIES: Final = Metric("millstream_sink_retries", "Batches retried.", "counter")
SINK_INSERT_SECONDS: Final = Metric(
    "millstream_sink_insert_seconds", "Duration of the inserts that succeeded.", "histogram", (), _WRITE_SECONDS
)

# Gateway: of the whole deployment. Each gateway answers the same, so take max, not sum.
UNCLAIMED: Final = Metric("millstream_unclaimed_tasks", "Tasks that no runner has claimed.", labels=("priority",))
OLDEST_UNCLAIMED: Final = Metric(
    "millstream_oldest_unclaimed_seconds", "Age of the oldest task that no runner has claimed; 0 without any."
)
FLEET_SLOTS: Final = Metric("millstream_fleet_slots", "Attempts that all living runners can run at once.")
FLEET_RUNNING: Final = Metric("millstream_fleet_running", "Attempts that all living runners run.")

# Trainer: gone when its run ends
TRAIN_STEP: Final = Metric("millstream_train_step", "Steps of training that have ended.", labels=("experiment",))
TRAIN_REWARD: Final = Metric(
    "millstream_train_reward",
    "Mean reward of the last step's rollouts that succeeded (train), or of the last validation (val).",
    labels=("experiment", "mode"),
)
TRAIN_PHASE_SECONDS: Final = Metric(
    "millstream_train_phase_seconds",
    "Time by phase, of the steps that have ended. wait: for rollouts.",
    "counter",
    ("experiment", "phase"),
)
TRAIN_STALENESS: Final = Metric(
    "millstream_train_staleness_versions",
    "Updates between the policy that made a group and the one that learnt from it, in the last step.",
    labels=("experiment", "of"),
)
TRAIN_GROUPS: Final = Metric(
    "millstream_train_groups",
    "Groups that were trained on, or left out by dynamic sampling. none: all their rewards are alike.",
    "counter",
    ("experiment", "signal"),
)
TRAIN_GROUPS_DROPPED: Final = Metric(
    "millstream_train_groups_dropped", "Groups that were not trained on.", "counter", ("experiment", "reason")
)
TRAIN_TOKENS: Final = Metric(
    "millstream_train_tokens", "Tokens of responses that were trained on.", "counter", ("experiment",)
)
TRAIN_METRIC: Final = Metric(
    "millstream_train_metric",
    "The algorithm's own metrics of the last step, such as entropy and grad_norm.",
    labels=("experiment", "name"),
)

# Sections of the page, in this order
CATALOGUE: Final[dict[str, tuple[Metric, ...]]] = {
    "Every role": (
        BUILD_INFO,
        POLL_AGE,
        LOOP_AGE,
        BACKGROUND_AGE,
        RECORDS_UNREAD,
        LOG_BYTES,
        DEAD_LETTERS,
        CONSUMER_LAG,
        CONSUMER_LAG_RECORDS,
        CONTAINER_MEMORY_LIMIT,
        SPANS,
    ),
    "Runner": (
        SLOTS,
        RUNNING,
        STARVING,
        PROXY_AWAY,
        HEARTBEAT_AGE,
        ATTEMPTS,
        ATTEMPT_SECONDS,
        AGENT_PROCESSES_ENDED,
        AGENT_CPU,
        AGENT_MEMORY,
        MEMORY_LIMIT,
    ),
    "Adapter": (
        ROLLOUT_ENDS,
        ROLLOUT_SECONDS,
        QUEUED_SECONDS,
        RETRIES,
        LOST_ATTEMPTS,
        LATE_RECORDS,
        OPEN_ROLLOUTS,
        TRANSACTIONS,
        TRANSACTION_SECONDS,
        TRANSACTION_AGE,
        CALLS_DROPPED,
        REWARDS_LEFT_OUT,
    ),
    "Proxy": (
        CALLS_IN_FLIGHT,
        CALLS_UNRECORDED,
        MODEL_CALLS,
        MODEL_CALL_SECONDS,
        FIRST_TOKEN_SECONDS,
        TOKENS,
        MODEL_RETRIES,
        PROXY_BYTES,
        LIMITED,
    ),
    "Sink": (SINK_OUTAGE, SINK_WAITING, SINK_STORED, SINK_RETRIES, SINK_INSERT_SECONDS),
    "Gateway": (UNCLAIMED, OLDEST_UNCLAIMED, FLEET_SLOTS, FLEET_RUNNING),
    "Trainer": (
        TRAIN_STEP,
        TRAIN_REWARD,
        TRAIN_PHASE_SECONDS,
        TRAIN_STALENESS,
        TRAIN_GROUPS,
        TRAIN_GROUPS_DROPPED,
        TRAIN_TOKENS,
        TRAIN_METRIC,
    ),
}
