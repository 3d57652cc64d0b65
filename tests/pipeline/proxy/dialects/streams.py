"""What model servers send, made from their documented formats: the same answer of each, whole and as a stream.

Each differs from the others in form, and the record has to hold the same of all: reasoning, text, tool calls, reasons
and numbers of tokens.
"""

import json
from dataclasses import dataclass, field
from typing import Any

TEXT = "Let me look: ça va 🙂"
THOUGHT = "The user asks for two cities."
CALLS = [("call_a", "weather", {"city": "Oslo"}), ("call_b", "weather", {"city": "Rome"})]
TOOLS = [
    {"type": "function", "function": {"name": "weather", "description": "d", "parameters": {"type": "object"}}},
]
ASKED = {"model": "policy", "messages": [{"role": "user", "content": "weather in Oslo and Rome?"}]}
USAGE = {"prompt_tokens": 7, "completion_tokens": 5, "total_tokens": 12}


@dataclass(frozen=True)
class Dialect:
    """``whole`` and ``stream`` are bodies as the server sends them."""

    whole: bytes
    stream: bytes
    kind: str = "openai"
    path: str = "/v1/chat/completions"
    thinks: bool = False
    calls: bool = True
    reason: str | None = "tool_calls"
    ids: tuple[str, ...] = tuple(call_id for call_id, _, _ in CALLS)
    tokens: list[int] = field(default_factory=list)
    flaw: str | None = None


def sse(*events: Any, space: str = " ", done: bool = True) -> bytes:
    """Text is sent as it is."""
    parts = []
    for event in events:
        if isinstance(event, str):
            parts.append(event)
            continue
        name = f"event: {event['type']}\n" if "type" in event else ""
        parts.append(f"{name}data:{space}{json.dumps(event, ensure_ascii=False)}\n\n")
    return ("".join(parts) + (f"data:{space}[DONE]\n\n" if done else "")).encode()


def call(n: int, **more: Any) -> dict[str, Any]:
    call_id, name, arguments = CALLS[n]
    return {
        "id": call_id,
        "type": "function",
        "function": {"name": name, "arguments": json.dumps(arguments)},
        **more,
    }


def message(**more: Any) -> dict[str, Any]:
    return {"role": "assistant", "content": TEXT, **more}


def body(head: dict[str, Any], said: dict[str, Any], reason: str = "tool_calls", **more: Any) -> bytes:
    choice = {"index": 0, "message": said, "finish_reason": reason, **more}
    whole = {**head, "object": "chat.completion", "choices": [choice], "usage": USAGE}
    return json.dumps(whole, ensure_ascii=False).encode()


def chunker(head: dict[str, Any], **always: Any):
    head = {**head, "object": "chat.completion.chunk"}

    def chunk(delta: dict[str, Any] | None, reason: str | None = None, **more: Any) -> dict[str, Any]:
        choices = [] if delta is None else [{"index": 0, "delta": delta, "finish_reason": reason, **always}]
        return {**head, "choices": choices, **more}

    return chunk


def pieces(n: int, at: int | None = None) -> list[dict[str, Any]]:
    """A tool call in three pieces, as OpenAI sends it. ``at``: its index."""
    call_id, name, arguments = CALLS[n]
    text = json.dumps(arguments)
    index = n if at is None else at
    first = {"index": index, "id": call_id, "type": "function", "function": {"name": name, "arguments": ""}}
    return [first, *({"index": index, "function": {"arguments": part}} for part in (text[:6], text[6:]))]


HALVES = [TEXT[:9], TEXT[9:]]
HEAD = {"id": "chatcmpl-7", "created": 1_700_000_000, "model": "policy"}


def openai() -> Dialect:
    head = {**HEAD, "service_tier": "default", "system_fingerprint": "fp_1"}
    chunk = chunker(head, logprobs=None)
    events = [
        chunk({"role": "assistant", "content": "", "refusal": None}, usage=None, obfuscation="x1"),
        *(chunk({"content": half}, usage=None, obfuscation="x") for half in HALVES),
        *(chunk({"tool_calls": [piece]}, usage=None) for n in (0, 1) for piece in pieces(n)),
        chunk({}, "tool_calls", usage=None),
        chunk(None, usage={**USAGE, "completion_tokens_details": {"reasoning_tokens": 0}}),
    ]
    said = message(tool_calls=[call(0), call(1)], refusal=None, annotations=[])
    return Dialect(body(head, said, logprobs=None), sse(*events))


