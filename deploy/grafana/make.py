"""Grafana's dashboards, as tables of panels; ``python -m millstream.deploy.grafana.make`` writes dashboards/*.json.

The metrics are those of schemas/metrics.py and, of model servers, vLLM's own; the views those of schemas/clickhouse.
Gateways answer for the whole deployment, each the same: max over them, never sum.
"""

import json
from pathlib import Path
from typing import Final

from millstream.deploy.grafana.panels import CLICKHOUSE, PROMETHEUS, Json, Panel, choice, dashboard, data_source

FOLDER: Final = Path(__file__).parent / "dashboards"
RATE: Final = "[$__rate_interval]"
RUN: Final = '{experiment=~"$experiment"}'
RUNS: Final = "experiment_id IN (${experiment:singlequote})"


def quantiles(metric: str, by: str = "") -> tuple[tuple[str, str], ...]:
    """Queries of a histogram's p50, p90 and p99, over all replicas, by one label at most."""
    labels, legend = (f"le, {by}", f" {{{{{by}}}}}") if by else ("le", "")
    return tuple(
        (f"histogram_quantile({q}, sum by ({labels}) (rate({metric}_bucket[5m])))", f"p{q * 100:.0f}{legend}")
        for q in (0.5, 0.9, 0.99)
    )


def rate(counter: str, by: str, legend: str = "") -> tuple[str, str]:
    """Query of a counter's increase a second, over all replicas."""
    return f"sum by ({by}) (rate({counter}{RATE}))", legend or " ".join(f"{{{{{label}}}}}" for label in by.split(", "))


def stat(title: str, query: str, unit: str = "none", legend: str = "", about: str = "") -> Panel:
    return Panel(title, ((query, legend),), unit, "stat", about)


def table(title: str, sql: str, unit: str = "none", about: str = "") -> Panel:
    """``RUNS`` in the SQL stands for the experiments that are chosen."""
    return Panel(title, ((" ".join(sql.split()).replace("RUNS", RUNS), ""),), unit, "table", about)


