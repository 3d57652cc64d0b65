"""Rules for which calls take part, and which of those can be trained on. Each gives its reason."""

import re
from collections import Counter
from collections.abc import Callable, Sequence
from fnmatch import translate
from typing import Final

from millstream.consumers.adapter.calls import Call
from millstream.schemas.config.triplet_rules import TripletRules
from millstream.schemas.spans import semconv
from millstream.schemas.spans.blobs import is_reference
from millstream.schemas.spans.text import parsed
from millstream.schemas.wire.trainable import TOKEN_BYTES, bad_tokens

Rule = Callable[[Call], str | None]
"""Why not to train on a call, or None. Pure."""

NO_TOKENS: Final = "no token ids or no logprobs"
# What a request may ask of the sampler, with the value that changes nothing. With any other the tokens come from
# another distribution than the one whose log-probabilities servers return by default and learners compute.
NEUTRAL: Final = {
    "gen_ai.request.temperature": (1.0,),
    "gen_ai.request.top_p": (1.0,),
    "gen_ai.request.top_k": (0.0, -1.0),
    "gen_ai.request.frequency_penalty": (0.0,),
    "gen_ai.request.presence_penalty": (0.0,),
    "millstream.request.min_p": (0.0,),
    "millstream.request.repetition_penalty": (1.0,),
    "millstream.request.logit_bias": (),  # only if it is empty
}
ABORTED: Final = ("abort", "aborted", "cancelled", "error", "content_filter")  # finish reasons of half an answer


def selection(rules: TripletRules) -> list[Rule]:
    """A call that one of these rules excludes gets no reward."""
    found: list[Rule] = [aside]
    if rules.agent_match:
        agent = re.compile(rules.agent_match)
        found.append(lambda c: None if agent.fullmatch(c.agent or "") else f"agent {c.agent!r} is not selected")
    if rules.exclude_models:
        models = _globs(rules.exclude_models)
        found.append(lambda call: f"model {call.model!r} is excluded" if models.fullmatch(call.model) else None)
    if rules.exclude_calls:
        names = _globs(rules.exclude_calls)
        found.append(lambda c: f"call {c.span.name!r} is excluded" if names.fullmatch(c.span.name) else None)
    return found


def validation(rules: TripletRules, own: Sequence[Rule]) -> list[Rule]:
    """Whether a call can be trained on; applied in this order. ``own``: the user's rules."""
    found: list[Rule] = [failed, aborted, marked_untrainable]
    if rules.require_tokens:
        found += [token_ids, numbers, empty, counts]
        if not rules.trust_agents:
            found.append(source)
    else:
        found.append(empty_text)
    if rules.max_tokens is not None:
        found.append(too_long(rules.max_tokens))
    return [*found, *own]


def repeats(rules: TripletRules) -> Rule:
    """Applied to the calls of one attempt in order: it counts their responses."""
    most, seen = rules.max_repeats, Counter[bytes | str]()

    def rule(call: Call) -> str | None:
        response = call.span.response_token_ids or call.response
        seen[response] += 1
        return f"the same response came {seen[response]} times" if most and seen[response] > most else None

    return rule


def aside(call: Call) -> str | None:
    """Not the agent's own work: what it has earned is not for this."""
    purpose = call.span.attributes.get(semconv.ASIDE)
    return None if purpose is None else f"the call was made aside: {purpose}"


def failed(call: Call) -> str | None:
    return f"the call failed: {call.span.status_message}" if call.span.status == "Error" else None


def aborted(call: Call) -> str | None:
    reasons = call.span.attributes.get(semconv.FINISH_REASONS, "")
    reason = next((reason for reason in ABORTED if f'"{reason}"' in reasons), None)
    return None if reason is None else f"the response was cut off: {reason}"


def marked_untrainable(call: Call) -> str | None:
    """According to the proxy, which knows more about the call."""
    if semconv.CACHED in call.span.attributes:
        return "the answer was repeated from a cache"
    return call.span.attributes.get(semconv.UNTRAINABLE)


def token_ids(call: Call) -> str | None:
    span = call.span
    if span.prompt_token_ids is None or span.response_token_ids is None or span.response_logprobs is None:
        return NO_TOKENS
    return None if span.prompt_token_ids else "empty prompt"


def numbers(call: Call) -> str | None:
    span = call.span
    return bad_tokens(span.prompt_token_ids, span.response_token_ids, span.response_logprobs)


def source(call: Call) -> str | None:
    """An agent's own span may hold any token ids; the proxy's are the model server's."""
    if call.span.source == semconv.SOURCE_PROXY:
        return None
    return "its token ids come from the agent, not from the proxy; [triplets] trust_agents = true takes them"


def empty(call: Call) -> str | None:
    return None if call.span.response_token_ids else "empty response"


def empty_text(call: Call) -> str | None:
    """For training on text: neither words nor tool calls."""
    if is_reference(call.response):
        return None
    try:
        message = parsed(call.response)
    except ValueError:
        return "the response is not JSON"
    return None if any(_content(message)) else "empty response"


def counts(call: Call) -> str | None:
    span = call.span
    tokens = len(span.response_token_ids or b"") // TOKEN_BYTES
    logprobs = len(span.response_logprobs or b"") // TOKEN_BYTES
    return None if tokens == logprobs else f"{tokens} response tokens, but {logprobs} logprobs"


def sampling(call: Call) -> str | None:
    """Whether the request changed the distribution that tokens are drawn from (see `NEUTRAL`). A ratio of policies
    would then compare with a policy that has sampled nothing. For rollouts that are trained on: a validation may be
    greedy."""
    attributes = call.span.attributes
    if NEUTRAL.keys().isdisjoint(attributes):
        return None
    for name, neutral in NEUTRAL.items():
        value = attributes.get(name)
        if value is not None and not _is_one_of(value, neutral):
            field = name.rpartition(".")[2]
            return f"sampled with {field} {value}: its logprobs are those without; leave {field} out of the request"
    return None


def too_long(most: int) -> Rule:
    def rule(call: Call) -> str | None:
        span = call.span
        tokens = (len(span.prompt_token_ids or b"") + len(span.response_token_ids or b"")) // TOKEN_BYTES
        return None if tokens <= most else f"{tokens} tokens, {most} are allowed"

    return rule


def _is_one_of(text: str, values: Sequence[float]) -> bool:
    if text in ("", "{}"):
        return True
    try:
        return float(text) in values
    except ValueError:
        return False


def _content(message: object) -> list[object]:
    """The parts of a message, in OpenAI's form or that of the semantic conventions."""
    if isinstance(message, list):
        return [part for inner in message for part in _content(inner)]
    if not isinstance(message, dict):
        return []
    content = message.get("content")
    text = content.strip() if isinstance(content, str) else content
    return [part for part in (text, message.get("tool_calls"), message.get("parts")) if part]


def _globs(patterns: Sequence[str]) -> re.Pattern[str]:
    return re.compile("|".join(map(translate, patterns)))
