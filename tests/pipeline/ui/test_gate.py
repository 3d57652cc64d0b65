"""Who may see the pages, and what their contents can do."""

from collections.abc import Iterator
from html.parser import HTMLParser

import pytest
from starlette.testclient import TestClient

from millstream.pipeline.ui.app import ui_app
from millstream.pipeline.ui.serve import serving_pages
from millstream.pipeline.ui.source import Source
from millstream.schemas.config.settings import load_settings
from millstream.schemas.errors import ConfigError
from tests.pipeline.ui.rig import World

HTML = {"Accept": "text/html"}


@pytest.fixture
def closed(world: World) -> Iterator[TestClient]:
    """With a token, at a name of another machine."""
    source = Source(world.settings, world.log)
    with TestClient(ui_app(source, "s3cret"), base_url="https://ui.example", follow_redirects=False) as client:
        yield client
    source.close()


class Tags(HTMLParser):
    """The tags of a page with their attributes, as a browser reads them."""

    def __init__(self, page: str) -> None:
        super().__init__()
        self.seen: list[tuple[str, str, str]] = []
        self.feed(page)

    def handle_starttag(self, tag: str, attributes: list[tuple[str, str | None]]) -> None:
        self.seen += [(tag, name, value or "") for name, value in attributes] or [(tag, "", "")]


PAGES = ["/", "/rollouts", "/groups/g-signal", "/experiments", "/experiments/e1", "/dead", "/sql"]


@pytest.mark.parametrize("path", [*PAGES, "/nothing", "/static/ui.css", "/static/vendor/htmx-2.0.11.min.js"])
def test_nothing_inline_and_nothing_from_elsewhere_runs(browser: TestClient, path: str) -> None:
    answer = browser.get(path)
    policy = answer.headers["content-security-policy"]
    assert "default-src 'none'" in policy
    assert "unsafe" not in policy
    assert answer.headers["x-content-type-options"] == "nosniff"
    if "html" in answer.headers["content-type"]:
        found = Tags(answer.text)
        assert {"html", "script", "link"} <= {tag for tag, _, _ in found.seen}
        assert all(
            name.startswith("src") for tag, name, _ in found.seen if tag == "script" and name not in ("defer", "")
        )
        for tag, name, value in found.seen:
            assert tag != "style", tag
            assert name != "style", tag
            assert not name.startswith("on"), (tag, name)
            if name in ("href", "src", "action", "hx-get", "data-src", "data-load"):
                assert value.startswith(("/", "?", "#")), value
                assert not value.startswith("//")
        assert answer.headers["cache-control"] == "no-store"


def test_hostile_contents_are_shown_as_text(browser: TestClient, world: World) -> None:
    rollout = f"/rollouts/{world.id('hostile')}"
    shown = browser.get(rollout).text
    span = shown.split("k-llm")[1].split('data-load="')[1].split('"')[0].replace("&amp;", "&")
    pages = [browser.get(path).text for path in ["/rollouts", rollout, f"{rollout}/training", span, "/dead"]]
    for page in pages:
        assert "<script>alert" not in page
        assert "<img" not in page
        assert "\x1b" not in page
        assert "\u202e" not in page
        assert "{{ 7*7 }}" in page or "49" not in page
    assert "&lt;script&gt;" in pages[1]
    assert "\\x1b[31m" in pages[1]
    assert "\\u202e" in pages[1]
    assert "more characters" in pages[1]
    assert len(pages[1]) < 100_000


@pytest.mark.parametrize("host", ["rebound.example:8700", "192.0.2.1", ""])
def test_without_a_token_only_requests_to_this_machine_are_answered(browser: TestClient, host: str) -> None:
    assert browser.get("/", headers={"Host": host}).status_code == 403
    assert browser.get("/static/ui.css", headers={"Host": host}).status_code == 403


@pytest.mark.parametrize("path", ["/cancel", "/pause", "/resume", "/dead/replay", "/logout"])
@pytest.mark.parametrize("origin", [None, "null", "https://evil.example", "http://127.0.0.1:9999", "http://[::1"])
def test_only_this_page_changes_something(browser: TestClient, path: str, origin: str | None) -> None:
    headers = {} if origin is None else {"Origin": origin}
    answer = browser.post(path, data={"rollout": "r", "experiment": "e"}, headers=headers)
    assert (answer.status_code, "page of this address" in answer.text) == (403, True)


@pytest.mark.parametrize("path", [*PAGES, "/rollouts/r", "/data/rewards.json", "/dead/0:0"])
def test_the_token_is_required(closed: TestClient, path: str) -> None:
    answer = closed.get(path, headers=HTML)
    assert (answer.status_code, answer.headers["location"]) == (303, "/login")
    assert closed.get(path).status_code == 401
    assert closed.get(path, headers={"Authorization": "Bearer wrong"}).status_code == 401
    assert closed.get(path, headers={"Cookie": "millstream_session=s3cret"}).status_code == 401
    assert closed.get(path, headers={"HX-Request": "true"}).headers["hx-redirect"] == "/login"
    assert closed.post("/cancel", headers={"Origin": "https://ui.example"}).status_code == 401


def test_the_form_gives_a_cookie_that_opens_the_pages(closed: TestClient) -> None:
    origin = {"Origin": "https://ui.example"}
    assert "gateway_token" in closed.get("/login").text
    assert closed.get("/static/ui.css").status_code == 200
    wrong = closed.post("/login", data={"token": "wrong"}, headers=origin)
    assert (wrong.status_code, "set-cookie" in wrong.headers) == (401, False)
    right = closed.post("/login", data={"token": "s3cret"}, headers=origin)
    cookie = right.headers["set-cookie"]
    assert (right.status_code, right.headers["location"]) == (303, "/")
    assert all(part in cookie.lower() for part in ("httponly", "samesite=strict", "secure"))
    assert "s3cret" not in cookie
    assert "Sign out" in closed.get("/rollouts").text
    closed.post("/logout", headers=origin)
    assert closed.get("/rollouts", headers=HTML).status_code == 303


def test_programs_send_the_token_in_a_header(closed: TestClient) -> None:
    assert closed.get("/rollouts", headers={"Authorization": "Bearer s3cret"}).status_code == 200


def test_other_machines_need_a_token() -> None:
    with pytest.raises(ConfigError, match="MILLSTREAM_GATEWAY_TOKEN"), serving_pages(load_settings(), None, "0.0.0.0"):
        pass