OVERVIEW: Final[dict[str, tuple[Panel, ...]]] = {
    "Now": (
        stat("Rollouts a second", f"sum(rate(millstream_rollouts_ended_total{RATE}))", "ops"),
        stat("Success", "millstream:success:ratio10m", "percentunit", "{{mode}}", "Of the last ten minutes."),
        stat("Work per slot", "millstream:work_per_slot", about="Above 1, tasks wait."),
        stat("Tokens a second", f'sum(rate(millstream_tokens_total{{kind="response"}}{RATE}))', "ops"),
        stat("Store away", "max(millstream_sink_outage_seconds)", "s"),
        stat("Processes down", 'count(up{job=~"millstream.*"} == 0) or vector(0)'),
    ),
    "Rollouts": (
        Panel("Ended", (rate("millstream_rollouts_ended_total", "mode, status"),), "ops"),
        Panel("From published to ended", quantiles("millstream_rollout_seconds"), "s"),
        Panel("From published to claimed", quantiles("millstream_queued_seconds"), "s"),
        Panel(
            "Attempts retried and lost",
            (
                rate("millstream_retries_total", "status", "retried: {{status}}"),
                (f"sum(rate(millstream_lost_attempts_total{RATE}))", "lost"),
            ),
            "ops",
        ),
        Panel("Attempts ended", (rate("millstream_attempts_total", "status"),), "ops"),
        Panel(
            "Left out of the training data",
            (
                (f"sum(rate(millstream_calls_dropped_total{RATE}))", "calls"),
                (f"sum(rate(millstream_rewards_left_out_total{RATE}))", "rewards"),
            ),
            "ops",
        ),
    ),
    "Queue": (
        Panel(
            "Tasks that wait",
            (
                ("max by (priority) (millstream_unclaimed_tasks)", "{{priority}}"),
                ("sum(millstream_open_rollouts)", "claimed, not ended"),
            ),
        ),
        Panel(
            "Slots",
            (("sum(millstream_runner_running)", "running"), ("sum(millstream_runner_slots)", "slots")),
        ),
        Panel("Oldest task that waits", (("max(millstream_oldest_unclaimed_seconds)", "age"),), "s"),
        Panel("Behind the log", (("max by (group) (millstream_consumer_lag_seconds)", "{{group}}"),), "s"),
        Panel("Behind the log, in records", (("sum by (group) (millstream_consumer_lag_records)", "{{group}}"),)),
        Panel(
            "Why runners wait",
            (
                ("max(millstream_starving_seconds)", "starving"),
                ("max(millstream_proxy_away_seconds)", "no proxy answers"),
                ("max(millstream_heartbeat_age_seconds)", "heartbeat's age"),
            ),
            "s",
        ),
    ),
    "Model calls": (
        Panel("Ended, by status", (rate("millstream_model_calls_total", "upstream, code"),), "ops"),
        Panel("Duration", quantiles("millstream_model_call_seconds", "upstream"), "s"),
        Panel("First token", quantiles("millstream_first_token_seconds", "upstream"), "s"),
        Panel("Tokens", (rate("millstream_tokens_total", "kind, upstream"),), "ops"),
        Panel("Under way", (("sum by (instance) (millstream_calls_in_flight)", "{{instance}}"),)),
        Panel(
            "Retried, refused, not recorded",
            (
                rate("millstream_model_retries_total", "upstream", "retried: {{upstream}}"),
                rate("millstream_limited_total", "limit", "refused: limit of the {{limit}}"),
                (f"sum(rate(millstream_calls_unrecorded_total{RATE}))", "not recorded"),
            ),
            "ops",
        ),
    ),
    "vLLM": (
        Panel(
            "Requests",
            (
                ("sum by (model_name) (vllm:num_requests_running)", "{{model_name}}: running"),
                ("sum by (model_name) (vllm:num_requests_waiting)", "{{model_name}}: waiting"),
            ),
            about="A waiting request has no room in the KV cache, or in the batch.",
        ),
        Panel("KV cache used", (("vllm:kv_cache_usage_perc", "{{instance}} {{engine}}"),), "percentunit"),
        Panel(
            "Tokens a second",
            (
                rate("vllm:prompt_tokens_total", "model_name", "{{model_name}}: prompts"),
                rate("vllm:generation_tokens_total", "model_name", "{{model_name}}: generated"),
            ),
            "ops",
        ),
        Panel("First token, by vLLM", quantiles("vllm:time_to_first_token_seconds", "model_name"), "s"),
        Panel("Between two tokens", quantiles("vllm:inter_token_latency_seconds", "model_name"), "s"),
        Panel(
            "Preempted",
            (rate("vllm:num_preemptions_total", "model_name"),),
            "ops",
            about="Requests whose KV cache was given to others, and is computed again.",
        ),
    ),
    "Log and store": (
        Panel("Spans", (rate("millstream_spans_total", "source"),), "ops"),
        Panel(
            "Records stored",
            (
                (f"sum(rate(millstream_sink_stored_records_total{RATE}))", "stored"),
                (f"sum(rate(millstream_sink_retries_total{RATE}))", "batches retried"),
            ),
            "ops",
        ),
        Panel("Inserts", quantiles("millstream_sink_insert_seconds"), "s"),
        Panel("Transactions", (rate("millstream_transactions_total", "result"),), "ops"),
        Panel("Duration of transactions", quantiles("millstream_transaction_seconds"), "s"),
        Panel("Dead letters", (("sum by (role, reason) (millstream_dead_letters_total)", "{{role}}: {{reason}}"),)),
    ),
    "Machines": (
        Panel("CPU", (rate("process_cpu_seconds_total", "role"),), "none", about="Cores."),
        Panel("Memory", (("max by (role) (process_resident_memory_bytes)", "{{role}}, largest"),), "bytes"),
        Panel("Bytes to and from the log", (rate("millstream_log_bytes_total", "role, direction"),), "Bps"),
        Panel(
            "Agent processes",
            (
                (f"sum(rate(millstream_agent_process_cpu_seconds_total{RATE}))", "cores"),
                (f"sum(increase(millstream_agent_processes_ended_total{RATE}))", "ended"),
            ),
        ),
        Panel(
            "Agents' memory",
            (("sum by (instance) (millstream_agent_process_resident_memory_bytes)", "{{instance}}"),),
            "bytes",
        ),
        Panel("Since the last poll", (("max by (role) (millstream_poll_age_seconds)", "{{role}}"),), "s"),
    ),
}

