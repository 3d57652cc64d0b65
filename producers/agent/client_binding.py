"""Gives each model call of an attempt the proxy's address, and the path and key of the attempt that makes it.

Agents often create their client at import, before any attempt or even before the run, when the environment still named
the public API. So the request is bound when it is sent, to the attempt of OpenTelemetry's current context, and one
client serves all attempts. A request that a model elsewhere would answer goes to the proxy, or is refused.
"""

import inspect
import logging
import re
import threading
from collections.abc import Awaitable, Callable
from dataclasses import dataclass
from functools import lru_cache
from types import ModuleType
from typing import Any, Final
from urllib.parse import urlsplit

import wrapt
from opentelemetry import trace
from opentelemetry.trace.propagation.tracecontext import TraceContextTextMapPropagator

from millstream.producers.agent.attempt import AttemptContext, current_attempt
from millstream.producers.agent.shared_threads import note_call
from millstream.schemas.errors import ConfigError, MillstreamError

logger = logging.getLogger(__name__)

_DEFAULT_PORTS = {"http": 80, "https": 443}
_Origin = tuple[str, str, int]

# Paths of model calls, whichever host and prefix they have. The proxy serves the first kind. The names of the second
# kind are common: what is posted there is a model call only if it names a model. The proxy does not serve the third:
# Gemini, Vertex, Bedrock; nor the fourth, again with common names: Ollama, Cohere.
_CHAT: Final = re.compile(rb"/(chat/completions)$")
_SERVED: Final = re.compile(rb"/(completions|responses|embeddings|messages|messages/count_tokens)$")
_NOT_SERVED: Final = re.compile(
    rb":(stream)?(generateContent|rawPredict)$|/model/[^/]+/(converse|invoke)[a-z-]*$", re.I
)
_NOT_SERVED_IF_MODEL: Final = re.compile(rb"/(api/(chat|generate|embed|embeddings)|v[12]/(chat|embed))$")
_THEIRS: Final = ("Cookie", "api-key", "x-goog-api-key", "OpenAI-Organization", "OpenAI-Project")  # of the other host

_proxies: dict[_Origin, bytes] = {}  # → the proxy's base path, usually empty
_wrapped: set[str] = set()
_redirected: set[_Origin] = set()  # that a warning names
_trace_context = TraceContextTextMapPropagator()


class OutsideRollout(MillstreamError, RuntimeError):
    """Code outside a running attempt called a model through the proxy, or `attempt_environment`."""


class OutsideProxy(MillstreamError, RuntimeError):
    """An attempt called a model in a way that the proxy can't serve and record."""


def bind_clients(proxy_url: str) -> None:
    """Binds all later requests to this proxy. Raises `ConfigError` if it is not a URL."""
    origin, base = _place(proxy_url)
    _proxies[origin] = base
    for name in _TRANSPORTS:
        if name not in _wrapped:
            _wrapped.add(name)
            wrapt.register_post_import_hook(_wrap, name)


@lru_cache(maxsize=64)
def _place(proxy_url: str) -> tuple[_Origin, bytes]:
    parts = urlsplit(proxy_url)
    if parts.scheme not in _DEFAULT_PORTS or not parts.hostname:
        raise ConfigError(f"proxy_url {proxy_url!r} is not an address like http://host:8400")
    return _origin(parts.scheme, parts.hostname, parts.port), parts.path.rstrip("/").encode()


def _origin(scheme: str, host: str, port: int | None) -> _Origin:
    return scheme, host, port or _DEFAULT_PORTS.get(scheme, 0)


# --- which request, and where to


@dataclass(frozen=True, slots=True)
class _Bound:
    """A request as it is sent. ``path`` includes the query."""

    attempt: AttemptContext
    origin: _Origin
    path: bytes
    redirected: bool  # from another host

    @property
    def netloc(self) -> str:
        scheme, host, port = self.origin
        name = f"[{host}]" if ":" in host else host
        return name if port == _DEFAULT_PORTS[scheme] else f"{name}:{port}"

    @property
    def url(self) -> str:
        return f"{self.origin[0]}://{self.netloc}{self.path.decode()}"

    def set_headers(self, headers: Any) -> None:
        """Sets the attempt's key, and the current span, of which the proxy's span becomes a child. ``headers`` is a
        mapping that ignores case."""
        headers["Host"] = self.netloc
        headers["Authorization"] = f"Bearer {self.attempt.proxy_key}"
        headers["x-api-key"] = self.attempt.proxy_key
        recorded = trace.get_current_span().get_span_context().trace_flags.sampled
        _trace_context.inject(headers, None if recorded else self.attempt.context)
        if self.redirected:
            for name in _THEIRS:
                headers.pop(name, None)


