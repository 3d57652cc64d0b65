"""What a person does in a browser, in a real one, without an error on its console."""

import time
from collections.abc import Iterator
from typing import Any

import factories
import pytest

from millstream.pipeline.ui.serve import serving_pages
from tests.pipeline.ui.chromium import MISSING, chromium, installed, watched
from tests.pipeline.ui.rig import S, World, ended, store

expect = pytest.importorskip("playwright.sync_api", reason=MISSING).expect
expect.set_options(timeout=60_000)
pytestmark = [pytest.mark.slow, pytest.mark.skipif(installed() is None, reason=MISSING)]
TOKEN = "s3cret"


@pytest.fixture(scope="module")
def address(world: World) -> Iterator[str]:
    with serving_pages(world.settings, world.log) as served:
        yield served


@pytest.fixture(scope="module")
def browser_process() -> Iterator[Any]:
    with chromium() as browser:
        yield browser


@pytest.fixture
def page(browser_process: Any) -> Iterator[Any]:
    """Fails the test for an error on the console."""
    opened = browser_process.new_page(viewport={"width": 1280, "height": 900})
    opened.set_default_timeout(60_000)
    opened.add_init_script("sessionStorage.setItem('live', 'off')")  # a request that a reload cuts off is an error
    errors = watched(opened)
    yield opened
    opened.close()
    assert errors == []


def test_from_the_curve_to_a_rollout_and_its_tokens(page: Any, address: str) -> None:
    page.goto(address)
    page.wait_for_selector(".chart[data-ready]")
    box = page.locator(".u-over").bounding_box()
    page.mouse.move(box["x"] + 2, box["y"] + box["height"] / 2)
    expect(page.locator(".chart-note")).to_contain_text("calc.0.0")
    page.mouse.click(box["x"] + 2, box["y"] + box["height"] / 2)
    page.wait_for_url("**/rollouts?**version=calc.0.0")
    assert page.locator("tbody tr").count() == 4
    page.goto(f"{address}rollouts?group=g-signal")
    page.locator("tbody tr a").first.click()
    page.wait_for_selector(".trace")
    page.locator("a[href$='/training']").click()
    page.wait_for_selector(".tokens .tok")


def test_filters_and_search_change_the_list_and_the_address(page: Any, address: str) -> None:
    page.goto(f"{address}rollouts")
    everything = page.locator("tbody tr").count()
    page.select_option("#f-status", "failed")
    page.wait_for_url("**status=failed**")
    expect(page.locator("tbody tr")).to_have_count(1)
    page.select_option("#f-status", "")
    page.keyboard.press("Escape")
    page.locator("h1").click()
    page.keyboard.press("/")
    page.keyboard.type("multiply(2, 3)")
    page.wait_for_url("**q=multiply**")
    expect(page.locator("tbody tr")).to_have_count(1)
    page.reload()
    assert page.locator("tbody tr").count() == 1 < everything
    assert page.input_value("#f-q") == "multiply(2, 3)"


def test_spans_open_with_what_they_hold_and_stay_open(page: Any, address: str, world: World) -> None:
    page.goto(f"{address}rollouts/{world.id('running')}")
    page.locator(".span > summary").first.click()
    page.wait_for_selector(".span .attributes")
    page.evaluate("htmx.ajax('GET', location.pathname + '?seen=', {target: '#rollout', swap: 'outerHTML'})")
    page.wait_for_selector(".span[open] .attributes")
    page.keyboard.press("j")


def test_a_running_rollout_is_followed_until_it_ends(browser_process: Any, address: str, world: World) -> None:
    """By events of the server, not by asking: nothing is asked for while nothing happens."""
    now = time.time_ns()
    task = factories.task(created_at=now - 5 * S)
    begun = [factories.event(task, "at", name, time=now - n) for n, name in ((2, "preparing"), (1, "running"))]
    store(world, task, topic=world.settings.topics.tasks("normal"))
    store(world, *begun)
    opened = browser_process.new_page()
    opened.set_default_timeout(60_000)
    errors, asked = watched(opened), []
    opened.on("request", lambda request: asked.append(request.url.partition("/rollouts/")[2].partition("?")[0]))
    path = f"rollouts/{task.rollout_id}"
    with opened.expect_response(f"**/{path}/events**"):
        opened.goto(f"{address}{path}")
    opened.wait_for_timeout(5000)
    assert asked.count(task.rollout_id) == 1
    store(world, factories.span(task, "at", name="a step on the way", start=now - S, end=now))
    expect(opened.locator(".trace")).to_contain_text("a step on the way")
    store(world, factories.event(task, "at", "succeeded", time=now + S), ended(task, "succeeded", "at"))
    expect(opened.locator("#rollout[data-events]")).to_have_count(0)
    expect(opened.locator(".title .status").first).to_have_text("succeeded")
    opened.close()
    assert errors == []


