"""A running rollout as server-sent events: its page asks for what is new when there is something new."""

import asyncio
from collections.abc import AsyncIterator
from dataclasses import dataclass
from typing import Final

from starlette.concurrency import run_in_threadpool
from starlette.exceptions import HTTPException
from starlette.requests import Request
from starlette.responses import PlainTextResponse, Response, StreamingResponse
from starlette.routing import Route
from starlette.types import Receive, Scope, Send

from millstream.pipeline.store import pages
from millstream.pipeline.ui.source import Source
from millstream.schemas.errors import StoreError


@dataclass(frozen=True, slots=True)
class StreamPolicy:
    streams: int = 32  # at a time: few of the server's 256 connections; a page without one asks every two seconds
    poll_s: float = 1.0  # between two questions to the store, which sinks fill once a second
    quiet_s: float = 15.0  # after which a comment keeps proxies from closing the connection


@dataclass(frozen=True, slots=True)
class State:
    """What a page has seen of a rollout, as text that changes when there is more to see."""

    seen: str
    ended: bool


class _Counted(StreamingResponse):
    """Counts itself in the application's ``streams`` while it is sent."""

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        state = scope["app"].state
        state.streams += 1
        try:
            await super().__call__(scope, receive, send)
        finally:
            state.streams -= 1


async def events(request: Request) -> Response:
    """``changed`` whenever the page of the rollout would show something new, ``ended`` at its end, which also ends the
    stream. ``?seen``: what the page shows; after a lost connection browsers send it as ``Last-Event-ID``."""
    source: Source = request.app.state.source
    policy: StreamPolicy = request.app.state.stream_policy
    rollout_id = request.path_params["id"]
    if await run_in_threadpool(state_of, source, rollout_id) is None:
        raise HTTPException(404, f"The store has no rollout {rollout_id!r}.")
    if request.app.state.streams >= policy.streams:
        return PlainTextResponse(f"{policy.streams} rollouts are being followed already", 503)
    seen = request.headers.get("last-event-id", request.query_params.get("seen", ""))
    stream = _changes(request, source, rollout_id, seen, policy)
    return _Counted(stream, media_type="text/event-stream", headers={"X-Accel-Buffering": "no"})


async def _changes(
    request: Request, source: Source, rollout_id: str, seen: str, policy: StreamPolicy
) -> AsyncIterator[str]:
    quiet = 0.0
    while not source.ends() and not await request.is_disconnected():
        try:
            state = await run_in_threadpool(state_of, source, rollout_id)
        except StoreError:
            return  # the browser connects again, and its page shows the error if it lasts
        if state is not None and state.seen != seen:
            seen, quiet = state.seen, 0.0
            yield f"event: changed\nid: {seen}\ndata: {seen}\n\n"
        if state is None or state.ended:
            yield "event: ended\ndata: \n\n"
            return
        if quiet >= policy.quiet_s:
            quiet = 0.0
            yield ": \n\n"
        quiet += policy.poll_s
        await asyncio.sleep(policy.poll_s)


def state_of(source: Source, rollout_id: str) -> State | None:
    """None if the store has no such rollout. Raises `StoreError`."""
    rows = source.store.sql(pages.ROLLOUT_STATE, {"rollout_id": rollout_id}).rows
    if not rows:
        return None
    status, ended, attempts, spans = rows[0]
    return State(f"{status}-{'.'.join(attempts)}-{spans}", bool(ended))


ROUTES: Final = [Route("/rollouts/{id:path}/events", events)]
