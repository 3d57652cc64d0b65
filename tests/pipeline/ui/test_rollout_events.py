"""Events of a running rollout: what a page hears without asking."""

import json
import time
from collections.abc import Iterator
from contextlib import contextmanager
from http.client import HTTPConnection, HTTPResponse
from urllib.parse import urlsplit

import factories
import pytest
from starlette.testclient import TestClient

from millstream.pipeline.ui.app import ui_app
from millstream.pipeline.ui.serve import serving_pages
from millstream.pipeline.ui.source import Source
from millstream.pipeline.ui.views.rollout_events import StreamPolicy
from tests.pipeline.ui.rig import S, World, ended, store


@contextmanager
def stream(address: str, path: str, **headers: str) -> Iterator[HTTPResponse]:
    connection = HTTPConnection(urlsplit(address).netloc, timeout=30)
    try:
        connection.request("GET", path, headers=headers)
        yield connection.getresponse()
    finally:
        connection.close()


def next_event(answer: HTTPResponse) -> dict[str, str]:
    """Its fields; empty at the end of the stream."""
    fields: dict[str, str] = {}
    while line := answer.readline().decode().rstrip("\n"):
        name, _, value = line.partition(": ")
        fields[name] = value
    return fields


def until(answer: HTTPResponse, seen: str) -> dict[str, str]:
    """The event that reports this state."""
    while event := next_event(answer):
        assert event["event"] == "changed"
        if event["id"] == seen:
            return event
    raise AssertionError(f"the stream has ended before {seen}")


def test_a_running_rollout_reports_what_is_new_and_its_end(world: World) -> None:
    """Entry: live by SSE while it runs."""
    now = time.time_ns()
    task = factories.task(input=json.dumps("live"), created_at=now - 5 * S)
    store(world, task, topic=world.settings.topics.tasks("normal"))
    path = f"/rollouts/{task.rollout_id}"
    with serving_pages(world.settings, None) as address, stream(address, f"{path}/events?seen=x") as answer:
        assert answer.status == 200
        assert answer.headers["Content-Type"].startswith("text/event-stream")
        assert answer.headers["Cache-Control"] == "no-store"
        assert "default-src 'none'" in answer.headers["Content-Security-Policy"]
        assert next_event(answer) == {"event": "changed", "id": "queued--0", "data": "queued--0"}
        span = factories.span(task, "at", name="step", start=now - S, end=now)
        begun = [factories.event(task, "at", name, time=now - n) for n, name in ((2, "preparing"), (1, "running"))]
        store(world, *begun, span)
        news = until(answer, "running-running-1")  # tables are filled one after the other
        store(world, factories.event(task, "at", "succeeded", time=now + S), ended(task, "succeeded", "at"))
        until(answer, "succeeded-succeeded-1")
        assert next_event(answer)["event"] == "ended"
        assert answer.read() == b""
        with stream(address, f"{path}/events", **{"Last-Event-ID": news["id"]}) as again:  # a connection was lost
            assert [next_event(again)["event"] for _ in range(2)] == ["changed", "ended"]


def test_a_page_that_is_up_to_date_hears_nothing_but_the_end(browser: TestClient, world: World) -> None:
    path = f"/rollouts/{world.id('wrong')}/events"
    first = browser.get(path).text
    seen = first.split("id: ")[1].split("\n")[0]
    assert browser.get(path, params={"seen": seen}).text == "event: ended\ndata: \n\n"


def test_events_of_an_unknown_rollout_are_not_found(browser: TestClient) -> None:
    assert browser.get("/rollouts/nobody/events").status_code == 404


def test_streams_are_bounded_and_a_place_is_free_again_when_one_ends(world: World) -> None:
    source = Source(world.settings)
    app = ui_app(source, stream_policy=StreamPolicy(streams=1))
    with TestClient(app, base_url="http://127.0.0.1:8700") as client:
        path = f"/rollouts/{world.id('wrong')}/events"
        assert [client.get(path).status_code for _ in range(3)] == [200] * 3
        app.state.streams = 1
        refused = client.get(path)
        assert (refused.status_code, refused.text) == (503, "1 rollouts are being followed already")
    source.close()


@pytest.mark.parametrize("leaves", ["browser", "server"])
def test_a_stream_ends_with_its_browser_or_its_server(world: World, leaves: str) -> None:
    """A server that stops does not wait for the pages that are open."""
    source = Source(world.settings)
    app = ui_app(source, stream_policy=StreamPolicy(poll_s=0.01))
    from millstream.pipeline.services.serve_asgi import listen, served_in_thread

    listener = listen("127.0.0.1", 0)
    address = f"http://127.0.0.1:{listener.getsockname()[1]}/"
    with served_in_thread(app, listener, "pages") as server:
        source.ends = lambda: server.should_exit
        with stream(address, f"/rollouts/{world.id('running')}/events") as answer:
            assert next_event(answer)["event"] == "changed"
            assert app.state.streams == 1
            if leaves == "server":
                server.should_exit = True
                assert answer.read() == b""
        deadline = time.monotonic() + 10
        while app.state.streams and time.monotonic() < deadline:
            time.sleep(0.01)
        assert app.state.streams == 0
    source.close()


def test_with_a_token_a_stream_is_for_those_who_signed_in(world: World) -> None:
    source = Source(world.settings)
    with TestClient(ui_app(source, "s3cret"), base_url="http://127.0.0.1:8700", follow_redirects=False) as client:
        path = f"/rollouts/{world.id('wrong')}/events"
        assert client.get(path, headers={"Accept": "text/event-stream"}).status_code == 401
        assert client.get(path, headers={"Authorization": "Bearer s3cret"}).status_code == 200
    source.close()
