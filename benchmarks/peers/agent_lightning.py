"""Rollouts per second of Agent Lightning 0.3's client-server mode, with an agent that only emits spans.

Run by `pipeline.py --peer PYTHON` with an interpreter that has agentlightning==0.3.0 and opentelemetry-sdk==1.39.1
(with later ones its exporter does not find its own server).
"""

import asyncio
import json
import sys
import time
from typing import Any

import agentlightning as agl
from opentelemetry import trace

COUNT, RUNNERS, SPANS, PORT = map(int, sys.argv[1:5])


class Agent(agl.LitAgent):
    def rollout(self, task: Any, resources: Any, rollout: Any) -> float:
        tracer = trace.get_tracer("agent")
        for number in range(SPANS):
            tracer.start_span(f"step {number}", attributes={"number": number}).end()
        return 1.0


class Measure(agl.Algorithm):
    async def run(self, train_dataset: Any = None, val_dataset: Any = None) -> None:
        store = self.get_store()
        await store.add_resources({"prompt": agl.PromptTemplate(template="x", engine="f-string")})

        async def finish(count: int) -> float:
            began = time.perf_counter()
            enqueued = [store.enqueue_rollout(input=None, mode="train") for _ in range(count)]
            left = {rollout.rollout_id for rollout in await asyncio.gather(*enqueued)}
            while left:
                done = await store.wait_for_rollouts(rollout_ids=list(left), timeout=1.0)
                left -= {rollout.rollout_id for rollout in done}
            return time.perf_counter() - began

        await finish(2 * RUNNERS)
        print("RESULT", json.dumps(COUNT / await finish(COUNT)), flush=True)


if __name__ == "__main__":
    strategy = {"type": "cs", "server_port": PORT}
    trainer = agl.Trainer(algorithm=Measure(), n_runners=RUNNERS, tracer=agl.OtelTracer(), strategy=strategy)
    trainer.fit(Agent(), train_dataset=[None])
