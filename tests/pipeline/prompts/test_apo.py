"""The search over a run: rollouts by a runner, critiques through the proxy, records in the store."""

import json
from pathlib import Path
from typing import Any

import pytest

import millstream as ms
from millstream.pipeline.prompts.apo import Apo
from millstream.pipeline.prompts.search import Beam
from millstream.pipeline.prompts.versions import FILE
from millstream.pipeline.prompts.writers import Budget, Spent
from millstream.pipeline.training.report import Summary
from millstream.schemas.config.settings import Settings
from millstream.schemas.errors import ConfigError
from tests.pipeline.prompts.rig import FIRST, RULES, TASKS, TOKENS, VAL_TASKS, agent, blind, helpful, useless, writing

PROMPTS = {"system": ms.PromptTemplate(template=FIRST)}
BEAM = Beam(beam_width=2, branch_factor=2, rounds=4, batch=4, validation_batch=8)


async def search(settings: Settings, run_dir: Path, **given: Any) -> Summary:
    options = {
        "critic": "critic",
        "beam": BEAM,
        **{k: given.pop(k) for k in ("budget", "beam", "editor") if k in given},
    }
    arguments = {"agent": agent, "prompts": PROMPTS, "seed": 3, "run_dir": run_dir, "settings": settings, **given}
    tasks, val_tasks = arguments.pop("tasks", TASKS), arguments.pop("val_tasks", VAL_TASKS)
    return await ms.Trainer(algorithm=Apo(**options), **arguments).train(tasks, val_tasks)


def best(run_dir: Path) -> dict[str, Any]:
    found: dict[str, Any] = json.loads((run_dir / FILE).read_text())
    return found


def store(run_dir: Path) -> ms.ClickHouseStore:
    return ms.ClickHouseStore(ms.load_settings(clickhouse_dsn=f"chdb://{run_dir}/store"))


async def test_it_finds_the_prompt_and_everything_is_in_the_store(tmp_path: Path) -> None:
    async with writing() as (server, settings):
        summary = await search(settings, tmp_path)
    found = best(tmp_path)
    assert found["score"] == summary.validation_reward == 1.0
    assert all(rule in found["prompts"]["system"]["template"] for rule in RULES)
    assert [step.validation_reward for step in summary.steps] == sorted(
        step.validation_reward or 0 for step in summary.steps
    )
    assert summary.steps[-1].metrics["writer_tokens"] == 2 * TOKENS * len(server.requests)

    with_store = store(tmp_path)
    candidates = with_store.sql("SELECT * FROM prompts ORDER BY number").records()
    assert [each["number"] for each in candidates][:3] == [0, 1, 2]
    first, second = candidates[:2]
    assert (first["parent"], first["score"], first["stage"]) == ("", 0.0, "done")
    assert (second["parent"], second["critique"][:5], second["edited"]) == (first["resources_id"], "add: ", "system")
    # What a candidate has earned, as the rollouts say that ran with it.
    earned = with_store.sql(
        "SELECT p.number, p.score, avg(r.reward) FROM prompts p JOIN rollouts r ON r.resources_id = p.resources_id "
        "WHERE r.mode = 'val' GROUP BY 1, 2"
    ).rows
    assert len(earned) > 3
    assert all(score == pytest.approx(reward) for _, score, reward in earned)
    # The calls of critic and editor are recorded, and make nothing that is trained on.
    told = with_store.sql(
        "SELECT mode, status, turns, JSONExtractInt(input, 'candidate') FROM rollouts WHERE rollout_id = {id:String}",
        {"id": second["rollout_id"]},
    ).rows
    assert told == [("test", "succeeded", 2, 1)]
    triplets = with_store.sql(
        "SELECT count(), countIf(trainable), any(reason) FROM triplets WHERE rollout_id = {id:String}",
        {"id": second["rollout_id"]},
    ).rows
    assert triplets == [(2, 0, "the call was made aside: prompts")]
    current = with_store.sql(
        "SELECT argMax(JSONExtractString(items['system'], 'template'), resources_id) FROM resources"
    ).rows
    assert current == [(found["prompts"]["system"]["template"],)]
    with_store.close()


async def test_the_critic_is_told_what_happened_and_the_editor_what_to_keep(tmp_path: Path) -> None:
    async with writing() as (server, settings):
        await search(settings, tmp_path, beam=Beam(branch_factor=1, rounds=1), editor="critic")
    critique, edit = (body["messages"][-1]["content"] for body in server.requests)
    assert f"<prompt>\n{FIRST}\n</prompt>" in critique
    assert critique.count("Reward: 0") == 4
    assert '"needs": "' in critique
    assert "Placeholders: {question}\n" in edit
    assert "Review:\nadd: " in edit


@pytest.mark.slow
@pytest.mark.parametrize(("reply", "runs"), [(useless, agent), (helpful, blind)])
async def test_controls_do_not_find_it(tmp_path: Path, reply: Any, runs: Any) -> None:
    """A critic that says nothing useful; rewards that have nothing to do with the prompt."""
    async with writing(reply) as (_, settings):
        await search(settings, tmp_path, agent=runs, beam=Beam(beam_width=2, branch_factor=2, rounds=2))
    text = best(tmp_path)["prompts"]["system"]["template"]
    assert sum(rule in text for rule in RULES) < 3


