"""Gives each request to the proxy the path and the key of the attempt that makes it.

Agents often create their client at import, before any attempt. So the request is bound when it is sent, to the attempt
of OpenTelemetry's current context, and one client serves all attempts.
"""

import inspect
import threading
from collections.abc import Awaitable
from functools import lru_cache
from types import ModuleType
from typing import Any
from urllib.parse import urlsplit

import wrapt
from opentelemetry.trace.propagation.tracecontext import TraceContextTextMapPropagator

from millstream.producers.agent.attempt import AttemptContext, current_attempt
from millstream.producers.agent.shared_threads import note_call
from millstream.schemas.errors import ConfigError, MillstreamError

HTTP_CLIENTS = ("httpx", "httpx2")  # openai 3 and anthropic 2 use httpx2
_DEFAULT_PORTS = {"http": 80, "https": 443}
_Origin = tuple[str, str, int]

_proxies: dict[_Origin, bytes] = {}  # → the proxy's base path, usually empty
_wrapped: set[str] = set()
_trace_context = TraceContextTextMapPropagator()


class OutsideRollout(MillstreamError, RuntimeError):
    """Code outside a running attempt called a model through the proxy, or `attempt_environment`."""


def bind_clients(proxy_url: str) -> None:
    """Binds all later requests to this proxy. Raises `ConfigError` if it is not a URL."""
    origin, base = _place(proxy_url)
    _proxies[origin] = base
    for name in HTTP_CLIENTS:
        if name not in _wrapped:
            _wrapped.add(name)
            wrapt.register_post_import_hook(_wrap, name)


@lru_cache(maxsize=64)
def _place(proxy_url: str) -> tuple[_Origin, bytes]:
    parts = urlsplit(proxy_url)
    if parts.scheme not in _DEFAULT_PORTS or not parts.hostname:
        raise ConfigError(f"proxy_url {proxy_url!r} is not an address like http://host:8400")
    return (parts.scheme, parts.hostname, parts.port or _DEFAULT_PORTS[parts.scheme]), parts.path.rstrip("/").encode()


def _wrap(module: ModuleType) -> None:
    # AsyncClient.send returns a coroutine. The request is bound when that is created, in the caller's context.
    wrapt.wrap_function_wrapper(module, "Client.send", _send)
    wrapt.wrap_function_wrapper(module, "AsyncClient.send", _send)


def _send(wrapped: Any, instance: Any, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
    attempt = _bind(args[0] if args else kwargs["request"])
    if attempt is None or attempt.task.unresponsive_s is None:  # no limit to enforce
        return wrapped(*args, **kwargs)
    if inspect.iscoroutinefunction(wrapped):
        return _awaited(attempt, wrapped(*args, **kwargs))
    with attempt.calling():
        return wrapped(*args, **kwargs)


async def _awaited(attempt: AttemptContext, answer: Awaitable[Any]) -> Any:
    with attempt.calling():
        return await answer


def _bind(request: Any) -> AttemptContext | None:
    """Binds a request to the proxy to the current attempt and returns that. None for other requests."""
    url = request.url
    origin = url.scheme, url.host, url.port or _DEFAULT_PORTS.get(url.scheme, 0)
    base = _proxies.get(origin)
    if base is None:
        return None
    attempt = current_attempt()
    bound = url.raw_path.startswith(base + b"/rollout/")  # by `clients`, or by an earlier send
    if bound and (attempt is None or not url.raw_path.startswith(base + attempt.path.encode() + b"/")):
        return None  # its client is bound to another attempt
    if attempt is None:
        raise OutsideRollout(
            f"{request.method} {url}: the model can be called only within a rollout, because the proxy records each "
            "call for its rollout. Move the call into the agent function, or start threads from within it."
        )
    if attempt.ended:
        raise OutsideRollout(
            f"{request.method} {url}: thread {threading.current_thread().name!r} belongs to a rollout that has ended. "
            "If other rollouts use it too, use a ThreadPoolExecutor, which runs each task in its rollout's context."
        )
    note_call(attempt)
    if not bound:
        (scheme, host, port), own_base = _place(attempt.proxy_url)
        path = own_base + attempt.path.encode() + url.raw_path[len(base) :]
        request.url = url.copy_with(scheme=scheme, host=host, port=port, raw_path=path)
        request.headers["Host"] = request.url.netloc.decode()
    request.headers["Authorization"] = f"Bearer {attempt.proxy_key}"
    request.headers["x-api-key"] = attempt.proxy_key
    _trace_context.inject(request.headers)  # the proxy's span becomes a child of the client's
    return attempt
