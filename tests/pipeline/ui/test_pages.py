"""Every page, over a store with real rows."""

import hashlib
import json
import re
import time
from dataclasses import replace
from pathlib import Path
from typing import Any

import factories
import pytest
from starlette.testclient import TestClient

from millstream.pipeline.ui.views.rollout import SPANS
from millstream.schemas.wire.records import Control
from tests.pipeline.ui.rig import S, World, conversation_of, store, triplets_of


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
    assert "rollouts were searched" in found
    assert "Search older ones" not in found


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


def test_advantages_stand_in_the_order_of_turns(browser: TestClient, world: World) -> None:
    for turns in ((1.0, 0.5), (0.0, 0.5)):
        task = factories.task(group_id="g-turns", group_size=2, created_at=time.time_ns())
        store(world, task, topic=world.settings.topics.tasks("normal"))
        answers = conversation_of(task, "at", "?", ["add", "subtract"], task.created_at)
        made = [
            replace(triplet, reward=reward)
            for triplet, reward in zip(triplets_of(task, "at", answers, 0.0), turns, strict=True)
        ]
        store(world, *made, topic=world.settings.topics.triplets)
    shown = re.findall(r"<tr>.*?</tr>", browser.get("/groups/g-turns").text)
    found = [re.findall(r'class="reward \w+">([^<]+)<', row) for row in shown]
    assert sorted(row for row in found if row) == [["-0.7071", "0"], ["0.7071", "0"]]


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


def test_ten_thousand_spans_are_shown_in_parts_each_of_which_can_be_reached(browser: TestClient, world: World) -> None:
    """Entry: 10,000 spans in a tree stay usable."""
    total, now = 10_000, time.time_ns()
    task = factories.task(created_at=now - 20 * S)
    deep = 50  # of each branch: span n hangs below the one before it
    spans = [
        factories.span(
            task,
            "big",
            name=f"step {n}",
            span_id=f"{n + 1:016x}",
            sequence=n,
            parent_id=f"{n:016x}" if n % deep else "",
            start=now - 10 * S + n * 10**5,
            end=now - 9 * S,
        )
        for n in range(total)
    ]
    store(world, task, topic=world.settings.topics.tasks("normal"))
    store(world, factories.event(task, "big", "preparing", time=now - 11 * S), *spans)
    path = f"/rollouts/{task.rollout_id}"
    first = browser.get(path).text
    assert "10,000 spans" in first
    assert len(first) < 400_000
    assert first.count('class="span ') == SPANS
    begins = {int(at) for at in re.findall(r"attempt=big&amp;at=(\d+)", first)}
    assert begins == set(range(0, total, SPANS))
    named = re.compile(r"</i>(step \d+) <small>")
    assert named.findall(first) == [f"step {n}" for n in range(SPANS)]
    last = browser.get(path, params={"attempt": "big", "at": total - total % SPANS}).text
    assert named.findall(last) == [f"step {n}" for n in range(total - total % SPANS, total)]
    assert len(last) < 400_000
    address = re.findall(r'data-load="([^"]*)"', first)[7].replace("&amp;", "&")
    assert "recorded by agent" in browser.get(address).text


@pytest.fixture
def tokenizer(tmp_path: Path) -> Path:
    """A byte-level one, as those of most models."""
    tokenizers = pytest.importorskip("tokenizers", reason="texts of tokens need the extra `train`")
    made = tokenizers.ByteLevelBPETokenizer()
    made.train_from_iterator(["The answer is 5. é"], vocab_size=300, special_tokens=["<|end|>"])
    made.save(str(tmp_path / "tokenizer.json"))
    return tmp_path / "tokenizer.json"


def trained(world: World, experiment: str, folder: Path, digest: str, **record: Any) -> str:
    """The id of a rollout of an experiment that was started with the model in ``folder``."""
    now = time.time_ns()
    body = {"arguments": {"model": str(folder)}, "model": {"tokenizer.json": digest}, "run": experiment} | record
    control = Control(
        kind="experiment", name=experiment, experiment_id=experiment, body=json.dumps(body), created_at=now
    )
    task = factories.task(created_at=now - 20 * S, experiment_id=experiment)
    spans = conversation_of(task, "at", "What?", ["The answer"], now - 19 * S)
    store(world, control, topic=world.settings.topics.control)
    store(world, task, topic=world.settings.topics.tasks("normal"))
    store(world, factories.event(task, "at", "preparing", time=now - 19 * S), *spans)
    store(world, *triplets_of(task, "at", spans, 1.0), topic=world.settings.topics.triplets)
    return task.rollout_id


def test_tokens_are_shown_as_texts_if_the_models_tokenizer_is_here(
    browser: TestClient, world: World, tokenizer: Path
) -> None:
    """Prompt tokens of the rig are 1 to 6: of this vocabulary the bytes ! to &."""
    digest = hashlib.sha256(tokenizer.read_bytes()).hexdigest()
    same = trained(world, "with-texts", tokenizer.parent, digest, algorithm="RLOO")
    shown = browser.get(f"/rollouts/{same}/training").text
    assert 'title="prompt, masked: token 1">!</span>' in shown
    assert "RLOO computes its own, which is not recorded" in shown
    other = trained(world, "with-ids", tokenizer.parent, "0" * 64, algorithm="GRPO")
    shown = browser.get(f"/rollouts/{other}/training").text
    assert 'title="prompt, masked">1</span>' in shown
    assert "computes its own" not in shown