async def test_what_loses_a_placeholder_is_refused_before_a_rollout_is_spent(tmp_path: Path) -> None:
    async with writing(lambda messages: "<prompt>no names</prompt>") as (_, settings):
        summary = await search(settings, tmp_path, beam=Beam(branch_factor=3, rounds=1))
    assert summary.steps[0].metrics["refused"] == 3
    assert summary.rollouts == 8 + 3 * 4  # the first one's validation, and the parents' minibatches
    found = store(tmp_path)
    assert found.sql("SELECT DISTINCT refused FROM prompts WHERE number > 0").rows == [("it lost {question}",)]
    found.close()
    assert best(tmp_path)["candidate"] == 0


def test_a_budget_counts_tokens_or_money() -> None:
    spent = Spent(calls=3, prompt_tokens=2_000_000, answer_tokens=500_000)
    assert spent.over(Budget()) == ""
    assert spent.over(Budget(tokens=2_500_001)) == ""
    assert spent.over(Budget(tokens=2_500_000)) == "the budget of 2,500,000 tokens is used up: 2,500,000 in 3 calls"
    prices = {"prompt_price": 1.0, "answer_price": 4.0}
    assert spent.over(Budget(money=4.1, **prices)) == ""
    assert spent.over(Budget(money=4.0, **prices)) == "the budget of 4 is used up: 4 for 2,500,000 tokens"


@pytest.mark.slow
async def test_a_budget_ends_it_with_the_best_so_far(tmp_path: Path) -> None:
    async with writing() as (server, settings):
        summary = await search(settings, tmp_path, budget=Budget(tokens=100))
        assert len(server.requests) * 2 * TOKENS <= 100 + 2 * TOKENS * 4  # what was under way
        assert len(summary.steps) < BEAM.rounds
        assert best(tmp_path)["score"] == summary.validation_reward
        more = await search(settings, tmp_path)  # without one it goes on
        assert len(more.steps) == BEAM.rounds


async def test_a_critic_that_fails_costs_its_candidate_alone(tmp_path: Path) -> None:
    async with writing() as (server, settings):
        server.refuse = 1
        summary = await search(settings, tmp_path, beam=Beam(branch_factor=3, rounds=1))
    assert summary.steps[0].metrics["refused"] == 1
    found = store(tmp_path)
    (why,) = found.sql("SELECT refused FROM prompts WHERE refused != ''").rows
    found.close()
    assert "model 'critic' refused the call: 400" in why[0]


class Killed(Exception):
    pass


def dying_after(saves: int) -> Any:
    """A trainer that dies once it has written so many checkpoints."""
    save, left = ms.Run.checkpoint, iter(range(saves - 1))

    async def checkpoint(self: ms.Run, *args: Any, **given: Any) -> None:
        await save(self, *args, **given)
        if next(left, None) is None:
            raise Killed

    return checkpoint


@pytest.mark.slow
async def test_interrupted_anywhere_the_same_candidates_come_out(tmp_path: Path) -> None:
    def candidates(run_dir: Path) -> list[Any]:
        found = store(run_dir)
        columns = "number, round, templates, critique, refused, parent_score, batch_score, score"
        rows = found.sql(f"SELECT {columns} FROM prompts ORDER BY number").rows
        found.close()
        return list(rows)

    async with writing() as (_, settings):
        await search(settings, tmp_path / "whole")
        for saves in (3, 9, 16):
            run_dir = tmp_path / f"killed-{saves}"
            with pytest.MonkeyPatch.context() as patch:
                patch.setattr(ms.Run, "checkpoint", dying_after(saves))
                with pytest.raises(Killed):
                    await search(settings, run_dir)
            await search(settings, run_dir)
            assert candidates(run_dir) == candidates(tmp_path / "whole")


@pytest.mark.slow
async def test_a_run_that_goes_on_with_something_else_is_refused(tmp_path: Path) -> None:
    async with writing() as (_, settings):
        small = Beam(branch_factor=1, rounds=1)
        await search(settings, tmp_path, beam=small)
        with pytest.raises(ConfigError, match="made with another prompt"):
            await search(settings, tmp_path, beam=small, prompts={"system": ms.PromptTemplate(template="{question}")})
        with pytest.raises(ConfigError, match="made with other options of the search"):
            await search(settings, tmp_path, beam=Beam(branch_factor=2, rounds=1))


@pytest.mark.parametrize(
    ("given", "why"),
    [
        ({"prompts": {}}, "there is no prompt to begin with"),
        ({"val_tasks": []}, "candidates are compared on validation tasks"),
        ({"prompts": {"system": ms.PromptTemplate(template="{")}}, "prompts.system is no f-string template"),
        ({"settings": ms.load_settings()}, "called through a proxy"),
    ],
)
async def test_what_it_needs_is_asked_for(tmp_path: Path, given: Any, why: str) -> None:
    async with writing() as (_, settings):
        with pytest.raises(ConfigError, match=why):
            await search(given.pop("settings", settings), tmp_path, **given)