def azure() -> Dialect:
    """The first chunk has no choices, and no id; each has results of a content filter."""
    safe = {"hate": {"filtered": False, "severity": "safe"}}
    chunk = chunker(HEAD, content_filter_results=safe, logprobs=None)
    first = {"id": "", "created": 0, "model": "", "object": "", "choices": []}
    filtered = {"prompt_filter_results": [{"prompt_index": 0, "content_filter_results": safe}]}
    events = [
        first | filtered,
        chunk({"role": "assistant", "content": "", "refusal": None}),
        *(chunk({"content": half}) for half in HALVES),
        *(chunk({"tool_calls": [piece]}) for n in (0, 1) for piece in pieces(n)),
        chunk({}, "tool_calls"),
        chunk(None, usage=USAGE),
    ]
    said = message(tool_calls=[call(0), call(1)], refusal=None)
    return Dialect(body({**HEAD, **filtered}, said, content_filter_results=safe), sse(*events))


def _logprobs(texts: list[str]) -> dict[str, Any]:
    return {"content": [{"token": t, "logprob": -0.5, "bytes": list(t.encode()), "top_logprobs": []} for t in texts]}


def vllm() -> Dialect:
    """A policy: its token ids are recorded, and not passed on."""
    chunk = chunker(HEAD)
    tokens = [11, 12, 13, 14, 15]
    first = {"role": "assistant", "content": "", "reasoning": None}
    events = [
        chunk(first, prompt_token_ids=[1, 2, 3, 4, 5, 6, 7], usage=None),
        *_tokens(chunk({"reasoning": THOUGHT}), tokens[:2], [THOUGHT[:9], THOUGHT[9:]]),
        *_tokens(chunk({"content": HALVES[0]}), tokens[2:3], HALVES[:1]),
        ": x-model-version=run.0.4\n\n",
        *_tokens(chunk({"content": HALVES[1]}), tokens[3:4], HALVES[1:]),
        *_tokens(chunk({"content": ""}, "stop"), tokens[4:], [""]),
        chunk(None, usage=USAGE),
    ]
    said = message(reasoning=THOUGHT, tool_calls=[], refusal=None)
    whole = json.loads(body(HEAD, said, "stop", stop_reason=None, token_ids=tokens, logprobs=_logprobs(["x"] * 5)))
    whole["prompt_token_ids"] = [1, 2, 3, 4, 5, 6, 7]
    return Dialect(
        json.dumps(whole).encode(), sse(*events), kind="vllm", thinks=True, calls=False, reason="stop", tokens=tokens
    )


def _tokens(event: dict[str, Any], ids: list[int], texts: list[str]) -> list[dict[str, Any]]:
    event["choices"][0] |= {"token_ids": ids, "logprobs": _logprobs(texts)}
    return [event]


def sglang() -> Dialect:
    """``reasoning_content`` is in each delta, ``matched_stop`` in each choice."""
    chunk = chunker(HEAD, logprobs=None, matched_stop=None)
    empty = {"role": None, "content": None, "reasoning_content": None, "tool_calls": None}
    events = [
        chunk({"role": "assistant", "content": "", "reasoning_content": None, "tool_calls": None}, usage=None),
        *(chunk({**empty, "reasoning_content": part}, usage=None) for part in (THOUGHT[:9], THOUGHT[9:])),
        *(chunk({**empty, "content": half}, usage=None) for half in HALVES),
        *(chunk({**empty, "tool_calls": [piece]}, usage=None) for n in (0, 1) for piece in pieces(n)),
        chunk(empty, "tool_calls", usage=None),
        chunk(None, usage={**USAGE, "prompt_tokens_details": None, "reasoning_tokens": 0}),
    ]
    said = message(reasoning_content=THOUGHT, tool_calls=[call(0, index=0), call(1, index=1)])
    return Dialect(body(HEAD, said, matched_stop=None, logprobs=None), sse(*events), thinks=True)


