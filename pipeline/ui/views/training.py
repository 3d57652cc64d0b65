"""What is trained on of a rollout: the tokens of each call, what they earned, and why a call is left out."""

import math
import struct
from bisect import bisect_right
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any, Final

from starlette.requests import Request
from starlette.responses import Response
from starlette.routing import Route

from millstream.consumers.adapter.explanation import explained
from millstream.consumers.adapter.triplets import Trace, TripletMaker
from millstream.pipeline.store import pages
from millstream.pipeline.store.results import Rollout
from millstream.pipeline.store.rollout_diff import deciding
from millstream.pipeline.ui.render import number_of, page
from millstream.pipeline.ui.source import Source
from millstream.pipeline.ui.token_texts import token_texts
from millstream.pipeline.ui.views.experiments import record_or_nothing
from millstream.pipeline.ui.views.groups import advantages_of, members_of
from millstream.pipeline.ui.views.rollout import known
from millstream.schemas.errors import ConfigError
from millstream.schemas.wire.records import RolloutTask, Triplet
from millstream.schemas.wire.versions import from_text

CALLS: Final = 20  # on one page
TOKENS: Final = 1500  # of a response, one by one
PROMPT_TOKENS: Final = 100  # of a prompt: its last ones
# Upper bounds of the probability of a token, from nearly impossible to nearly certain: the classes .p0 to .p7.
BOUNDS: Final = (0.01, 0.05, 0.15, 0.35, 0.6, 0.85, 0.97)


@dataclass(frozen=True, slots=True)
class Token:
    number: int
    text: str  # empty if this machine lacks the model's tokenizer
    logprob: float | None
    shade: str  # its class
    version: str


@dataclass(frozen=True, slots=True)
class Call:
    """A triplet as the page shows it."""

    triplet: Triplet
    prompt: list[tuple[int, str]]  # the last ones
    prompt_tokens: int
    response: list[Token]  # the first ones
    response_tokens: int
    mean_logprob: float | None
    advantage: float | None
    explained: dict[str, Any] | None


def training(request: Request) -> Response:
    source: Source = request.app.state.source
    found = known(source, request.path_params["id"])
    triplets = source.store.triplets([found.rollout_id])
    at = number_of(request, "at", 0)
    why, problem = None, ""
    try:
        why = _explained(source, found)
    except ConfigError as error:  # a rule of the user's own that this process can't import
        problem = str(error)
    rows = {row["turn"]: row for row in why["calls"]} if why is not None else {}
    ask = source.store.sql
    group = advantages_of(ask, members_of(ask, found.group_id)) if found.group_size > 1 else {}
    advantages = group.get(found.rollout_id, {})
    record = record_or_nothing(ask, found.experiment_id) if found.experiment_id else {}
    text = token_texts(record) or _no_text
    calls = [_call(t, advantages.get(t.turn), rows.get(t.turn), text) for t in triplets[at : at + CALLS]]
    values = {"r": found, "calls": calls, "total": len(triplets), "at": at, "size": CALLS, "why": why}
    values |= {"problem": problem, "bounds": BOUNDS, "algorithm": str(record.get("algorithm") or "")}
    return page(request, "training.html", values)


def _no_text(number: int) -> str:
    return ""


def _explained(source: Source, found: Rollout) -> dict[str, Any] | None:
    """What the adapter's rules, with these settings, make of the deciding attempt; None if there is none yet."""
    attempts = source.store.attempts(found.rollout_id)
    if not attempts:
        return None
    chosen = deciding(attempts)
    bound = {"rollout_id": found.rollout_id, "attempt": chosen.attempt}
    (row,) = source.store.sql(pages.TASK, bound).records()
    task = RolloutTask(**{**row, "retry_on": tuple(row["retry_on"])})
    spans = source.store.spans(found.rollout_id, attempt_id=chosen.attempt_id)
    return explained(TripletMaker(source.settings.triplets), Trace(task, chosen.attempt_id, spans), None)


def _call(triplet: Triplet, advantage: float | None, why: dict[str, Any] | None, text: Callable[[int], str]) -> Call:
    prompt, response = _numbers(triplet.prompt_token_ids, "i"), _numbers(triplet.response_token_ids, "i")
    logprobs: Sequence[float] = _numbers(triplet.response_logprobs, "f")
    known_logprobs = [value for value in logprobs if math.isfinite(value)]
    return Call(
        triplet=triplet,
        prompt=[(number, text(number)) for number in prompt[-PROMPT_TOKENS:]],
        prompt_tokens=len(prompt),
        response=_tokens(triplet, response[:TOKENS], logprobs, text),
        response_tokens=len(response),
        mean_logprob=math.fsum(known_logprobs) / len(known_logprobs) if known_logprobs else None,
        advantage=advantage,
        explained=why,
    )


def _tokens(
    triplet: Triplet, response: Sequence[int], logprobs: Sequence[float], text: Callable[[int], str]
) -> list[Token]:
    versions = [triplet.model_version or ""] * len(response)
    if triplet.response_versions:
        parts = from_text(triplet.response_versions, max(len(response), 1))
        for first, version in parts:
            versions[first:] = [version] * max(len(response) - first, 0)
    found = []
    for n, number in enumerate(response):
        logprob = logprobs[n] if n < len(logprobs) and math.isfinite(logprobs[n]) else None
        shade = "" if logprob is None else f"p{bisect_right(BOUNDS, math.exp(min(logprob, 0.0)))}"
        found.append(Token(number, text(number), logprob, shade, versions[n]))
    return found


def _numbers(packed: bytes | None, kind: str) -> list[Any]:
    """Of the record's little-endian int32 or float32."""
    return [] if not packed else list(struct.unpack(f"<{len(packed) // 4}{kind}", packed[: len(packed) // 4 * 4]))


ROUTES: Final = [Route("/rollouts/{id:path}/training", training)]