TRAINING: Final[dict[str, tuple[Panel, ...]]] = {
    "Reward": (
        Panel("Reward", ((f"millstream_train_reward{RUN}", "{{experiment}} {{mode}}"),)),
        Panel("Step", ((f"millstream_train_step{RUN}", "{{experiment}}"),)),
        Panel(
            "Groups without a signal",
            (
                (
                    'sum by (experiment) (rate(millstream_train_groups_total{signal="none",experiment=~"$experiment"}'
                    f"[5m])) / sum by (experiment) (rate(millstream_train_groups_total{RUN}[5m]))",
                    "{{experiment}}",
                ),
            ),
            "percentunit",
            about="All rewards of such a group are alike: nothing is learnt from it.",
        ),
    ),
    "Time": (
        Panel(
            "Share of the phases",
            ((f"millstream:train_phase:share5m{RUN}", "{{experiment}} {{phase}}"),),
            "percentunit",
            about="wait: for rollouts.",
            stacked=True,
        ),
        Panel(
            "Seconds a step",
            (
                (
                    f"sum by (experiment) (rate(millstream_train_phase_seconds_total{RUN}[5m])) / "
                    f"(sum by (experiment) (deriv(millstream_train_step{RUN}[5m])) > 0)",
                    "{{experiment}}",
                ),
            ),
            "s",
        ),
        Panel(
            "Tokens trained on",
            ((f"sum by (experiment) (rate(millstream_train_tokens_total{RUN}[5m]))", "{{experiment}}"),),
            "ops",
        ),
    ),
    "Data": (
        Panel("Staleness", ((f"millstream_train_staleness_versions{RUN}", "{{experiment}} {{of}}"),)),
        Panel(
            "Groups left out",
            (
                (
                    f"sum by (experiment, reason) (increase(millstream_train_groups_dropped_total{RUN}[5m]))",
                    "{{experiment}}: {{reason}}",
                ),
            ),
        ),
        Panel("The algorithm's own", ((f"millstream_train_metric{RUN}", "{{experiment}} {{name}}"),)),
    ),
}

