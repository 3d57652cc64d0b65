"""The same pages below /ui of the gateway."""

import asyncio
from collections.abc import Iterator

import pytest
from starlette.testclient import TestClient

from millstream.pipeline.services.gateway import Gateway
from millstream.pipeline.services.health import Health
from millstream.schemas.config.settings import Settings
from tests.pipeline.ui.rig import World


@pytest.fixture(params=["", "s3cret"], ids=["open", "token"])
def gateway(world: World, request: pytest.FixtureRequest) -> Iterator[TestClient]:
    settings: Settings = world.settings.model_copy(
        update={"gateway_token": type(world.settings.gateway_token)(request.param)}
    )
    made = Gateway(world.log, world.log.producer(), settings, Health(world.log.polls, asyncio.Event()))
    made.pages.no_store = ""  # the store is of this very process
    with TestClient(made.app, base_url="http://127.0.0.1:8600", follow_redirects=False) as client:
        client.token = request.param  # type: ignore[attr-defined]
        yield client
    made.pages.close()


def test_the_gateway_leads_to_the_pages(gateway: TestClient, world: World) -> None:
    token = gateway.token  # type: ignore[attr-defined]
    assert gateway.get("/").headers["location"] == "/ui/"
    if token:
        answer = gateway.get("/ui/", headers={"Accept": "text/html"})
        assert (answer.status_code, answer.headers["location"]) == (303, "/ui/login")
        signed_in = gateway.post("/ui/login", data={"token": token}, headers={"Origin": "http://127.0.0.1:8600"})
        assert "path=/ui/" in signed_in.headers["set-cookie"].lower()
    rollout = f"/ui/rollouts/{world.id('wrong')}"
    listed = gateway.get("/ui/rollouts").text
    assert f'href="{rollout}"' in listed
    assert '="/rollouts' not in listed
    assert "multiply(2, 3)" in gateway.get(rollout).text
    assert gateway.get("/ui/static/ui.css").status_code == 200
    curve = gateway.get("/ui/data/rewards.json").json()
    assert curve["links"][0].startswith("/ui/rollouts?")
    assert gateway.get("/ui/nothing").status_code == 404


def test_the_cookie_opens_the_pages_only(gateway: TestClient) -> None:
    token = gateway.token  # type: ignore[attr-defined]
    if token:
        gateway.post("/ui/login", data={"token": token}, headers={"Origin": "http://127.0.0.1:8600"})
        assert gateway.post("/cancel", json={"rollout": "r"}).status_code == 401
        assert gateway.get("/load").status_code == 401
        assert gateway.get("/uiload").status_code == 401
    else:
        assert gateway.get("/ui/", headers={"Host": "rebound.example"}).status_code == 403


def test_an_embedded_store_is_left_to_its_process(world: World) -> None:
    made = Gateway(world.log, world.log.producer(), world.settings, Health(world.log.polls, asyncio.Event()))
    with TestClient(made.app, base_url="http://127.0.0.1:8600") as client:
        shown = client.get("/ui/")
        assert (shown.status_code, "--query-port" in shown.text) == (200, True)
        assert "Waiting" in shown.text
