"""One rollout: its attempts, each as a conversation and as a tree with a waterfall; live while it runs."""

from dataclasses import dataclass
from typing import Any, Final

from starlette.exceptions import HTTPException
from starlette.requests import Request
from starlette.responses import Response
from starlette.routing import Route

from millstream.pipeline.store.conversation import Line, conversation
from millstream.pipeline.store.queries import read_spans
from millstream.pipeline.store.results import Attempt, Rollout
from millstream.pipeline.store.rollout_diff import error_of
from millstream.pipeline.ui.render import is_part, number_of, page
from millstream.pipeline.ui.source import Source
from millstream.pipeline.ui.trace import Row, rows
from millstream.pipeline.ui.views.rollout_events import state_of
from millstream.schemas.spans.dialects import normalised

SPANS: Final = 300  # of a tree, on one page
LINES: Final = 200  # of a conversation
ATTRIBUTES: Final = 200  # of a span


@dataclass(frozen=True, slots=True)
class Shown:
    """An attempt with as many spans and lines of its conversation as a page holds, from ``at``."""

    attempt: Attempt
    rows: list[Row]
    spans: int
    lines: list[Line]
    said: int
    at: int


def rollout(request: Request) -> Response:
    source: Source = request.app.state.source
    state = state_of(source, request.path_params["id"])  # before what is shown, which may then be newer
    if state is not None and is_part(request) and request.query_params.get("seen") == state.seen:
        return Response(status_code=204)  # nothing new: the page stays as it is
    found = known(source, request.path_params["id"])
    attempts = source.store.attempts(found.rollout_id)
    spans = source.store.spans(found.rollout_id)
    shown = []
    for attempt in reversed(attempts):
        mine = [span for span in spans if span.attempt_id == attempt.attempt_id]
        asked = request.query_params.get("attempt") == attempt.attempt_id
        at = number_of(request, "at", 0) if asked else 0
        lines = conversation(mine)
        at_line = number_of(request, "line", 0) if asked else 0
        shown.append(Shown(attempt, rows(mine, at, SPANS), len(mine), lines[at_line : at_line + LINES], len(lines), at))
    seen = "" if state is None else state.seen
    values: dict[str, Any] = {"r": found, "attempts": shown, "seen": seen, "size": SPANS, "lines": LINES}
    return page(request, "rollout_body.html" if is_part(request) else "rollout.html", values)


def span(request: Request) -> Response:
    """What one span holds."""
    source: Source = request.app.state.source
    query = request.query_params
    wanted = {name: query.get(name, "") for name in ("attempt_id", "span_id", "source")}
    spans = read_spans(source.store.sql, {"rollout_id": request.path_params["id"], **wanted})
    named = [span for span in spans if str(span.sequence) == query.get("sequence", "")]
    if not named:
        raise HTTPException(404, "the store has no such span")
    found = normalised(named[0])
    attributes = sorted(found.attributes.items())
    values = {"span": found, "attributes": attributes[:ATTRIBUTES], "left": attributes[ATTRIBUTES:]}
    return page(request, "span.html", values | {"error": error_of(found)})


def known(source: Source, rollout_id: str) -> Rollout:
    found = source.store.rollouts([rollout_id])
    if not found:
        raise HTTPException(404, f"The store has no rollout {rollout_id!r}; it may not have been stored yet.")
    return found[0]


ROUTES: Final = [Route("/rollouts/{id:path}/span", span), Route("/rollouts/{id:path}", rollout)]
