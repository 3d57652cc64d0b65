"""The attribute names of tracing libraries: a table of dialects, which translates spans to the names of `semconv`.

Log and store keep spans unchanged; readers of a trace call `normalised`. Pure. The dialects:

- OpenTelemetry's semantic conventions for generative AI: the current ones (nothing to do), and the earlier ones, with
  messages in ``gen_ai.prompt.N.*`` or in span events (semantic conventions 1.27 to 1.36).
- OpenInference (Arize): ``openinference.span.kind``, ``llm.*``.
- OpenLLMetry (Traceloop): ``traceloop.*``, ``llm.request.*`` beside the earlier conventions.
- Agent Lightning 0.3: ``agentlightning.*``, token ids as lists of numbers; its tracer adds AgentOps' ``agentops.*``.
"""

import struct
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any, Final

from millstream.schemas.spans import semconv
from millstream.schemas.spans.text import json_text, parsed
from millstream.schemas.wire.records import Span, SpanEvent

Attributes = Mapping[str, str]


@dataclass(frozen=True, slots=True)
class Dialect:
    """``says``: the attributes with a span's kind, whose values (in lower case) ``kinds`` maps to `Span.kind`.
    ``names``: theirs → ours; of several for one of ours the first counts. ``prompts``, ``completions`` and ``tools``
    are the prefixes of numbered attributes."""

    says: Sequence[str]
    kinds: Mapping[str, str]
    names: Mapping[str, str]
    prompts: str = ""
    completions: str = ""
    tools: str = ""


DIALECTS: Final = {
    "GenAI, earlier": Dialect(
        ("gen_ai.request.type",),
        {"chat": semconv.LLM, "completion": semconv.LLM},
        {
            "gen_ai.usage.prompt_tokens": semconv.INPUT_TOKENS,
            "gen_ai.usage.completion_tokens": semconv.OUTPUT_TOKENS,
            "gen_ai.prompt": semconv.INPUT_MESSAGES,
            "gen_ai.completion": semconv.OUTPUT_MESSAGES,
        },
        "gen_ai.prompt.",
        "gen_ai.completion.",
        "gen_ai.request.functions.",
    ),
    "OpenInference": Dialect(
        ("openinference.span.kind",),
        {"llm": semconv.LLM, "tool": semconv.TOOL, "agent": semconv.AGENT, "chain": semconv.CHAIN},
        {
            "llm.model_name": semconv.RESPONSE_MODEL,
            "llm.token_count.prompt": semconv.INPUT_TOKENS,
            "llm.token_count.completion": semconv.OUTPUT_TOKENS,
            "llm.finish_reason": semconv.FINISH_REASONS,
            "llm.tools": semconv.TOOL_DEFINITIONS,
            "agent.name": semconv.AGENT_NAME,
            "tool.name": semconv.TOOL_NAME,
            "tool_call.id": semconv.TOOL_CALL_ID,
        },
        "llm.input_messages.",
        "llm.output_messages.",
        "llm.tools.",
    ),
    "OpenLLMetry": Dialect(
        ("traceloop.span.kind", "llm.request.type"),
        {
            "workflow": semconv.CHAIN,
            "task": semconv.CHAIN,
            "agent": semconv.AGENT,
            "tool": semconv.TOOL,
            "chat": semconv.LLM,
            "completion": semconv.LLM,
        },
        {
            "llm.usage.prompt_tokens": semconv.INPUT_TOKENS,
            "llm.usage.completion_tokens": semconv.OUTPUT_TOKENS,
            "llm.response.finish_reason": semconv.FINISH_REASONS,
        },
        tools="llm.request.functions.",
    ),
    "AgentOps": Dialect(
        ("agentops.span.kind",),
        {
            "llm": semconv.LLM,
            "tool": semconv.TOOL,
            "agent": semconv.AGENT,
            "workflow": semconv.CHAIN,
            "task": semconv.CHAIN,
            "operation": semconv.CHAIN,
            "session": semconv.CHAIN,
        },
        {"tool.call.id": semconv.TOOL_CALL_ID},
    ),
}

