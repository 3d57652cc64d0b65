"""The adapter on recorded traces of real frameworks, in each dialect: the expected results are written by hand.

``python tests/support/frameworks/record.py`` records them again. The recorded agents get 1 for an answer that names the
city. Their model server says that each prompt has the tokens 0 to 10 and each response 1 to 3; the proxy asks for them.
"""

import json
import struct
from dataclasses import dataclass, replace
from pathlib import Path

import fastavro
import pytest
from factories import task

from millstream.consumers.adapter.triplets import Trace, TripletMaker
from millstream.pipeline.training.datasets import messages
from millstream.schemas.config.triplet_rules import TripletRules
from millstream.schemas.spans import semconv
from millstream.schemas.wire.records import Span, SpanEvent, SpanLink

TRACES = Path(__file__).parents[2] / "support" / "frameworks" / "traces"
NO_TOKENS = "no token ids or no logprobs"

ASKED = "user: How is the weather in Paris?"
CALLS = 'assistant: weather({"city": "Paris"})'
TOLD = "tool: 21 degrees in Paris"
ANSWER = "assistant: Tool: 21 degrees in Paris"
HANDS_OVER = "assistant: transfer_to_forecaster({})"
AUTOGEN = (
    "system: You are a helpful AI assistant. Solve tasks using your tools. "
    "Reply with TERMINATE when the task has been completed."
)


def crewai(role, backstory, goal, asked, expected, told=""):
    """What CrewAI makes of an agent and its task."""
    given = f"This is the context you're working with:\n{told}\n\nProvide your complete response:" if told else ""
    task = (
        f"user: \nCurrent Task: {asked}\n\nThis is the expected criteria for your final answer: {expected}\n"
        "you MUST return the actual complete content as the final answer, not a summary."
    )
    return [f"system: You are {role}. {backstory}\nYour personal goal is: {goal}", task + f"\n\n{given}" * bool(given)]


FORECASTER = crewai("forecaster", "You look.", "Know the weather", "How is the weather in Paris?", "degrees")
EDITOR = crewai(
    *("editor", "You are brief.", "Write reports", "Report: How is the weather in Paris?", "a sentence"),
    told="Tool: 21 degrees in Paris",
)


@dataclass
class Turn:
    agent: str | None
    prompt: list[str]
    response: str
    reward: float | None = None
    reason: str | None = None  # none: trained on
    tools: tuple[str, ...] = ("weather",)
    version: str | None = "run.0.1"


def alone(turn):
    """The call as it is without the proxy: without token ids and model version."""
    return replace(turn, reason=NO_TOKENS, version=None)


def tool_use(agent, *, first=CALLS, told=(ASKED, CALLS, TOLD), last_tools=("weather",)):
    """The model asks for the tool, gets its result, and answers."""
    return [Turn(agent, [ASKED], first), Turn(agent, list(told), ANSWER, reward=1.0, tools=last_tools)]


GOLDEN = {
    "openai_sdk": tool_use("tests.support.frameworks.recorded:openai_sdk"),
    "openai_sdk_stream": [
        alone(
            Turn(
                "tests.support.frameworks.recorded:openai_sdk",
                [ASKED],
                "assistant: You asked about Paris ",
                1.0,
                tools=(),
            )
        )
    ],
    "openai_sdk_responses": [
        alone(
            Turn(
                "tests.support.frameworks.recorded:openai_sdk",
                [ASKED],
                "assistant: You asked about Paris",
                1.0,
                tools=(),
            )
        )
    ],
    "anthropic_sdk": [*map(alone, tool_use("tests.support.frameworks.recorded:anthropic_sdk"))],
    "langchain": tool_use("forecaster"),
    "langgraph": tool_use("tests.support.frameworks.recorded:langgraph_agent", last_tools=()),
    "openai_agents": [
        Turn("triage", [ASKED], HANDS_OVER, tools=("transfer_to_forecaster",)),
        Turn("forecaster", [ASKED, HANDS_OVER, 'tool: {"assistant": "forecaster"}'], CALLS),
        Turn("forecaster", [ASKED, HANDS_OVER, 'tool: {"assistant": "forecaster"}', CALLS, TOLD], ANSWER, reward=1.0),
    ],
    "autogen": [
        Turn("forecaster", [AUTOGEN, ASKED], CALLS),
        Turn("forecaster", [AUTOGEN, ASKED, CALLS, TOLD], ANSWER, tools=()),
        Turn(
            "critic",
            [AUTOGEN, ASKED, "user: Tool: 21 degrees in Paris"],
            "assistant: You asked about Paris",
            reward=1.0,
            tools=(),
        ),
    ],
    "crewai": [
        Turn("forecaster", FORECASTER, CALLS),
        Turn("forecaster", [*FORECASTER, CALLS, TOLD], ANSWER),
        Turn("editor", EDITOR, "assistant: You asked about Paris", reward=1.0, tools=()),
    ],
    "plain_http": tool_use("tests.support.frameworks.recorded:plain_http"),
    "openinference_openai": [*map(alone, tool_use("tests.support.frameworks.dialects.openinference:openai_agent"))],
    "openinference_langchain": tool_use("tests.support.frameworks.dialects.openinference:langchain_agent"),
    "openllmetry_openai": tool_use("tests.support.frameworks.dialects.openllmetry:openai_agent"),
    "openllmetry_langchain": [*map(alone, tool_use("forecaster"))],
    # AgentOps records neither which tools a model asks for nor, of earlier answers, that they did.
    "agent_lightning": [
        Turn(
            "tests.support.frameworks.dialects.agent_lightning:agent", [ASKED], "assistant: ", reward=0.5, version=None
        ),
        Turn(
            "tests.support.frameworks.dialects.agent_lightning:agent", [ASKED, TOLD], ANSWER, reward=1.0, version=None
        ),
    ],
}


