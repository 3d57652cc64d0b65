"""What a store and a log hold, for tests of the pages."""

import json
import math
import struct
import time
from dataclasses import dataclass, field, replace
from typing import Any
from zlib import crc32

import factories

from millstream.consumers.log.memory_log import MemoryLog
from millstream.consumers.sink.clickhouse_writer import ClickHouseWriter
from millstream.consumers.sink.rows import to_rows
from millstream.schemas.config.settings import Settings
from millstream.schemas.ids import new_id
from millstream.schemas.spans import semconv
from millstream.schemas.wire import codec
from millstream.schemas.wire.log import LogRecord, Partition
from millstream.schemas.wire.records import (
    Control,
    DeadLetter,
    RolloutEnd,
    RolloutTask,
    Span,
    TrainingStep,
    Triplet,
    Worker,
)

HOSTILE = '<script>alert("x")</script><img src=x onerror=alert(1)>\x1b[31mred\x1b[0m \u202egnihtemos {{ 7*7 }}'
S = 1_000_000_000


@dataclass
class World:
    """What the store and the log hold."""

    settings: Settings
    log: MemoryLog
    tasks: dict[str, RolloutTask] = field(default_factory=dict)

    def id(self, name: str) -> str:
        return self.tasks[name].rollout_id


class Writing:
    """Records as if they lay on one partition of each topic, in the order given, which `flush` stores all at once."""

    def __init__(self, topics: Any) -> None:
        self._topics = topics
        self._records: list[LogRecord] = []

    def __call__(self, *values: Any, topic: str | None = None) -> None:
        place = Partition(topic or self._topics.events, 0)
        for value in values:
            self._records.append(LogRecord(place, len(self._records), 1, None, codec.encode(value)))

    def flush(self, writer: ClickHouseWriter) -> None:
        tables, unusable = to_rows(self._records, self._topics.events)
        assert not unusable
        for rows in tables:
            rows.insert(writer, new_id())
        self._records = []


def store(world: World, *records: Any, topic: str | None = None) -> None:
    """What a sink would store later."""
    writer, writing = ClickHouseWriter(world.settings), Writing(world.settings.topics)
    writing(*records, topic=topic)
    writing.flush(writer)
    writer.close()


def messages(*pairs: tuple[str, str]) -> str:
    return json.dumps([{"role": role, "content": content} for role, content in pairs])


def conversation_of(task: RolloutTask, attempt: str, question: str, answers: list[str], start: int) -> list[Span]:
    """A root span, and for each answer a call (by the proxy) and a tool."""
    root = factories.span(task, attempt, name="agent", span_id="f" * 16, kind="agent", start=start, end=start + 3 * S)
    spans, said = [root], [("system", "You use a calculator."), ("user", question)]
    for n, answer in enumerate(answers):
        at = start + (n * len(answers) + 1) * S // 4
        words = answer.split()[:50] * 2
        tokens = [10 + crc32(f"{word} {i}".encode()) % 900 for i, word in enumerate(words)]
        spans.append(
            factories.call(
                task,
                attempt,
                f"r{n}",
                name="chat policy",
                sequence=2 * n + 1,
                parent_id="f" * 16,
                start=at,
                end=at + S // 3,
                attributes={
                    semconv.RESPONSE_ID: f"r{n}",
                    semconv.REQUEST_MODEL: "policy",
                    semconv.REQUEST_MESSAGES: messages(*said),
                    semconv.RESPONSE_MESSAGE: json.dumps({"role": "assistant", "content": answer}),
                },
                prompt_token_ids=struct.pack("<6i", 1, 2, 3, 4, 5, 6),
                response_token_ids=struct.pack(f"<{len(tokens)}i", *tokens),
                response_logprobs=struct.pack(f"<{len(tokens)}f", *[-0.05 - 0.6 * (i % 5) for i in range(len(tokens))]),
                model_version="calc.0.3",
            )
        )
        said.append(("assistant", answer))
        spans.append(
            factories.span(
                task,
                attempt,
                name="execute_tool add",
                kind="tool",
                sequence=100 + n,
                parent_id="f" * 16,
                start=at + S // 3,
                end=at + S // 2,
                attributes={
                    "gen_ai.tool.name": "add",
                    "gen_ai.tool.call.arguments": "2, 3",
                    "gen_ai.tool.call.result": "5",
                },
            )
        )
    return spans


def ended(task: RolloutTask, state: str, attempt: str | None, **fields: Any) -> RolloutEnd:
    return RolloutEnd(
        **{
            "rollout_id": task.rollout_id,
            "group_id": task.group_id,
            "group_size": task.group_size,
            "experiment_id": task.experiment_id,
            "mode": task.mode,
            "status": state,
            "attempt_id": attempt,
            "attempts": 1,
            "created_at": task.created_at,
            "started_at": task.created_at + S // 2,
            "ended_at": task.created_at + 3 * S,
            "turns": 2,
            "spans": 6,
            "trainable": state == "succeeded",
            "model_version": "calc.0.3",
        }
        | fields
    )


def triplets_of(
    task: RolloutTask, attempt: str, spans: list[Span], reward: float, reason: str | None = None
) -> list[Triplet]:
    calls = [span for span in spans if span.kind == "llm"]
    return [
        Triplet(
            rollout_id=task.rollout_id,
            attempt_id=attempt,
            group_id=task.group_id,
            experiment_id=task.experiment_id,
            mode=task.mode,
            turn=n,
            span_id=call.span_id,
            prompt=call.attributes[semconv.REQUEST_MESSAGES],
            response=call.attributes[semconv.RESPONSE_MESSAGE],
            prompt_token_ids=call.prompt_token_ids,
            response_token_ids=call.response_token_ids,
            response_logprobs=call.response_logprobs,
            reward=reward if call is calls[-1] else None,
            model_version="calc.0.3",
            trainable=reason is None,
            reason=reason,
        )
        for n, call in enumerate(calls)
    ]