# These mean something else on other spans: only an agent's own name, only a tool's arguments and result.
_AGENT_NAMES: Final = ("graph.node.id", "traceloop.entity.name", "operation.name")
_TOOL_NAMES: Final = ("traceloop.entity.name", "operation.name")
_TOOL_INPUTS: Final = ("input.value", "traceloop.entity.input", "tool.parameters")
_TOOL_OUTPUTS: Final = ("output.value", "traceloop.entity.output", "tool.result")

# OpenInference has no name for a response id: it is in the answer, as OpenAI returned it or as LangChain keeps it.
_ANSWER: Final = "output.value"
_ANSWERED_IDS: Final = (("id",), ("llm_output", "id"))

_PROMPT_IDS: Final = "prompt_token_ids"
_RESPONSE_IDS: Final = "response_token_ids"
_LOGPROBS: Final = "logprobs.content"
_REWARD: Final = "agentlightning.reward."
_LINK: Final = "agentlightning.link."
_DIGITS: Final = 10  # of the number of a message, at most

# Events that hold a message, and its role.
_MESSAGE_EVENTS: Final = {
    "gen_ai.system.message": "system",
    "gen_ai.user.message": "user",
    "gen_ai.assistant.message": "assistant",
    "gen_ai.tool.message": "tool",
    "gen_ai.choice": "assistant",
}
# Events that hold whole lists in their attributes.
_LIST_EVENTS: Final = frozenset(
    {"gen_ai.content.prompt", "gen_ai.content.completion", "gen_ai.client.inference.operation.details"}
)

# The first of numbered messages has one of these; a first one that only calls tools comes second.
_FIRST: Final = ("0.role", "0.message.role", "1.role", "1.message.role")

# A span without any of these needs no translation.
_MARKERS: Final = frozenset(
    [
        *(name for dialect in DIALECTS.values() for name in (*dialect.says, *dialect.names)),
        *(f"{dialect.prompts}{first}" for dialect in DIALECTS.values() for first in _FIRST if dialect.prompts),
        *(_PROMPT_IDS, _RESPONSE_IDS, _LOGPROBS, _LINK + "0.key_match"),
    ]
)


def kind_of(attributes: Attributes) -> str:
    """`Span.kind`: from the operation, in any dialect; any other span with a score is a reward."""
    operation = attributes.get(semconv.OPERATION)
    if operation is not None and operation in semconv.KIND_OF_OPERATION:
        return semconv.KIND_OF_OPERATION[operation]
    if _TELLING.isdisjoint(attributes):  # nearly all spans, and this runs in the agent's time
        return semconv.SPAN
    if semconv.EVALUATION_SCORE in attributes or semconv.AGL_REWARD_VALUE in attributes:
        return semconv.REWARD
    for name, kinds in _KINDS:
        if name in attributes:
            # AgentOps writes some as Python shows an enum's member: AgentOpsSpanKindValues.TOOL.
            kind = kinds.get(attributes[name].rpartition(".")[2].lower())
            if kind is not None:
                return kind
    return semconv.ALERT if semconv.ALERT_NAME in attributes else semconv.SPAN


_KINDS: Final = [(name, dialect.kinds) for dialect in DIALECTS.values() for name in dialect.says]
_TELLING: Final = frozenset(
    [semconv.EVALUATION_SCORE, semconv.AGL_REWARD_VALUE, semconv.ALERT_NAME, *(name for name, _ in _KINDS)]
)


def rewards_of(attributes: Attributes) -> list[tuple[str | None, float]]:
    """The dimensions of a reward span by name, the primary one first; none if it has a label instead of a score. The
    primary one is the span's reward; others count where rewards are weighed by name."""
    dimensions = _numbered(attributes, _REWARD)
    try:
        rewards = [(given.get("name"), float(given["value"])) for given in dimensions]
        if semconv.EVALUATION_SCORE in attributes:
            name = attributes.get(semconv.EVALUATION_NAME) or (rewards[0][0] if rewards else None)
            rewards[:1] = [(name, float(attributes[semconv.EVALUATION_SCORE]))]
    except (KeyError, ValueError):
        return []
    return rewards