def llama_cpp() -> Dialect:
    """No space after ``data:`` in some versions, ``content`` null at first, and ``timings`` at the end."""
    chunk = chunker(HEAD)
    events = [
        chunk({"role": "assistant", "content": None}),
        *(chunk({"reasoning_content": part}) for part in (THOUGHT[:9], THOUGHT[9:])),
        *(chunk({"content": half}) for half in HALVES),
        *(chunk({"tool_calls": [piece]}) for n in (0, 1) for piece in pieces(n)),
        chunk({}, "tool_calls"),
        chunk(None, usage=USAGE, timings={"prompt_n": 7, "predicted_per_second": 100.5}),
    ]
    said = message(reasoning_content=THOUGHT, tool_calls=[call(0), call(1)])
    return Dialect(body({**HEAD, "timings": {"prompt_n": 7}}, said), sse(*events, space=""), thinks=True)


def ollama() -> Dialect:
    """The role and an empty content are in each delta; calls come whole, all of them with index 0."""
    chunk = chunker({**HEAD, "system_fingerprint": "fp_ollama"})
    said: dict[str, Any] = {"role": "assistant", "content": ""}
    events = [
        chunk({**said, "reasoning": THOUGHT}),
        *(chunk({**said, "content": half}) for half in HALVES),
        *(chunk({**said, "tool_calls": [call(n, index=0)]}) for n in (0, 1)),
        chunk(said, "tool_calls"),
        chunk(None, usage=USAGE),
    ]
    whole = message(reasoning=THOUGHT, tool_calls=[call(0, index=0), call(1, index=0)])
    return Dialect(body(HEAD, whole), sse(*events), thinks=True)


def gemini() -> Dialect:
    """Calls without index, ended with "stop"; the usage is in each chunk; no ``content`` beside calls."""
    chunk = chunker(HEAD)
    signed = {"extra_content": {"google": {"thought_signature": "c2ln"}}}
    events = [
        *(chunk({"role": "assistant", "content": half}, usage=USAGE) for half in HALVES),
        chunk({"role": "assistant", "tool_calls": [call(0, **signed)]}, usage=USAGE),
        chunk({"role": "assistant", "tool_calls": [call(1)]}, "stop", usage=USAGE),
    ]
    said = message(tool_calls=[call(0, **signed), call(1)])
    return Dialect(body(HEAD, said, "stop"), sse(*events), reason="stop")


def openrouter() -> Dialect:
    """Comments while it waits; reasoning twice; calls interleaved, as several providers send them."""
    head = {**HEAD, "id": "gen-1", "provider": "Some"}
    chunk = chunker(head, native_finish_reason=None, logprobs=None)
    details = [{"type": "reasoning.text", "text": THOUGHT, "format": "unknown", "index": 0}]
    interleaved = [piece for pair in zip(pieces(0), pieces(1), strict=True) for piece in pair]
    events = [
        ": OPENROUTER PROCESSING\n\n",
        ": OPENROUTER PROCESSING\n\n",
        chunk({"role": "assistant", "content": "", "reasoning": THOUGHT, "reasoning_details": details}),
        *(chunk({"role": "assistant", "content": half}) for half in HALVES),
        ": OPENROUTER PROCESSING\n\n",
        *(chunk({"role": "assistant", "content": "", "tool_calls": [piece]}) for piece in interleaved),
        chunk({"role": "assistant", "content": ""}, "tool_calls"),
        chunk({"role": "assistant", "content": ""}, usage={**USAGE, "cost": 0.001}),
    ]
    said = message(reasoning=THOUGHT, reasoning_details=details, tool_calls=[call(0, index=0), call(1, index=1)])
    return Dialect(body(head, said, native_finish_reason="tool_use"), sse(*events), thinks=True)


def mistral() -> Dialect:
    """``content`` is a list of parts; calls come whole and without a type."""
    chunk = chunker({**HEAD, "p": "abc"})
    calls = [{k: v for k, v in call(n, index=n).items() if k != "type"} for n in (0, 1)]
    thinking = {"type": "thinking", "thinking": [{"type": "text", "text": THOUGHT}]}
    events = [
        chunk({"role": "assistant", "content": ""}),
        chunk({"content": [thinking]}),
        chunk({"content": [{"type": "text", "text": HALVES[0]}]}),
        chunk({"content": HALVES[1]}),
        chunk({"content": "", "tool_calls": calls}, "tool_calls", usage=USAGE),
    ]
    said = message(tool_calls=calls) | {"content": [thinking, {"type": "text", "text": TEXT}]}
    return Dialect(body(HEAD, said), sse(*events), thinks=True)