def test_a_running_rollout_is_cancelled(page: Any, address: str, world: World) -> None:
    page.goto(f"{address}rollouts/{world.id('running')}")
    page.get_by_role("button", name="Cancel").click()
    page.wait_for_url(f"**/rollouts/{world.id('running')}")
    assert page.locator("h1").inner_text().startswith("Rollout")


def test_hostile_contents_do_nothing(page: Any, address: str, world: World) -> None:
    page.on("dialog", lambda dialog: pytest.fail(f"a script ran: {dialog.message}"))
    for path in ("rollouts", f"rollouts/{world.id('hostile')}", f"rollouts/{world.id('hostile')}/training", "dead"):
        page.goto(address + path)
        assert page.locator("img").count() == 0
        assert page.evaluate("document.documentElement.scrollWidth <= innerWidth + 1"), path


def test_sql_is_run_and_leads_to_rollouts(page: Any, address: str) -> None:
    page.goto(f"{address}sql")
    page.get_by_text("Slowest rollouts").click()
    page.wait_for_selector("tbody tr")
    page.fill("#q", "SELECT rollout_id FROM rollouts WHERE status = 'failed'")
    page.locator("#q").press("Control+Enter")
    expect(page.locator("tbody tr")).to_have_count(1)
    page.locator("tbody a").click()
    page.wait_for_selector("text=three is <b>too</b> many")


@pytest.mark.parametrize("scheme", ["light", "dark"])
def test_each_page_fits_a_narrow_window_and_can_be_read(
    browser_process: Any, address: str, world: World, scheme: str
) -> None:
    page = browser_process.new_page(viewport={"width": 400, "height": 800}, color_scheme=scheme)
    errors = watched(page)
    paths = ("", "rollouts", f"rollouts/{world.id('wrong')}", "groups/g-signal", "experiments/e1", "sql", "dead")
    for path in paths:
        page.goto(address + path)
        assert page.evaluate("document.documentElement.scrollWidth <= innerWidth + 1"), path
        assert page.evaluate(CONTRAST) >= 4.5, (path, scheme)
    page.close()
    assert errors == []


# The contrast of the page's text on its ground (WCAG 2.1): 4.5 is enough for text of normal size.
CONTRAST = """() => {
  const light = (text) => {
    const [r, g, b] = text.match(/[\\d.]+/g).map(Number).map((v) => v / 255)
      .map((v) => v <= 0.03928 ? v / 12.92 : ((v + 0.055) / 1.055) ** 2.4);
    return 0.2126 * r + 0.7152 * g + 0.0722 * b;
  };
  const root = getComputedStyle(document.documentElement);
  const ground = light(root.backgroundColor);
  const kinds = [".faint", "h1", "small", ".bad", "a"];
  return Math.min(...kinds.flatMap((name) => [...document.querySelectorAll(`main ${name}`)])
    .filter((e) => e.offsetParent)
    .map((e) => light(getComputedStyle(e).color))
    .map((l) => (Math.max(l, ground) + 0.05) / (Math.min(l, ground) + 0.05)));
}"""


def test_a_token_is_asked_for_once(browser_process: Any, world: World) -> None:
    settings = world.settings.model_copy(update={"gateway_token": type(world.settings.gateway_token)(TOKEN)})
    with serving_pages(settings, world.log) as address:
        context = browser_process.new_context()
        page = context.new_page()
        page.goto(f"{address}rollouts")
        page.wait_for_url("**/login")
        page.fill("#token", "wrong")
        page.keyboard.press("Enter")
        page.wait_for_selector("text=This is not the token")
        page.fill("#token", TOKEN)
        page.keyboard.press("Enter")
        page.wait_for_selector("text=Rollouts a second")
        page.goto(f"{address}rollouts")
        assert page.locator("tbody tr").count() > 5
        assert context.cookies()[0]["httpOnly"]
        page.get_by_role("button", name="Sign out").click()
        page.wait_for_url("**/login")
        context.close()