def normalised(span: Span) -> Span:
    """The span with the names of `semconv`, with token ids in their fields; the span itself if nothing changes.

    What it has in our names stays; what it had in others stays beside them. A text that is not what its name promises
    is left as it is.
    """
    attributes = span.attributes
    if _MARKERS.isdisjoint(attributes) and not (
        span.events and any(event.name in _MESSAGE_EVENTS or event.name in _LIST_EVENTS for event in span.events)
    ):
        return span
    kind = span.kind if span.kind != semconv.SPAN else kind_of(attributes)
    found = dict(attributes)
    for dialect in DIALECTS.values():
        for theirs, ours in dialect.names.items():
            _copy(attributes, (theirs,), found, ours)
    changes: dict[str, Any] = {"kind": kind, "attributes": found}
    if kind == semconv.LLM:
        _add_conversation(found, span.events)
        if (response_id := _answered_id(attributes)) is not None:
            found.setdefault(semconv.RESPONSE_ID, response_id)
        changes |= _tokens(span)
    elif kind == semconv.TOOL:
        _copy(attributes, _TOOL_NAMES, found, semconv.TOOL_NAME)
        _copy(attributes, _TOOL_INPUTS, found, semconv.TOOL_ARGUMENTS)
        _copy(attributes, _TOOL_OUTPUTS, found, semconv.TOOL_RESULT)
    elif kind == semconv.AGENT:
        _copy(attributes, _AGENT_NAMES, found, semconv.AGENT_NAME)
    elif kind == semconv.REWARD:
        for link in _numbered(attributes, _LINK):
            if link.get("key_match") == semconv.RESPONSE_ID:
                _copy(link, ("value_match",), found, semconv.REWARD_FOR)
    return replace(span, **changes)


def _copy(source: Attributes, theirs: Iterable[str], found: dict[str, str], ours: str) -> None:
    """The first of ``theirs`` that is set, unless ``ours`` is set."""
    if ours not in found and (value := next((source[n] for n in theirs if n in source), None)) is not None:
        found[ours] = value


def _add_conversation(found: dict[str, str], events: Sequence[SpanEvent]) -> None:
    """Messages, tools and finish reasons of an LLM call; messages in OpenAI's form."""
    prompt, completion = _from_events(found, events)
    tools: list[Any] = []
    for dialect in DIALECTS.values():
        if dialect.prompts:
            prompt = prompt or [_message(given) for given in _numbered(found, dialect.prompts)]
            completion = completion or [_message(given) for given in _numbered(found, dialect.completions)]
        if dialect.tools:
            tools = tools or [_tool(given) for given in _numbered(found, dialect.tools)]
    reasons = [reason for message in completion if (reason := message.pop("finish_reason", None)) is not None]
    for ours, values in (
        (semconv.INPUT_MESSAGES, prompt),
        (semconv.OUTPUT_MESSAGES, completion),
        (semconv.TOOL_DEFINITIONS, tools),
        (semconv.FINISH_REASONS, reasons),
    ):
        if values and ours not in found:
            found[ours] = json_text(values)
    reason = found.get(semconv.FINISH_REASONS, "[")
    if not reason.startswith("["):
        found[semconv.FINISH_REASONS] = json_text([reason])


def _message(given: Attributes) -> dict[str, Any]:
    given = {name.removeprefix("message."): value for name, value in given.items()}
    message: dict[str, Any] = {"role": given.get("role", "assistant"), "content": given.get("content")}
    message |= {name: given[name] for name in ("name", "tool_call_id", "finish_reason") if name in given}
    if parts := _numbered(given, "contents."):
        message["content"] = [_part(part) for part in parts]
    if calls := _numbered(given, "tool_calls."):
        message["tool_calls"] = [_tool_call(call) for call in calls]
    return message


def _part(given: Attributes) -> dict[str, Any]:
    url = given.get("message_content.image.image.url")
    if url is not None:
        return {"type": "image_url", "image_url": {"url": url}}
    return {"type": "text", "text": given.get("message_content.text", "")}


def _tool_call(given: Attributes) -> dict[str, Any]:
    given = {name.removeprefix("tool_call.").removeprefix("function."): value for name, value in given.items()}
    function = {"name": given.get("name", ""), "arguments": given.get("arguments", "{}")}
    return {"id": given.get("id", ""), "type": "function", "function": function}


