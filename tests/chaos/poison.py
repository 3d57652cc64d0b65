"""Records that a deployment should never get: of agents, and straight to the topics."""

import json
from collections.abc import Callable
from io import BytesIO
from pathlib import Path
from typing import Any, Final

import fastavro
from fastavro.schema import fingerprint, to_parsing_canonical_form

from millstream.schemas.ids import new_id

AVRO = Path(__file__).parents[2] / "schemas" / "avro"
SCHEMAS: Final[dict[str, tuple[bytes, Any]]] = {}  # by name, with the header of its records
for _path in AVRO.glob("*.avsc"):
    _schema = json.loads(_path.read_text())
    _header = b"\xc3\x01" + bytes.fromhex(fingerprint(to_parsing_canonical_form(_schema), "CRC-64-AVRO"))
    SCHEMAS[_schema["name"]] = _header, fastavro.parse_schema(_schema)
NAN: Final = float("nan")
DEEP: Final = "[" * 100_000
HALF_EMOJI: Final = '"smile \\ud83d"'
# What an agent emits as the attributes of a span. The last ones are too long for the log: they go to the blob store.
ATTRIBUTES: Final[dict[str, dict[str, Any]]] = {
    "half an emoji": {"gen_ai.operation.name": "chat", "gen_ai.input.messages": HALF_EMOJI, "note": "\ud83d"},
    "half an emoji in a message": {
        "gen_ai.operation.name": "chat",
        "gen_ai.input.messages": '[{"role": "user", "content": "\\ud83d"}]',
        "gen_ai.output.messages": '[{"role": "assistant", "content": "\\ude00"}]',
    },
    "NaN": {"note": float("nan"), "gen_ai.usage.input_tokens": float("inf"), "gen_ai.evaluation.score.value": "nan"},
    "wrong types": {"gen_ai.usage.input_tokens": "many", "gen_ai.input.messages": 7, "gen_ai.tool.definitions": True},
    "large numbers": {"note": 2**64, "gen_ai.usage.output_tokens": 2**80, "agentlightning.reward.0.value": 1e308},
    "names": {"": "nothing", "\x00": "\x00", "error.type": ""},
    "deep JSON": {"gen_ai.operation.name": "chat", "gen_ai.input.messages": DEEP},
    "deep JSON beyond 256 KB": {"gen_ai.operation.name": "chat", "gen_ai.input.messages": DEEP * 3},
    "half an emoji beyond 256 KB": {"gen_ai.input.messages": json.dumps("\ud83d" * 50_000)},
}


def encoded(record: str, /, **fields: Any) -> bytes:
    """With fastavro: our own codec would refuse it. Fields that are not given have their defaults, or are empty."""
    prefix, schema = SCHEMAS[record]
    empty = {"string": "", "long": 1, "int": 1, "double": 1.0, "bytes": b"", "boolean": False}
    for each in schema["fields"]:
        kind = each["type"]
        blank = empty.get(kind, {}) if isinstance(kind, str) else {}
        fields.setdefault(each["name"], each.get("default", blank))
    out = BytesIO()
    fastavro.schemaless_writer(out, schema, fields)
    return prefix + out.getvalue()


def span(rollout_id: str, attempt_id: str, **fields: Any) -> bytes:
    """Of a source that is not counted."""
    ids = {"trace_id": "0" * 32, "span_id": "1" * 16, "rollout_id": rollout_id, "attempt_id": attempt_id}
    return encoded("Span", **{"name": "poison", "kind": "llm", "source": "otlp", "start": 1, "end": 2} | ids | fields)


def event(rollout_id: str, attempt_id: str, **fields: Any) -> bytes:
    ids = {"rollout_id": rollout_id, "attempt_id": attempt_id, "attempt": 1, "worker_id": "foreign"}
    return encoded("AttemptEvent", **{"status": "running", "lease_s": 3.0} | ids | fields)


def foreign_task(rollout_id: str, **fields: Any) -> bytes:
    return encoded("RolloutTask", **{"rollout_id": rollout_id, "group_id": "g", "input": "{}", "lease_s": 3.0} | fields)


# Straight to `events`, with the key of a rollout that is running.
EVENTS: Final[dict[str, Callable[[str, str], bytes]]] = {
    "no record": lambda r, a: b"\x00\xff garbage",
    "nothing": lambda r, a: b"",
    "unknown schema": lambda r, a: b"\xc3\x01" + bytes(8) + b"x",
    "cut off": lambda r, a: span(r, a)[:-9],
    "half a token id": lambda r, a: span(r, a, prompt_token_ids=b"\x01\x02\x03", response_token_ids=b"\x01"),
    "negative token id": lambda r, a: span(r, a, response_token_ids=b"\xff" * 8, response_logprobs=bytes(8)),
    "NaN log-probability": lambda r, a: span(r, a, response_token_ids=bytes(4), response_logprobs=b"\x00\x00\xc0\x7f"),
    "NaN reward": lambda r, a: span(r, a, kind="reward", reward=NAN, reward_name="reward"),
    "time beyond dates": lambda r, a: span(r, a, start=2**63 - 1, end=-(2**63)),
    "NaN lease": lambda r, a: event(r, a, lease_s=NAN),
    "unknown status": lambda r, a: event(r, a, status="dancing"),
    "claim without a task": lambda r, a: event(new_id(), new_id(), status="preparing"),
    "claim of no task": lambda r, a: event(new_id(), new_id(), status="preparing", task=b"none"),
    "claim of a task with a NaN lease": lambda r, a: event(
        (i := new_id()), new_id(), status="preparing", lease_s=NAN, task=foreign_task(i, lease_s=NAN)
    ),
}
TASKS: Final[dict[str, Callable[[], bytes]]] = {
    "no record": lambda: b"{}",
    "nothing": lambda: b"",
    "a span": lambda: span(new_id(), new_id()),
}


def control(name: str, **fields: Any) -> bytes:
    return encoded("Control", **{"kind": "routing", "name": name, "body": "{}"} | fields)


CONTROL: Final[dict[str, Callable[[], bytes]]] = {
    "no record": lambda: b"\xff",
    "no JSON": lambda: control("~", kind="resources", body="{"),
    "a list": lambda: control("~~", kind="resources", body="[]"),
    "a model that is a number": lambda: control(
        "~~~", kind="resources", experiment_id="poison", body='{"m": {"type": "llm", "model": 5, "model_version": []}}'
    ),
    "a table of no models": lambda: control("~", body='{"models": [1]}'),
    "a pause that is no boolean": lambda: control("poison", kind="pause", body='"yes"'),
    "deep JSON": lambda: control("~", body=DEEP),
}
