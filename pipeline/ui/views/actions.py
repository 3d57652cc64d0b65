"""What the pages change: cancels, pauses, dead letters that are replayed. Each goes to the log, as the commands do."""

from collections.abc import Awaitable, Callable
from typing import Final, Literal
from urllib.parse import quote

from starlette.exceptions import HTTPException
from starlette.requests import Request
from starlette.responses import RedirectResponse, Response
from starlette.routing import Route

from millstream.consumers.dead_letters import find_dead_letters, replay
from millstream.pipeline.ui.forms import form_of
from millstream.pipeline.ui.render import page
from millstream.pipeline.ui.source import Source
from millstream.producers.control import cancel_record, pause_record, publish_control
from millstream.schemas.errors import CodecError, ConfigError, TooLarge
from millstream.schemas.wire.records import Control

SCOPES: Final[tuple[Literal["rollout", "group", "experiment"], ...]] = ("rollout", "group", "experiment")


async def cancel(request: Request) -> Response:
    form = await form_of(request)
    for scope in SCOPES:
        if name := form.get(scope, "").strip():
            return await _control(request, cancel_record(scope, name), scope, name)
    raise HTTPException(422, "name a rollout, a group or an experiment to cancel")


def pausing(paused: bool) -> Callable[[Request], Awaitable[Response]]:
    async def respond(request: Request) -> Response:
        name = (await form_of(request)).get("experiment", "").strip()
        if not name:
            raise HTTPException(422, "name an experiment")
        return await _control(request, pause_record(name, paused), "experiment", name)

    return respond


async def replay_dead(request: Request) -> Response:
    place = (await form_of(request)).get("place", "").strip()
    source: Source = request.app.state.source
    (letter,) = await find_dead_letters(source.log, source.settings.topics, [place])
    try:
        done = await source.written(lambda producer: replay(producer, source.settings, letter))
    except (ConfigError, CodecError, TooLarge) as error:
        return page(request, "error.html", {"title": "It was not replayed", "message": str(error)}, 422)
    return page(request, "done.html", {"title": "Replayed", "message": done, "back": "/dead"})


async def _control(request: Request, record: Control, scope: str, name: str) -> Response:
    source: Source = request.app.state.source
    await source.written(lambda producer: publish_control(producer, source.settings.topics, record))
    base = request.scope.get("root_path", "")
    return RedirectResponse(f"{base}/{scope}s/{quote(name, safe='')}", 303)


ROUTES: Final = [
    Route("/cancel", cancel, methods=["POST"]),
    Route("/pause", pausing(True), methods=["POST"]),
    Route("/resume", pausing(False), methods=["POST"]),
    Route("/dead/replay", replay_dead, methods=["POST"]),
]