def _tool(given: Attributes) -> Any:
    if "tool.json_schema" in given:
        return _parsed(given["tool.json_schema"])
    return {"type": "function", "function": {**given, "parameters": _parsed(given.get("parameters", "{}"))}}


def _from_events(found: dict[str, str], events: Sequence[SpanEvent]) -> tuple[list[Any], list[Any]]:
    prompt: list[Any] = []
    completion: list[Any] = []
    for event in events:
        attributes = event.attributes
        if event.name in _LIST_EVENTS:
            _copy(attributes, (semconv.INPUT_MESSAGES, "gen_ai.prompt"), found, semconv.INPUT_MESSAGES)
            _copy(attributes, (semconv.OUTPUT_MESSAGES, "gen_ai.completion"), found, semconv.OUTPUT_MESSAGES)
            _copy(attributes, (semconv.TOOL_DEFINITIONS,), found, semconv.TOOL_DEFINITIONS)
        elif event.name in _MESSAGE_EVENTS:
            # The body, where there is one, is JSON in an attribute; else the attributes are the body.
            given = _mapping(attributes.get("gen_ai.event.content")) or attributes
            said = _mapping(given.get("message")) or given
            message = {"role": _MESSAGE_EVENTS[event.name], "content": None}
            message |= {name: _parsed(said[name]) for name in ("role", "tool_calls") if name in said}
            message |= {name: said[name] for name in ("content", "tool_call_id") if name in said}
            if "finish_reason" in given:
                message["finish_reason"] = given["finish_reason"]
            if message["role"] == "tool" and "id" in said:
                message["tool_call_id"] = said["id"]
            (completion if event.name == "gen_ai.choice" else prompt).append(message)
    return prompt, completion


def _answered_id(attributes: Attributes) -> str | None:
    if semconv.RESPONSE_ID in attributes or _ANSWER not in attributes:
        return None
    for way in _ANSWERED_IDS:
        value: Any = _mapping(attributes[_ANSWER])
        for step in way:
            value = value.get(step) if isinstance(value, dict) else None
        if isinstance(value, str):
            return value
    return None


def _tokens(span: Span) -> dict[str, bytes]:
    """The empty typed fields, filled from lists in attributes."""
    found = {}
    attributes = span.attributes
    if span.prompt_token_ids is None and (ids := _packed("i", attributes.get(_PROMPT_IDS))) is not None:
        found["prompt_token_ids"] = ids
    if span.response_token_ids is None and (ids := _packed("i", attributes.get(_RESPONSE_IDS))) is not None:
        found["response_token_ids"] = ids
    if span.response_logprobs is None and (logprobs := _packed("f", attributes.get(_LOGPROBS))) is not None:
        found["response_logprobs"] = logprobs
    return found


def _packed(form: str, text: str | None) -> bytes | None:
    """A JSON list of numbers, or of tokens as OpenAI's logprobs have them, as little-endian bytes."""
    values = _parsed(text)
    if not isinstance(values, list):
        return None
    try:
        numbers = [value["logprob"] if isinstance(value, dict) else value for value in values]
        return struct.pack(f"<{len(numbers)}{form}", *numbers)
    except (KeyError, OverflowError, struct.error):
        return None


def _numbered(attributes: Attributes, prefix: str) -> list[dict[str, str]]:
    """``PREFIXN.rest`` by N, each as a mapping of ``rest``."""
    found: dict[int, dict[str, str]] = {}
    for name, value in attributes.items():
        if name.startswith(prefix):
            number, _, rest = name[len(prefix) :].partition(".")
            if number.isdecimal() and len(number) <= _DIGITS and rest:
                found.setdefault(int(number), {})[rest] = value
    return [found[number] for number in sorted(found)]


def _mapping(value: Any) -> dict[str, Any]:
    value = _parsed(value)
    return value if isinstance(value, dict) else {}


def _parsed(text: Any) -> Any:
    """The JSON value; text that is not JSON stays as it is."""
    try:
        return parsed(text) if isinstance(text, str) else text
    except ValueError:
        return text
