"""An agent within Agent Lightning's own tracer and with its emitters. It asks for token ids and logprobs, as Agent
Lightning's proxy does for its agents."""

import os
from typing import Any

os.environ["LITELLM_LOCAL_MODEL_COST_MAP"] = "True"  # it asks the network otherwise

import agentlightning as agl
from agentlightning.tracer import AgentOpsTracer

tracer = AgentOpsTracer()
tracer.init()
tracer.init_worker(0)

from examples.frameworks.openai_sdk import client  # noqa: E402
from examples.frameworks.weather import MODEL, WEATHER_SCHEMA, question, weather  # noqa: E402

TOKENS: Any = {"extra_body": {"return_token_ids": True}, "logprobs": True}


async def agent(task: dict[str, Any]) -> None:
    async with tracer.trace_context(name="forecast"):
        messages = question(task["city"])
        offered: Any = [{"type": "function", "function": WEATHER_SCHEMA}]
        message = (
            client.chat.completions.create(model=MODEL, messages=messages, tools=offered, **TOKENS).choices[0].message
        )
        agl.emit_reward(0.5)
        told = {"role": "tool", "tool_call_id": message.tool_calls[0].id, "content": weather(task["city"])}
        client.chat.completions.create(model=MODEL, messages=[*messages, message, told], tools=offered, **TOKENS)
        agl.emit_reward({"right": 1.0, "short": 0.25}, primary_key="right")
        agl.emit_message("done")