TOOL_SPANS = {  # the others record what the model asked for, not that the tool ran
    "langchain",
    "langgraph",
    "openai_agents",
    "autogen",
    "crewai",
    "openinference_langchain",
    "openllmetry_langchain",
    "agent_lightning",
}


def read(name):
    with (TRACES / f"{name}.avro").open("rb") as file:
        return [_span(record) for record in fastavro.reader(file)]


def _span(record):
    events = tuple(SpanEvent(**event) for event in record.pop("events"))
    links = tuple(SpanLink(**link) for link in record.pop("links"))
    return Span(**record, events=events, links=links)


def said(message):
    calls = [f"{c['function']['name']}({c['function']['arguments']})" for c in message.get("tool_calls", ())]
    return f"{message['role']}: {''.join([message.get('content') or '', *calls])}"


def as_turn(triplet):
    (example,) = messages([[replace(triplet, trainable=True)]])
    *prompt, response = map(said, example["messages"])
    tools = tuple(tool["function"]["name"] for tool in example.get("tools", ()))
    return Turn(triplet.agent_name, prompt, response, triplet.reward, triplet.reason, tools, triplet.model_version)


def test_every_recorded_trace_has_its_triplets():
    assert {path.stem for path in TRACES.glob("*.avro")} == set(GOLDEN)


@pytest.mark.parametrize("name", GOLDEN)
def test_triplets(name):
    triplets = TripletMaker(TripletRules(trust_agents=True))(Trace(task(), "a", read(name)))
    assert [as_turn(triplet) for triplet in triplets] == GOLDEN[name]
    for turn, triplet in enumerate(triplets):
        assert triplet.turn == turn
        with_tokens = triplet.reason is None
        assert triplet.prompt_token_ids == (struct.pack("<11i", *range(11)) if with_tokens else None)
        assert triplet.response_token_ids == (struct.pack("<3i", 1, 2, 3) if with_tokens else None)
        assert triplet.response_logprobs == (struct.pack("<3f", -0.5, -0.5, -0.5) if with_tokens else None)


@pytest.mark.parametrize("name", GOLDEN)
def test_calls_and_tools_in_our_names(name):
    spans = Trace(task(), "a", read(name)).spans
    calls = [s.attributes for s in spans if s.kind == semconv.LLM and s.source == semconv.SOURCE_AGENT]
    tools = [s.attributes for s in spans if s.kind == semconv.TOOL]
    assert len(calls) == (0 if name == "plain_http" else len(GOLDEN[name]))
    assert len(tools) == (name in TOOL_SPANS)
    for call in calls:
        assert call[semconv.RESPONSE_ID].startswith(("chatcmpl-", "resp-", "msg-"))
        assert call[semconv.RESPONSE_MODEL].endswith("-served")
        assert (call[semconv.INPUT_TOKENS], call[semconv.OUTPUT_TOKENS]) == ("11", "3")
        assert len(json.loads(call[semconv.FINISH_REASONS])) == 1
    for tool in tools:
        assert tool[semconv.TOOL_NAME] == "weather"
        assert "Paris" in tool[semconv.TOOL_ARGUMENTS]
        if name != "agent_lightning":  # AgentOps' span is of the model's request, not of the tool
            assert "21 degrees in Paris" in tool[semconv.TOOL_RESULT]