EXPERIMENTS = {
    "e1": {
        "run": "calc",
        "algorithm": "GRPO",
        "arguments": {"lr": 0.001, "groups_per_step": 16},
        "seed": 1,
        "millstream": "0.1.0",
    },
    "e2": {
        "run": "calc-small",
        "algorithm": "GRPO",
        "arguments": {"lr": 0.01, "groups_per_step": 4},
        "seed": 1,
        "millstream": "0.1.0",
    },
}


def fill(write: Writing, world: World) -> None:
    topics, now = world.settings.topics, time.time_ns()

    def task(name: str, **fields: Any) -> RolloutTask:
        made = factories.task(
            **{
                "experiment_id": "e1",
                "input": json.dumps({"question": f"What is 2 + 3? ({name})"}),
                "created_at": now - 20 * S,
            }
            | fields
        )
        world.tasks[name] = made
        write(made, topic=topics.tasks("normal"))
        return made

    def succeeded(made: RolloutTask, reward: float, answers: list[str], reason: str | None = None) -> None:
        attempt = new_id()
        spans = conversation_of(made, attempt, json.loads(made.input)["question"], answers, made.created_at + S)
        given = replace(
            factories.reward(made, attempt, reward), start=made.created_at + 2 * S, end=made.created_at + 2 * S
        )
        write(
            factories.event(made, attempt, "preparing", time=made.created_at + S // 2),
            factories.event(made, attempt, "running", time=made.created_at + S),
            *spans,
            given,
            factories.event(made, attempt, "succeeded", output='"5"', time=made.created_at + 3 * S),
        )
        write(*triplets_of(made, attempt, spans, reward, reason), topic=topics.triplets)
        write(ended(made, "succeeded", attempt, reward=reward, trainable=reason is None, reason=reason))

    for name, (run_reward, answers) in {
        "right": (1.0, ["add(2, 3)", "The answer is 5"]),
        "wrong": (0.0, ["multiply(2, 3)", "The answer is 6"]),
        "also right": (1.0, ["add(2, 3)", "It is 5"]),
    }.items():
        succeeded(task(name, group_id="g-signal", group_size=3), run_reward, answers)
    for name in ("same", "same again"):
        succeeded(task(name, group_id="g-none", group_size=2), 1.0, ["add(2, 3)", "The answer is 5"])
    succeeded(task("untrainable"), 0.5, ["add"], reason="sampled with temperature 0.2")

    failed = task("failed")
    attempt = new_id()
    stack = factories.ErrorInfo(
        type="ValueError", message="three is <b>too</b> many", stack="Traceback:\n  in agent\nValueError"
    )
    write(
        factories.event(failed, attempt, "preparing", time=failed.created_at),
        factories.event(failed, attempt, "failed", error=stack, time=failed.created_at + S),
        ended(failed, "failed", attempt, reason="attempts exhausted: ValueError", model_version=None, turns=0),
    )

    running = task("running")
    write(
        factories.event(running, "at-running", "preparing", time=now - 5 * S),
        factories.event(running, "at-running", "running", time=now - S),
        factories.span(running, "at-running", name="first step", start=now - 4 * S, end=now - 3 * S),
    )
    task("queued")
    hostile = task("hostile", input=json.dumps({"question": HOSTILE}))
    succeeded(hostile, -1.0, [HOSTILE, "x" * 100_000])

    for version in range(6):
        for n in range(4):
            made = task(f"v{version}-{n}", group_id=f"gv{version}", group_size=4, created_at=now - (100 - version) * S)
            reward = min(1.0, 0.15 * version + 0.1 * n)
            write(ended(made, "succeeded", "a", reward=reward, model_version=f"calc.0.{version}"))
    for name, record in EXPERIMENTS.items():
        write(
            Control(kind="experiment", name=name, experiment_id=name, body=json.dumps(record), created_at=now),
            topic=topics.control,
        )
    for step in range(6):
        write(
            TrainingStep(
                experiment_id="e1",
                run="calc",
                step=step,
                model_version=f"calc.0.{step + 1}",
                started_at=now - (60 - step) * S,
                ended_at=now - (59 - step) * S,
                wait_s=0.6,
                update_s=0.2,
                save_s=0.05,
                publish_s=0.05,
                other_s=0.1,
                reward_mean=0.15 * step,
                reward_std=0.2,
                validation_reward=0.9 if step == 5 else None,
                rollouts=4,
                groups=1,
                metrics={"kl": 0.01 * step, "entropy": 1.0 / (step + 1), "nan": math.nan},
                trained=(world.id(f"v{step}-0"),),
            ),
            topic=topics.training,
        )
    write(
        Worker(
            worker_id="w-1",
            role="runner",
            host="h1",
            version="0.1.0",
            slots=8,
            running=3,
            started=now - 60 * S,
            last_seen=now,
        ),
        topic=topics.workers,
    )
    letter = DeadLetter(
        topic=topics.tasks("normal"),
        partition=1,
        offset=7,
        key=b"k",
        value=codec.encode(failed),
        timestamp=now // 10**6,
        role="adapter",
        reason="attempts_exhausted",
        error=f"failed: {HOSTILE}",
        time=now,
    )
    write(letter, topic=topics.dead)
