"""Every page, over a store with real rows."""

import pytest
from starlette.testclient import TestClient

from tests.pipeline.ui.rig import World


def test_rollouts_are_listed_with_filters_in_the_address(browser: TestClient, world: World) -> None:
    everything = browser.get("/rollouts").text
    assert world.id("running") in everything
    assert "not trained on" in everything
    failed = browser.get("/rollouts", params={"status": "failed"}).text
    assert world.id("failed") in failed
    assert world.id("right") not in failed
    assert '<option value="failed" selected>' in failed
    group = browser.get("/rollouts", params={"group": "g-signal", "sort": "reward", "asc": "1"}).text
    found = [group.index(world.id(name)) for name in ("wrong", "right")]
    assert found == sorted(found)
    assert world.id("same") not in group


@pytest.mark.parametrize(
    ("text", "name"),
    [
        ("(running)", "running"),
        ("multiply(2, 3)", "wrong"),
        ("<b>too</b> MANY", "failed"),
        ("temperature 0.2", "untrainable"),
    ],
    ids=["input", "answer", "error", "reason"],
)
def test_rollouts_are_found_by_text(browser: TestClient, world: World, text: str, name: str) -> None:
    found = browser.get("/rollouts", params={"q": text}).text
    assert world.id(name) in found
    assert world.id("queued") not in found


def test_a_rollout_is_shown_with_its_conversation_and_its_tree(browser: TestClient, world: World) -> None:
    shown = browser.get(f"/rollouts/{world.id('wrong')}").text
    parts = [
        "You use a calculator.",
        "What is 2 + 3? (wrong)",
        "multiply(2, 3)",
        "2, 3 → 5",
        "The answer is 6",
        "reward reward",
    ]
    said = shown[shown.index("Conversation") :]
    places = [said.index(part) for part in parts]
    assert places[0] == min(places)
    assert places[2] < places[4]
    assert shown.count('class="span k-llm') == 2
    assert shown.count("<rect x=") == 6
    assert "data-events" not in shown  # it has ended


def test_what_a_span_holds_is_loaded_when_it_is_opened(browser: TestClient, world: World) -> None:
    shown = browser.get(f"/rollouts/{world.id('wrong')}").text
    address = shown.split('data-load="')[1].split('"')[0].replace("&amp;", "&")
    assert "gen_ai" not in shown
    assert "agent" in browser.get(address).text


def test_a_running_rollout_refreshes_itself_and_can_be_cancelled(browser: TestClient, world: World) -> None:
    path = f"/rollouts/{world.id('running')}"
    shown = browser.get(path).text
    assert "first step" in shown
    assert f'data-events="{path}/events"' in shown
    seen = shown.split("seen=")[1].split('"')[0]
    part = {"HX-Request": "true"}
    assert browser.get(f"{path}?seen={seen}", headers=part).status_code == 204
    changed = browser.get(f"{path}?seen=running-1-0", headers=part)
    assert "first step" in changed.text
    assert "<html" not in changed.text


def test_an_unknown_rollout_is_not_found(browser: TestClient) -> None:
    answer = browser.get("/rollouts/nobody")
    assert (answer.status_code, "no rollout" in answer.text) == (404, True)
    assert browser.get("/nothing").status_code == 404


def test_the_overview_says_what_happens_now(browser: TestClient, world: World) -> None:
    shown = browser.get("/").text
    for part in ["Rollouts a second", "Waiting", "Busy slots", "h1", "step 5", "1 new dead letters", "calc"]:
        assert part in shown
    part = browser.get("/", headers={"HX-Request": "true"}).text
    assert "<html" not in part
    assert "Training runs" not in part


def test_the_curve_of_rewards_leads_to_the_rollouts_of_a_version(browser: TestClient, world: World) -> None:
    curve = browser.get("/data/rewards.json", params={"mode": "train", "experiment": "e1"}).json()
    assert curve["x"][:2] == ["calc.0.0", "calc.0.1"]
    mean = next(series for series in curve["series"] if series["name"] == "mean")
    assert mean["values"][0] == pytest.approx(0.15)
    listed = browser.get(curve["links"][0]).text
    assert world.id("v0-0") in listed
    assert world.id("v1-0") not in listed


def test_the_training_page_shows_each_token_and_why_a_call_is_left_out(browser: TestClient, world: World) -> None:
    shown = browser.get(f"/rollouts/{world.id('right')}/training").text
    assert shown.count('aria-label="Turn') == 2
    assert 'title="token 0: log-probability -0.05, calc.0.3"' in shown
    assert shown.count('class="tok p6"') >= 2  # 95 %
    assert shown.count('title="prompt, masked"') == 12
    assert "0.7071" in shown or "0.57" in shown  # its advantage among three
    left_out = browser.get(f"/rollouts/{world.id('untrainable')}/training").text
    assert "not trained on" in left_out
    assert "sampled with temperature 0.2" in left_out
    assert "no triplets" in browser.get(f"/rollouts/{world.id('queued')}/training").text


def test_a_group_is_shown_side_by_side_until_its_members_part(browser: TestClient, world: World) -> None:
    shown = browser.get("/groups/g-signal").text
    assert shown.count('class="member') >= 3
    assert "the first step is" not in shown
    assert "from here they differ" in shown or "part at the first step" in shown
    assert "no signal" not in shown
    nothing = browser.get("/groups/g-none").text
    assert "no signal" in nothing
    assert browser.get("/groups/nothing").status_code == 404


def test_experiments_are_listed_and_compared(browser: TestClient) -> None:
    listed = browser.get("/experiments").text
    assert "calc-small" in listed
    shown = browser.get("/experiments/e1", params={"against": "e2"}).text
    assert "arguments.lr" in shown
    assert "calc.0.6" in shown
    assert 'value="entropy"' in shown
    curve = browser.get("/data/steps.json", params={"experiment": "e1", "plot": "kl"}).json()
    assert curve["series"][0]["values"][2] == pytest.approx(0.02)
    assert (
        browser.get("/data/steps.json", params={"experiment": "e1", "plot": "nan"}).json()["series"][0]["values"][0]
        is None
    )
    assert browser.get("/experiments/unknown").status_code == 404


def test_sql_reads_within_limits(browser: TestClient, world: World) -> None:
    shown = browser.get("/sql", params={"q": "SELECT rollout_id, status FROM rollouts WHERE status = 'failed'"}).text
    assert f'href="/rollouts/{world.id("failed")}"' in shown
    assert "Slowest rollouts" in shown
    for query, says in [
        ("SELECT nothing FROM rollouts", "nothing"),
        ("DROP TABLE tasks_raw", "readonly"),
        ("SELECT * FROM file('/etc/passwd', 'LineAsString')", "readonly"),
        ("SELECT * FROM url('http://127.0.0.1:1/', 'LineAsString')", "readonly"),
        ("SELECT 1 SETTINGS max_execution_time = 1000", "readonly"),
    ]:
        answer = browser.get("/sql", params={"q": query}).text
        assert 'role="alert"' in answer, query
        assert says in answer.lower()
    many = browser.get("/sql", params={"q": "SELECT number FROM numbers(1000000)"}).text
    assert "1,000 rows" in many or "rows, cut" in many
    assert many.count("<tr>") == 1001


def test_a_statement_in_a_link_of_another_site_is_not_run(browser: TestClient) -> None:
    answer = browser.get("/sql", params={"q": "SELECT 6 * 7"}, headers={"Sec-Fetch-Site": "cross-site"}).text
    assert "42" not in answer.replace("1:42", "")
    assert "link from another site" in answer
