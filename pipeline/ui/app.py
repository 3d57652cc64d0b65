"""The pages in the browser: what a deployment does now, and what it has done.

Rendered here, with templates and a little JavaScript that is served from here, too: no build step, nothing from other
sites. An ASGI application, which may be mounted below any path.
"""

from starlette.applications import Starlette
from starlette.exceptions import HTTPException
from starlette.middleware import Middleware
from starlette.requests import Request
from starlette.responses import RedirectResponse, Response
from starlette.routing import Mount, Route
from starlette.staticfiles import StaticFiles

from millstream.pipeline.ui.forms import form_of
from millstream.pipeline.ui.gate import Gate, is_token, signed_in, signed_out
from millstream.pipeline.ui.render import STATIC, page
from millstream.pipeline.ui.source import Source
from millstream.pipeline.ui.views import (
    actions,
    dead_letters,
    experiments,
    groups,
    overview,
    rollout,
    rollout_events,
    rollouts,
    sql,
    training,
)
from millstream.pipeline.ui.views.rollout_events import StreamPolicy
from millstream.schemas.errors import CodecError, ConfigError, MillstreamError


class Assets(StaticFiles):
    """Their addresses hold no version: a browser asks each time whether they have changed."""

    async def get_response(self, path: str, scope: object) -> Response:
        answer = await super().get_response(path, scope)  # type: ignore[arg-type]
        answer.headers["Cache-Control"] = "no-cache"
        return answer


def ui_app(source: Source, token: str = "", stream_policy: StreamPolicy = StreamPolicy()) -> Starlette:
    """``token``: what a browser has to know; empty: only requests to a name of this machine are answered."""
    app = Starlette(
        routes=[
            Route("/login", _login, methods=["GET", "POST"]),
            Route("/logout", _logout, methods=["POST"]),
            *overview.ROUTES,
            *experiments.ROUTES,
            *rollouts.ROUTES,
            *training.ROUTES,  # its address is below a rollout's, whose id may be any text
            *rollout_events.ROUTES,
            *rollout.ROUTES,
            *groups.ROUTES,
            *dead_letters.ROUTES,
            *sql.ROUTES,
            *actions.ROUTES,
            Mount("/static", Assets(directory=STATIC)),
        ],
        middleware=[Middleware(Gate, token=token)],
        exception_handlers={MillstreamError: _failed, HTTPException: _refused},
    )
    app.state.source, app.state.token = source, token
    app.state.streams, app.state.stream_policy = 0, stream_policy
    return app


async def _login(request: Request) -> Response:
    base, token = request.scope.get("root_path", ""), request.app.state.token
    if not token:
        return RedirectResponse(f"{base}/", 303)
    wrong = False
    if request.method == "POST":
        if is_token((await form_of(request)).get("token", ""), token):
            return signed_in(request, token, f"{base}/")
        wrong = True
    return page(request, "login.html", {"wrong": wrong}, 401 if wrong else 200)


async def _logout(request: Request) -> Response:
    return signed_out(request, f"{request.scope.get('root_path', '')}/login")


async def _failed(request: Request, error: Exception) -> Response:
    status = 422 if isinstance(error, ConfigError | CodecError) else 503
    return page(request, "error.html", {"title": "This can't be shown now", "message": str(error)}, status)


async def _refused(request: Request, error: Exception) -> Response:
    assert isinstance(error, HTTPException)
    title = "There is no such page" if error.status_code == 404 else "This request can't be answered"
    return page(request, "error.html", {"title": title, "message": error.detail}, error.status_code)