def _bind(method: str, origin: _Origin, path: bytes, body: Callable[[], bytes]) -> _Bound | None:
    """Binds a request to the current attempt. None: it is not a model call, or not of an attempt with a proxy.

    Raises `OutsideRollout`, `OutsideProxy`.
    """
    base = _proxies.get(origin)
    attempt = current_attempt()
    if base is None:
        if attempt is None or not attempt.proxy_url or method != "POST" or not (call := _model_call(path, body)):
            return None
    else:
        bound = path.startswith(base + b"/rollout/")  # by `clients`, or by an earlier send
        if bound and (attempt is None or not path.startswith(base + attempt.path.encode() + b"/")):
            return None  # its client is bound to another attempt
        if path == base + b"/livez":  # a probe, of a runner whose agents run in its threads
            return None
        call = b"" if bound else path[len(base) :]
    if attempt is None:
        raise OutsideRollout(
            f"{method} {_shown(origin, path)}: the model can be called only within a rollout, because the proxy "
            "records each call for its rollout. Move the call into the agent function, or start threads from within it."
        )
    if attempt.ended:
        raise OutsideRollout(
            f"{method} {_shown(origin, path)}: thread {threading.current_thread().name!r} belongs to a rollout that "
            "has ended. If other rollouts use it too, use a ThreadPoolExecutor, which runs each task in its rollout's "
            "context."
        )
    note_call(attempt)
    if not call:
        return _Bound(attempt, origin, path, redirected=False)
    if base is None:
        _note_redirected(origin, attempt)
    proxy, own_base = _place(attempt.proxy_url)
    return _Bound(attempt, proxy, own_base + attempt.path.encode() + call, redirected=base is None)


def _model_call(path: bytes, body: Callable[[], bytes]) -> bytes:
    """The proxy's path of a model call, with the query; empty for another request. Raises `OutsideProxy`."""
    place, mark, query = path.partition(b"?")
    if found := _CHAT.search(place) or _SERVED.search(place):
        if found.re is _CHAT or b'"model"' in body():
            return b"/v1/" + found[1] + mark + query
    elif _NOT_SERVED.search(place) or (_NOT_SERVED_IF_MODEL.search(place) and b'"model"' in body()):
        raise OutsideProxy(
            f"POST {place.decode(errors='replace')}: the attempt calls its models through the proxy, which does not "
            "serve this API. Use the OpenAI or Anthropic API; an upstream in the proxy's settings names the server."
        )
    return b""


def _note_redirected(origin: _Origin, attempt: AttemptContext) -> None:
    if origin not in _redirected:
        _redirected.add(origin)
        logger.warning(
            "model calls to %s://%s:%d go to the proxy at %s instead: the agent's client was created with that address",
            *origin,
            attempt.proxy_url,
        )


def _refuse(method: str, origin: _Origin, path: bytes, body: Callable[[], bytes]) -> None:
    """For clients whose requests can't be redirected. Raises `OutsideProxy` for a model call past the proxy."""
    attempt = current_attempt()
    if attempt is None or not attempt.proxy_url or origin in _proxies or method != "POST":
        return
    if _model_call(path, body):
        raise OutsideProxy(
            f"POST {_shown(origin, path)}: the attempt calls its models through the proxy, at {attempt.proxy_url}. "
            "Send the request there with httpx, aiohttp, requests or an SDK, which get the attempt's path and key."
        )


def _shown(origin: _Origin, path: bytes) -> str:
    """Without the query, which may hold a key."""
    return f"{origin[0]}://{origin[1]}:{origin[2]}{path.partition(b'?')[0].decode(errors='replace')}"


# --- the clients


def _wrap(module: ModuleType) -> None:
    names, wrapper = _TRANSPORTS[module.__name__]
    for name in names:
        wrapt.wrap_function_wrapper(module, name, wrapper)


