"""Records as the roles write them, for tests."""

import struct
from collections.abc import Sequence
from typing import Any

from millstream.pipeline.training.groups import FinishedRollout
from millstream.pipeline.training.report import StepReport
from millstream.schemas.ids import new_id
from millstream.schemas.spans import semconv
from millstream.schemas.wire import codec
from millstream.schemas.wire.records import AttemptEvent, ErrorInfo, RolloutEnd, RolloutTask, Span, Triplet

T0 = 1_800_000_000_000_000_000  # ns


def task(**fields: Any) -> RolloutTask:
    rollout_id = fields.pop("rollout_id", None) or new_id()
    defaults: dict[str, Any] = {
        "rollout_id": rollout_id,
        "group_id": rollout_id,
        "input": "{}",
        "timeout_s": 60.0,
        "lease_s": 10.0,
        "created_at": T0,
    }
    return RolloutTask(**{**defaults, **fields})


def event(of: RolloutTask, attempt_id: str, status: str, **fields: Any) -> AttemptEvent:
    defaults: dict[str, Any] = {
        "rollout_id": of.rollout_id,
        "attempt_id": attempt_id,
        "attempt": of.attempt,
        "status": status,
        "worker_id": "w",
        "time": T0 + 5,
        "lease_s": of.lease_s,
        "task": codec.encode(of) if status == "preparing" else None,
        "error": ErrorInfo(type="ValueError", message="no", stack="") if status == "failed" else None,
    }
    return AttemptEvent(**{**defaults, **fields})


def span(of: RolloutTask, attempt_id: str, **fields: Any) -> Span:
    defaults: dict[str, Any] = {
        "trace_id": "0" * 32,
        "span_id": new_id().replace("-", "")[-16:],
        "name": "work",
        "kind": semconv.SPAN,
        "start": T0 + 1,
        "end": T0 + 2,
        "rollout_id": of.rollout_id,
        "attempt_id": attempt_id,
        "source": semconv.SOURCE_AGENT,
        "sequence": 1,
    }
    return Span(**{**defaults, **fields})


def call(of: RolloutTask, attempt_id: str, response_id: str, **fields: Any) -> Span:
    """An LLM call as the proxy records it: prompt tokens 1 2 3, one response token."""
    defaults: dict[str, Any] = {
        "kind": semconv.LLM,
        "source": semconv.SOURCE_PROXY,
        "status": "Ok",
        "attributes": {
            semconv.RESPONSE_ID: response_id,
            semconv.REQUEST_MESSAGES: '[{"role": "user", "content": "hi"}]',
            semconv.RESPONSE_MESSAGE: '{"role": "assistant", "content": "add"}',
        },
        "prompt_token_ids": struct.pack("<3i", 1, 2, 3),
        "response_token_ids": struct.pack("<i", 7),
        "response_logprobs": struct.pack("<f", -0.5),
        "model_version": "run.0.1",
    }
    return span(of, attempt_id, **{**defaults, **fields})


def reward(of: RolloutTask, attempt_id: str, value: float) -> Span:
    return span(of, attempt_id, kind=semconv.REWARD, reward=value, reward_name="reward", name="reward")


def finished(name: str, turns: Sequence[dict[str, Any]], status: str = "succeeded", **end: Any) -> FinishedRollout:
    """As a trainer collects it. ``turns`` are fields of triplets."""
    common = {"rollout_id": name, "attempt_id": "a", "group_id": "g", "span_id": "s", "prompt": "", "response": ""}
    triplets = tuple(Triplet(**{**common, "turn": i, **fields}) for i, fields in enumerate(turns))
    ended = RolloutEnd(
        rollout_id=name, group_id="g", group_size=8, status=status, attempts=1, created_at=0, ended_at=0, **end
    )
    return FinishedRollout(ended, triplets)


def tokens(prompt: Sequence[int], response: Sequence[int], logprobs: Sequence[float]) -> dict[str, Any]:
    """These fields of a triplet."""
    return {
        "prompt_token_ids": struct.pack(f"<{len(prompt)}i", *prompt),
        "response_token_ids": struct.pack(f"<{len(response)}i", *response),
        "response_logprobs": struct.pack(f"<{len(logprobs)}f", *logprobs),
    }


# Turns of two rollouts; those of the first continue each other token by token.
CONVERSATION = [tokens([2, 5], [6], [-1.0]), tokens([2, 5, 6, 8, 9], [3, 4], [-2.0, -3.0]) | {"reward": 1.0}]
AFTER_A_BREAK = [tokens([2, 5], [6], [-1.5]), tokens([2, 7, 8, 9], [3, 4], [-2.0, -3.0]) | {"reward": 0.0}]


def step_report(**fields: Any) -> StepReport:
    """Of the fifth step."""
    return StepReport(
        **{
            "step": 4,
            "model_version": "calc.1.4",
            "reward": 0.75,
            "rollouts": 16,
            "failed": 2,
            "rollouts_per_second": 3.0,
            "spans": 100,
            "seconds": 9.0,
            "metrics": {"kl": 0.01},
            "validation_reward": 0.5,
            "groups": 3,
            "staleness_mean": 1.5,
            "staleness_max": 2,
            "tokens": 77,
            "phases": {"wait": 1.0, "update": 2.0, "save": 0.5, "publish": 0.5, "other": 0.0},
            **fields,
        }
    )
