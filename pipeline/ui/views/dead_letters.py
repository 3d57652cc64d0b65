"""Dead letters: the list, of the store; one of them, as the log holds it."""

from dataclasses import asdict
from typing import Any, Final

from starlette.requests import Request
from starlette.responses import Response
from starlette.routing import Route

from millstream.consumers.dead_letters import find_dead_letters, letter_key, readable
from millstream.pipeline.store import pages
from millstream.pipeline.ui.render import number_of, page
from millstream.pipeline.ui.source import Source

ROWS: Final = 50


def dead(request: Request) -> Response:
    source: Source = request.app.state.source
    ask, query = source.store.sql, request.query_params
    at = number_of(request, "at", 0)
    asked = {name: query.get(name, "") for name in ("reason", "role")}
    found = ask(pages.DEAD_LETTERS, asked | {"limit": ROWS + 1, "offset": at}).records()
    values = {
        "rows": found[:ROWS],
        "more": len(found) > ROWS,
        "at": at,
        "size": ROWS,
        "query": {name: value for name, value in asked.items() if value},
        "reasons": [(r["reason"], f"{r['reason']} ({r['letters']})") for r in ask(pages.DEAD_REASONS).records()],
    }
    return page(request, "dead.html", values)


async def letter(request: Request) -> Response:
    source: Source = request.app.state.source
    place = request.path_params["place"]
    (found,) = await find_dead_letters(source.log, source.settings.topics, [place])
    fields: dict[str, Any] = asdict(found) | {"key": letter_key(found), "value": readable(found.value)}
    fields["headers"] = {name: readable(value) for name, value in found.headers.items()}
    return page(request, "letter.html", {"place": place, "fields": fields, "letter": found})


ROUTES: Final = [Route("/dead", dead), Route("/dead/{place}", letter)]
