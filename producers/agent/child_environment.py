"""Environment variables that make a child process, in any language, part of its agent's attempt."""

import os
from urllib.parse import quote

from opentelemetry.trace.propagation.tracecontext import TraceContextTextMapPropagator

from millstream.producers.agent.attempt import current_attempt
from millstream.producers.agent.client_binding import OutsideRollout
from millstream.schemas.spans import semconv


def attempt_environment() -> dict[str, str]:
    """Environment variables for a process of the current attempt: ``Popen(…, env=os.environ | attempt_environment())``.

    ``OPENAI_…`` and ``ANTHROPIC_…``: the attempt's URL at the proxy and its key. ``OTEL_…``: the endpoint of the OTLP
    exporter, its key, and the attempt as resource attributes; only if ``gateway_url`` is set. ``TRACEPARENT``: the
    current span, as the parent of the process's spans. Spans count only if the process flushes its exporter before the
    agent returns. ``MILLSTREAM_SEED``: the task's seed, if it has one.

    Raises `OutsideRollout`.
    """
    attempt = current_attempt()
    if attempt is None or attempt.ended:
        raise OutsideRollout("attempt_environment() must be called within a rollout")
    carrier: dict[str, str] = {}
    TraceContextTextMapPropagator().inject(carrier)
    variables = {"TRACEPARENT": carrier["traceparent"]} if carrier else {}
    if attempt.task.seed is not None:
        variables["MILLSTREAM_SEED"] = str(attempt.task.seed)
    if base := attempt.base_url:
        variables |= {
            "OPENAI_BASE_URL": f"{base}/v1",
            "OPENAI_API_KEY": attempt.proxy_key,
            "ANTHROPIC_BASE_URL": base,
            "ANTHROPIC_API_KEY": attempt.proxy_key,
        }
    if attempt.gateway_url:
        ids = {semconv.ROLLOUT_ID: attempt.task.rollout_id, semconv.ATTEMPT_ID: attempt.attempt_id}
        inherited = os.environ.get("OTEL_RESOURCE_ATTRIBUTES", "")
        described = [inherited] * bool(inherited) + [f"{name}={quote(value)}" for name, value in ids.items()]
        variables |= {
            "OTEL_RESOURCE_ATTRIBUTES": ",".join(described),
            "OTEL_EXPORTER_OTLP_TRACES_ENDPOINT": attempt.gateway_url.rstrip("/") + "/v1/traces",
            "OTEL_EXPORTER_OTLP_TRACES_PROTOCOL": "http/protobuf",
            "OTEL_EXPORTER_OTLP_TRACES_HEADERS": f"authorization=Bearer%20{attempt.proxy_key}",
        }
    return variables
