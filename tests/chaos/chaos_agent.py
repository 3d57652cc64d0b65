"""The agent of the chaos runs: some model calls with waits between them; writes down how each attempt starts and ends.

The file is the independent witness: executions are counted from it and not from events.
"""

import asyncio
import json
import os
import random
import time

import openai

client = openai.AsyncOpenAI(max_retries=4)


def note(**what):
    line = json.dumps(what | {"pid": os.getpid(), "time": time.time()}) + "\n"
    file = os.open(os.environ["CHAOS_LEDGER"], os.O_WRONLY | os.O_APPEND | os.O_CREAT)
    try:
        os.write(file, line.encode())
    finally:
        os.close(file)


async def agent(task, rollout):
    rng = random.Random(task["seed"])
    note(event="start", rollout=rollout.rollout_id, attempt=rollout.attempt_id)
    try:
        for turn in range(rng.randint(1, 4)):
            note(event="turn", rollout=rollout.rollout_id, attempt=rollout.attempt_id)
            await asyncio.sleep(rng.choice((0.0, 0.05, 0.3, 1.0)))
            await client.chat.completions.create(
                model="policy", messages=[{"role": "user", "content": f"turn {turn}"}], max_tokens=1
            )
        if rng.random() < 0.05 and rollout.attempt == 1:
            raise RuntimeError("fails once")
        return 1.0
    finally:
        note(event="end", rollout=rollout.rollout_id, attempt=rollout.attempt_id)
