"""A rollout as a conversation: what was said to the model, what it answered, and what tools and rewards came of it."""

from collections.abc import Sequence
from dataclasses import dataclass

import orjson

from millstream.pipeline.store.rollout_diff import error_of, step_of, step_spans
from millstream.schemas.spans import semconv
from millstream.schemas.wire.records import Span


@dataclass(frozen=True, slots=True)
class Line:
    """``who``: a role (system, user, assistant, tool), ``error``, or ``reward NAME``."""

    who: str
    text: str


def conversation(spans: Sequence[Span]) -> list[Line]:
    """The lines of an attempt in log order. Messages that a call repeats from the one before it are left out. A call
    that two sources recorded is there once."""
    found: list[Line] = []
    known: list[Line] = []  # the last call's messages, and its answer
    for span in step_spans(spans):
        attributes = span.attributes
        if span.kind == semconv.LLM:
            asked = lines_of(attributes.get(semconv.REQUEST_MESSAGES) or attributes.get(semconv.INPUT_MESSAGES), "user")
            said = attributes.get(semconv.RESPONSE_MESSAGE) or attributes.get(semconv.OUTPUT_MESSAGES)
            answered = lines_of(said, "assistant")
            same = next((n for n, (a, b) in enumerate(zip(asked, known, strict=False)) if a != b), len(known))
            found += [*asked[same:], *answered]
            known = [*asked, *answered]
            if error := error_of(span):
                found.append(Line("error", error))
            continue
        step = step_of(span)
        who = f"tool {step.name}" if span.kind == semconv.TOOL else f"reward {span.reward_name or ''}".rstrip()
        found.append(Line(who, step.text))
    return found


def printed(spans: Sequence[Span]) -> list[Line]:
    """What the code of an attempt has printed, ``who``: stdout or stderr. The first line says how many are missing."""
    found: list[Line] = []
    for span in spans:
        if left_out := span.attributes.get(semconv.PRINTED_LEFT_OUT):
            found.append(Line("", f"… {left_out} earlier lines are in the runner's log"))
        events = [event.attributes for event in span.events if event.name == semconv.PRINTED]
        found += [Line(said.get(semconv.PRINTED_STREAM, ""), said.get(semconv.PRINTED_TEXT, "")) for said in events]
    return found


def lines_of(text: str | None, who: str) -> list[Line]:
    """Messages, or one, as JSON in OpenAI's form or that of the semantic conventions; other text as it is."""
    if not text:
        return []
    try:
        messages = orjson.loads(text)
    except orjson.JSONDecodeError:
        return [Line(who, text)]
    if not isinstance(messages, list):
        messages = [messages]
    if not all(isinstance(message, dict) for message in messages):
        return [Line(who, text)]
    return [Line(str(message.get("role") or who), _said(message)) for message in messages]


def _said(message: dict[str, object]) -> str:
    parts = message.get("parts", message.get("content"))
    calls = message.get("tool_calls")
    said = [_part(part) for part in (parts if isinstance(parts, list) else [parts]) if part is not None]
    said += [_part(call) for call in (calls if isinstance(calls, list) else ())]
    return "\n".join(filter(None, said))


def _part(part: object) -> str:
    """A text, a tool call as ``name(arguments)``, anything else as JSON."""
    if isinstance(part, str):
        return part
    if isinstance(part, dict):
        for name in ("text", "content"):
            if isinstance(text := part.get(name), str):
                return text
        function = part.get("function", part)
        if isinstance(function, dict) and "name" in function:
            arguments = function.get("arguments", function.get("input"))
            return (
                f"{function['name']}({arguments if isinstance(arguments, str) else orjson.dumps(arguments).decode()})"
            )
    return orjson.dumps(part).decode()