ROLLOUTS: Final[dict[str, tuple[Panel, ...]]] = {
    "Rewards": (
        table(
            "Reward by version",
            """SELECT model_version, count() AS rollouts, avg(reward) AS mean, quantileExact(0.1)(reward) AS p10,
            quantileExact(0.9)(reward) AS p90, min(ended_at) AS first FROM ended_rollouts
            WHERE status = 'succeeded' AND RUNS AND $__timeFilter(ended_at)
            GROUP BY model_version ORDER BY first DESC LIMIT 100""",
        ),
        table(
            "Groups without a signal",
            """SELECT model_version, count() AS groups, avg(alike) AS no_signal FROM (
            SELECT group_id, any(model_version) AS model_version, max(reward) = min(reward) AS alike,
            min(ended_at) AS first FROM ended_rollouts
            WHERE mode = 'train' AND reward IS NOT NULL AND RUNS AND $__timeFilter(ended_at)
            GROUP BY group_id) GROUP BY model_version ORDER BY min(first) DESC LIMIT 100""",
            "percentunit",
        ),
    ),
    "What failed": (
        table(
            "Why rollouts fail",
            """SELECT status, if(error_type = '', ifNull(reason, ''), error_type) AS why, count() AS rollouts,
            any(error_message) AS example FROM rollouts WHERE status != 'succeeded' AND RUNS AND $__timeFilter(ended_at)
            GROUP BY status, why ORDER BY rollouts DESC LIMIT 20""",
        ),
        table(
            "Slowest rollouts",
            """SELECT rollout_id, mode, status, queued_s, duration_s, turns, reward FROM rollouts
            WHERE RUNS AND $__timeFilter(ended_at) ORDER BY duration_s DESC NULLS LAST LIMIT 20""",
        ),
        table(
            "Dead letters",
            """SELECT time, role, reason, source_topic, source_partition, source_offset, error FROM dead_letters
            WHERE $__timeFilter(time) ORDER BY time DESC LIMIT 50""",
        ),
        table(
            "Ended by minute",
            """SELECT minute, mode, status, sum(rollouts) AS rollouts, sum(lost_attempts) AS lost_attempts,
            max(duration_p99_s) AS p99_s FROM rollouts_per_minute
            WHERE RUNS AND $__timeFilter(minute) GROUP BY minute, mode, status ORDER BY minute DESC LIMIT 200""",
        ),
    ),
    "Calls and tools": (
        table(
            "Tokens by minute",
            """SELECT minute, model_version, sum(calls) AS calls, sum(prompt_tokens) AS prompt,
            sum(response_tokens) AS response FROM tokens_per_minute
            WHERE source = 'proxy' AND $__timeFilter(minute)
            GROUP BY minute, model_version ORDER BY minute DESC LIMIT 200""",
            about="As the proxies saw them.",
        ),
        table(
            "Tools",
            """SELECT name, count() AS calls, countIf(NOT succeeded) AS failed, quantileExact(0.5)(duration_s) AS p50_s
            FROM tool_calls WHERE $__timeFilter(time) GROUP BY name ORDER BY calls DESC LIMIT 20""",
        ),
        table(
            "Latency of spans",
            """SELECT source, kind, name, sum(spans) AS spans, sum(errors) AS errors, max(p50_s) AS p50_s,
            max(p99_s) AS p99_s FROM latency_per_minute WHERE $__timeFilter(minute)
            GROUP BY source, kind, name ORDER BY spans DESC LIMIT 50""",
            about="The slowest minute's.",
        ),
        table(
            "Steps of training",
            """SELECT experiment_id, step, model_version, rollouts, reward_mean, seconds, idle_share
            FROM training_steps WHERE NOT abandoned AND RUNS AND $__timeFilter(ended_at)
            ORDER BY ended_at DESC LIMIT 100""",
        ),
    ),
}

_PROMETHEUS: Final = data_source("prometheus", "Prometheus", "prometheus")
_CLICKHOUSE: Final = data_source("clickhouse", "ClickHouse", "grafana-clickhouse-datasource")
DASHBOARDS: Final[tuple[Json, ...]] = (
    dashboard("millstream", "Millstream", OVERVIEW, [_PROMETHEUS]),
    dashboard(
        "millstream-training",
        "Millstream: training",
        TRAINING,
        [_PROMETHEUS, choice("experiment", PROMETHEUS, "label_values(millstream_train_step, experiment)")],
    ),
    dashboard(
        "millstream-rollouts",
        "Millstream: rollouts",
        ROLLOUTS,
        [
            _CLICKHOUSE,
            choice("experiment", CLICKHOUSE, "SELECT DISTINCT experiment_id FROM rollouts_per_minute ORDER BY 1"),
        ],
        refresh="1m",
    ),
)


def files() -> dict[Path, str]:
    """The text of each dashboard by its path."""
    return {FOLDER / f"{board['uid']}.json": json.dumps(board, indent=2) + "\n" for board in DASHBOARDS}


if __name__ == "__main__":
    for path, text in files().items():
        path.write_text(text, "utf-8")