def deepseek() -> Dialect:
    """Comments keep the connection alive; either ``content`` or ``reasoning_content`` is null."""
    chunk = chunker({**HEAD, "system_fingerprint": "fp_2"}, logprobs=None)
    events = [
        ": keep-alive\n\n",
        chunk({"role": "assistant", "content": None, "reasoning_content": ""}),
        ": keep-alive\n\n",
        *(chunk({"content": None, "reasoning_content": part}) for part in (THOUGHT[:9], THOUGHT[9:])),
        *(chunk({"content": half, "reasoning_content": None}) for half in HALVES),
        *(chunk({"tool_calls": [piece]}) for n in (0, 1) for piece in pieces(n)),
        chunk({"content": "", "reasoning_content": None}, "tool_calls", usage={**USAGE, "prompt_cache_hit_tokens": 0}),
    ]
    said = message(reasoning_content=THOUGHT, tool_calls=[call(0, index=0), call(1, index=1)])
    return Dialect(body(HEAD, said), sse(*events), thinks=True)


def unfinished() -> Dialect:
    """Small servers: index null, no reason to finish, and no usage."""
    chunk = chunker({"id": "x-1", "created": 1, "model": "policy"})
    first = [{**piece, "index": None} for piece in pieces(0)]
    second = [{k: v for k, v in piece.items() if k != "index"} for piece in pieces(1)]
    events = [
        *(chunk({"content": half}) for half in HALVES),
        *(chunk({"tool_calls": [piece]}) for piece in first + second),
    ]
    whole = {**HEAD, "id": "x-1", "choices": [{"message": message(tool_calls=[call(0), call(1)])}], "usage": USAGE}
    return Dialect(json.dumps(whole).encode(), sse(*events), reason=None, flaw="the server gave no finish reason")


def anthropic() -> Dialect:
    head = {"id": "msg_1", "type": "message", "role": "assistant", "model": "policy", "stop_reason": None}
    start = {**head, "content": [], "stop_sequence": None, "usage": {"input_tokens": 7, "output_tokens": 1}}

    def block(index: int, opening: dict[str, Any], *deltas: dict[str, Any]) -> list[dict[str, Any]]:
        return [
            {"type": "content_block_start", "index": index, "content_block": opening},
            *({"type": "content_block_delta", "index": index, "delta": delta} for delta in deltas),
            {"type": "content_block_stop", "index": index},
        ]

    def tool(index: int, n: int) -> list[dict[str, Any]]:
        call_id, name, arguments = CALLS[n]
        text = json.dumps(arguments)
        opening = {"type": "tool_use", "id": call_id, "name": name, "input": {}}
        return block(
            index, opening, *({"type": "input_json_delta", "partial_json": t} for t in ("", text[:6], text[6:]))
        )

    thinking = block(
        0,
        {"type": "thinking", "thinking": "", "signature": ""},
        *({"type": "thinking_delta", "thinking": part} for part in (THOUGHT[:9], THOUGHT[9:])),
        {"type": "signature_delta", "signature": "c2ln"},
    )
    text = block(1, {"type": "text", "text": ""}, *({"type": "text_delta", "text": half} for half in HALVES))
    events = [
        {"type": "message_start", "message": start},
        {"type": "ping"},
        *thinking,
        *text,
        *tool(2, 0),
        *tool(3, 1),
        {"type": "message_delta", "delta": {"stop_reason": "tool_use"}, "usage": {"output_tokens": 5}},
        {"type": "message_stop"},
    ]
    content = [
        {"type": "thinking", "thinking": THOUGHT, "signature": "c2ln"},
        {"type": "text", "text": TEXT},
        *({"type": "tool_use", "id": i, "name": name, "input": arguments} for i, name, arguments in CALLS),
    ]
    usage = {"input_tokens": 7, "output_tokens": 5}
    whole = {**head, "content": content, "stop_reason": "tool_use", "stop_sequence": None, "usage": usage}
    return Dialect(
        json.dumps(whole).encode(),
        sse(*events, done=False),
        kind="anthropic",
        path="/v1/messages",
        thinks=True,
        reason="tool_use",
    )


DIALECTS = {
    made.__name__: made()
    for made in (
        *(openai, azure, vllm, sglang, llama_cpp, ollama, gemini, openrouter, mistral, deepseek, unfinished),
        anthropic,
    )
}
