"""The agent of the chaos runs: some model calls with waits between them; writes down how each attempt starts and ends.

The file is the independent witness: executions are counted from it and not from events. A task may ask for a prompt of
many ``bytes``, for a span of ``poison``, or for a call that waits until it is cancelled (``hold``).
"""

import asyncio
import json
import os
import random
import time

import openai
from poison import ATTRIBUTES

import millstream as ms

client = openai.AsyncOpenAI(max_retries=4)


def note(**what):
    line = json.dumps(what | {"pid": os.getpid(), "runner": os.getppid(), "time": time.time()}) + "\n"
    file = os.open(os.environ["CHAOS_LEDGER"], os.O_WRONLY | os.O_APPEND | os.O_CREAT)
    try:
        os.write(file, line.encode())
    finally:
        os.close(file)


def emit_poison(kind):
    try:
        ms.emit_span("poison", ATTRIBUTES[kind])
    except ValueError as error:  # refused, and the agent goes on
        print(f"{kind}: {error}"[:200])
    if kind == "large numbers":
        ms.emit_reward(1e308)
        ms.emit_reward(1e308)


async def agent(task, rollout):
    rng = random.Random(task["seed"])
    note(event="start", rollout=rollout.rollout_id, attempt=rollout.attempt_id)
    try:
        if task.get("hold"):
            await asyncio.sleep(600)
        if "poison" in task:
            emit_poison(task["poison"])
        content = "x" * task.get("bytes", 0)
        for turn in range(rng.randint(1, 4)):
            note(event="turn", rollout=rollout.rollout_id, attempt=rollout.attempt_id)
            await asyncio.sleep(rng.choice((0.0, 0.05, 0.3, 1.0)))
            await client.chat.completions.create(
                model="policy", messages=[{"role": "user", "content": f"turn {turn}{content}"}], max_tokens=1
            )
        if rng.random() < 0.05 and rollout.attempt == 1:
            raise RuntimeError("fails once")
        return 1.0
    finally:
        note(event="end", rollout=rollout.rollout_id, attempt=rollout.attempt_id)