# AsyncClient.send returns a coroutine. The request is bound when that is created, in the caller's context.
def _httpx_send(wrapped: Any, instance: Any, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
    request = args[0] if args else kwargs["request"]
    url = request.url

    def body() -> bytes:
        try:
            return request.content  # type: ignore[no-any-return]
        except RuntimeError:  # it is streamed
            return b""

    bound = _bind(request.method, _origin(url.scheme, url.host, url.port), url.raw_path, body)
    if bound is None:
        return wrapped(*args, **kwargs)
    if bound.path != url.raw_path:
        scheme, host, port = bound.origin
        request.url = url.copy_with(scheme=scheme, host=host, port=port, raw_path=bound.path)
    bound.set_headers(request.headers)
    if bound.attempt.task.unresponsive_s is None:  # no limit to enforce
        return wrapped(*args, **kwargs)
    if inspect.iscoroutinefunction(wrapped):
        return _awaited(bound.attempt, wrapped(*args, **kwargs))
    with bound.attempt.calling():
        return wrapped(*args, **kwargs)


async def _awaited(attempt: AttemptContext, answer: Awaitable[Any]) -> Any:
    with attempt.calling():
        return await answer


def _aiohttp_request(wrapped: Any, instance: Any, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
    """Sessions create one for each request, also for one that follows a redirect."""
    from multidict import CIMultiDict  # aiohttp's own, which is imported by now

    method, url = args[:2]
    data: Any = kwargs.get("data")

    def body() -> bytes:
        is_json = getattr(data, "content_type", "") == "application/json"
        return _raw(data.decode() if is_json else data)

    bound = _bind(method.upper(), _origin(url.scheme, url.host or "", url.port), url.raw_path_qs.encode(), body)
    if bound is not None:
        headers = CIMultiDict(kwargs.get("headers") or ())
        bound.set_headers(headers)
        args, kwargs = (
            (method, type(url)(bound.url, encoded=True), *args[2:]),
            {**kwargs, "headers": headers, "auth": None},
        )
        if bound.redirected:
            kwargs |= {"cookies": None, "proxy": None}  # they are meant for the other host
    wrapped(*args, **kwargs)


def _requests_send(wrapped: Any, instance: Any, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
    request = args[0] if args else kwargs["request"]
    bound = _bind(request.method, *_split(request.url), lambda: _raw(request.body))
    if bound is not None:
        request.url = bound.url
        if bound.redirected:
            kwargs["proxies"] = instance.rebuild_proxies(request, instance.proxies)
        bound.set_headers(request.headers)
    return wrapped(*args, **kwargs)


def _urllib_open(wrapped: Any, instance: Any, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
    from urllib.request import Request

    def opened(fullurl: Any, data: Any = None, *rest: Any, **named: Any) -> Any:
        request = Request(fullurl) if isinstance(fullurl, str) else fullurl  # noqa: S310 - the agent's own
        if data is not None:
            request.data = data
        bound = _bind(request.get_method(), *_split(request.full_url), lambda: _raw(request.data))
        if bound is not None:
            request.full_url = bound.url
            for name in _THEIRS if bound.redirected else ():
                request.remove_header(name.capitalize())
            headers: dict[str, str] = {}
            bound.set_headers(headers)
            for name, value in headers.items():
                request.add_header(name, value)
        return wrapped(request, None, *rest, **named)

    return opened(*args, **kwargs)


def _urllib3_urlopen(wrapped: Any, instance: Any, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
    def refuse(method: str, url: str, body: Any = None, *_: Any, **__: Any) -> None:
        origin = _origin(instance.scheme, instance.host, instance.port)
        _refuse(method, origin, _split(url)[1], lambda: _raw(body))

    refuse(*args, **kwargs)
    return wrapped(*args, **kwargs)


def _http_client_request(wrapped: Any, instance: Any, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
    def refuse(method: str, url: str, body: Any = None, *_: Any, **__: Any) -> None:
        scheme = "https" if instance.default_port == _DEFAULT_PORTS["https"] else "http"
        _refuse(method, _origin(scheme, instance.host, instance.port), _split(url)[1], lambda: _raw(body))

    refuse(*args, **kwargs)
    return wrapped(*args, **kwargs)


def _split(url: str) -> tuple[_Origin, bytes]:
    parts = urlsplit(url)
    query = f"?{parts.query}" if parts.query else ""
    return _origin(parts.scheme, parts.hostname or "", parts.port), f"{parts.path}{query}".encode()


def _raw(body: Any) -> bytes:
    """A body, unless it is streamed."""
    return body.encode() if isinstance(body, str) else body if isinstance(body, bytes) else b""


_HTTPX: Final = ("Client.send", "AsyncClient.send"), _httpx_send
_TRANSPORTS: Final[dict[str, tuple[tuple[str, ...], Callable[..., Any]]]] = {
    "httpx": _HTTPX,
    "httpx2": _HTTPX,  # openai 3 and anthropic 2 use it
    "aiohttp": (("ClientRequest.__init__",), _aiohttp_request),
    "requests": (("Session.send",), _requests_send),
    "urllib.request": (("OpenerDirector.open",), _urllib_open),
    "urllib3": (("HTTPConnectionPool.urlopen",), _urllib3_urlopen),
    "http.client": (("HTTPConnection.request",), _http_client_request),
}
