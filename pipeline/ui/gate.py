"""Who may see the pages, and what a browser may do with them.

With a token (``gateway_token``), a browser shows it once, in a form, and gets a cookie; programs send
``Authorization: Bearer``. Without one, only requests to a name of this machine are answered. What changes something has
to come from a page of this very address.
"""

import hashlib
import hmac
from typing import Final
from urllib.parse import urlsplit

from starlette.datastructures import MutableHeaders
from starlette.requests import Request
from starlette.responses import PlainTextResponse, RedirectResponse, Response
from starlette.types import ASGIApp, Message, Receive, Scope, Send

from millstream.pipeline.addresses import LOOPBACK, is_loopback
from millstream.pipeline.services.serve_asgi import for_this_machine
from millstream.schemas.config.settings import Settings
from millstream.schemas.errors import ConfigError

COOKIE: Final = "millstream_session"
SESSION_S: Final = 12 * 3600
OPEN: Final = ("/login", "/static/")  # the form, and what it looks like
# No inline scripts or styles, no eval, nothing from elsewhere, no frames around the page.
POLICY: Final = "; ".join(
    (
        "default-src 'none'",
        "script-src 'self'",
        "style-src 'self'",
        "img-src 'self' data:",
        "connect-src 'self'",
        "form-action 'self'",
        "base-uri 'none'",
        "frame-ancestors 'none'",
    )
)
HEADERS: Final = {
    "Content-Security-Policy": POLICY,
    "X-Content-Type-Options": "nosniff",
    "X-Frame-Options": "DENY",
    "Referrer-Policy": "same-origin",  # with "no-referrer" browsers send their own forms with "Origin: null"
    "Cross-Origin-Opener-Policy": "same-origin",
    "Cross-Origin-Resource-Policy": "same-origin",
}


class Gate:
    """ASGI middleware. ``token``: empty for none."""

    def __init__(self, app: ASGIApp, token: str) -> None:
        self._app = app
        self._token = token

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        if scope["type"] == "lifespan":
            await self._app(scope, receive, send)
            return
        request = Request(scope)

        async def with_headers(message: Message) -> None:
            if message["type"] == "http.response.start":
                headers = MutableHeaders(scope=message)
                for name, value in HEADERS.items():
                    headers[name] = value
                headers.setdefault("Cache-Control", "no-store")
            await send(message)

        refusal = self._refusal(request)
        await (refusal or self._app)(scope, receive, with_headers)

    def _refusal(self, request: Request) -> Response | None:
        if not self._token and not for_this_machine(request):
            return PlainTextResponse("Without a token the pages answer requests to localhost only.", 403)
        if request.method not in ("GET", "HEAD") and not from_this_page(request):
            return PlainTextResponse("This request does not come from a page of this address.", 403)
        path = request.scope["path"].removeprefix(request.scope.get("root_path", ""))
        if not self._token or path.startswith(OPEN) or knows(request, self._token):
            return None
        base = request.scope.get("root_path", "")
        if request.method != "GET":
            return PlainTextResponse("Sign in first.", 401)
        if "hx-request" in request.headers:  # the answer would be put into the middle of a page
            return Response(status_code=401, headers={"HX-Redirect": f"{base}/login"})
        if "text/html" not in request.headers.get("accept", ""):
            return PlainTextResponse("send Authorization: Bearer TOKEN", 401, {"WWW-Authenticate": "Bearer"})
        return RedirectResponse(f"{base}/login", 303)


def session(token: str) -> str:
    """What the cookie holds: it opens the pages, and says nothing about the token."""
    return hmac.digest(token.encode(), b"millstream pages", hashlib.sha256).hex()


def is_token(given: str, token: str) -> bool:
    return hmac.compare_digest(given.encode(), token.encode())


def knows(request: Request, token: str) -> bool:
    """Whether its cookie or its header opens the pages."""
    scheme, _, given = request.headers.get("authorization", "").partition(" ")
    return is_token(request.cookies.get(COOKIE, ""), session(token)) or (scheme == "Bearer" and is_token(given, token))


def from_this_page(request: Request) -> bool:
    """Whether a browser says that a page of this address sent it; programs need the token's header."""
    if request.headers.get("authorization", "").startswith("Bearer "):
        return True  # browsers send no such header by themselves; whether it is the right one is checked elsewhere
    origin = request.headers.get("origin", "")
    try:
        return bool(origin) and urlsplit(origin).netloc == request.headers.get("host", "")
    except ValueError:
        return False


def asked_here(request: Request) -> bool:
    """Whether a page of this address, or its user, made the request, and not a link of another site."""
    return request.headers.get("sec-fetch-site", "none") in ("none", "same-origin")


def signed_in(request: Request, token: str, to: str) -> Response:
    answer = RedirectResponse(to, 303)
    answer.set_cookie(
        COOKIE,
        session(token),
        max_age=SESSION_S,
        path=f"{request.scope.get('root_path', '')}/",
        secure=request.url.scheme == "https",
        httponly=True,
        samesite="strict",
    )
    return answer


def signed_out(request: Request, to: str) -> Response:
    answer = RedirectResponse(to, 303)
    answer.delete_cookie(COOKIE, path=f"{request.scope.get('root_path', '')}/", httponly=True, samesite="strict")
    return answer


def check_open(settings: Settings, host: str) -> None:
    """Raises `ConfigError` if other machines could reach what is served at ``host``, and it has no token."""
    if not is_loopback(host) and not settings.gateway_token.get_secret_value():
        raise ConfigError(
            f"--host {host} is open to others: set gateway_token (MILLSTREAM_GATEWAY_TOKEN), or use {LOOPBACK}"
        )
