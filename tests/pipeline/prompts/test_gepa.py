"""The package's search over a run."""

import json
import os
import pickle
import re
from pathlib import Path
from typing import Any

import pytest

pytest.importorskip("gepa", reason="pip install 'millstream[prompts]'")

import millstream as ms
from millstream.pipeline.prompts.gepa import Gepa
from millstream.pipeline.prompts.versions import FILE
from millstream.pipeline.prompts.writers import Budget
from millstream.schemas.config.settings import Settings
from millstream.schemas.errors import ConfigError
from tests.pipeline.prompts.rig import FIRST, RULES, TASKS, VAL_TASKS, agent, blind, writing

PROMPTS = {"system": ms.PromptTemplate(template=FIRST)}


def reflecting(messages: list[dict[str, str]]) -> str:
    said = messages[-1]["content"]
    (now, *_) = re.findall(r"```\n(.*?)\n```", said, re.DOTALL)
    missing = [rule for rule in RULES if re.search(rf'"needs": ?"{rule}"[^\n]*\nReward: 0', said)]
    rule = missing[0] if missing else "be kind"
    return f"Some lack a rule: {rule}.\n```\n{now} {rule}.\n```\nThat is all."


async def search(settings: Settings, run_dir: Path, most: int = 100, runs: Any = agent, **given: Any) -> list[Any]:
    algorithm = Gepa(critic="critic", max_rollouts=most, **given)
    trainer = ms.Trainer(algorithm=algorithm, agent=runs, prompts=PROMPTS, run_dir=run_dir, settings=settings)
    await trainer.train(TASKS, VAL_TASKS)
    store = ms.ClickHouseStore(ms.load_settings(clickhouse_dsn=f"chdb://{run_dir}/store"))
    rows = store.sql("SELECT number, templates, refused, score FROM prompts ORDER BY number").rows
    store.close()
    return list(rows)


def reflections(run_dir: Path) -> list[Any]:
    """Of each candidate: what it answers, and what the rollout that its reflection was recorded as says."""
    store = ms.ClickHouseStore(ms.load_settings(clickhouse_dsn=f"chdb://{run_dir}/store"))
    rows = store.sql(
        "SELECT p.number, p.parent, p.edited, p.critique, p.templates, r.output FROM prompts AS p "
        "LEFT JOIN rollouts AS r ON r.rollout_id = p.rollout_id ORDER BY p.number"
    ).rows
    store.close()
    return list(rows)


def best(run_dir: Path) -> str:
    return str(json.loads((run_dir / FILE).read_text())["prompts"]["system"]["template"])


@pytest.mark.slow
async def test_it_finds_the_prompt_and_goes_on_where_it_stopped(tmp_path: Path) -> None:
    async with writing(reflecting) as (_, settings):
        whole = await search(settings, tmp_path / "whole")
        assert all(rule in best(tmp_path / "whole") for rule in RULES)
        critiques = [critique for *_, critique, _, _ in reflections(tmp_path / "whole")[1:]]
        assert all(critique.startswith("Some lack a rule: ") for critique in critiques)
        await search(settings, tmp_path / "parts", most=25)
        assert best(tmp_path / "parts") != best(tmp_path / "whole")
        assert await search(settings, tmp_path / "parts") == whole


@pytest.mark.slow
async def test_a_control_does_not_find_it_and_what_lost_a_placeholder_is_not_run(tmp_path: Path) -> None:
    async with writing(lambda messages: "```\nBe helpful.\n```") as (_, settings):
        rows = await search(settings, tmp_path, most=60)
    assert {row[2] for row in rows[1:]} == {"it lost {question}"}
    assert best(tmp_path) == FIRST
    async with writing(reflecting) as (_, settings):
        await search(settings, tmp_path / "blind", most=60, runs=blind)
    assert sum(rule in best(tmp_path / "blind") for rule in RULES) < 3


async def test_a_budget_ends_it(tmp_path: Path) -> None:
    async with writing(reflecting) as (server, settings):
        await search(settings, tmp_path, budget=Budget(tokens=40))
        assert len(server.requests) == 2
    first, *others = reflections(tmp_path)
    assert first[1:4] == ("", "", "")
    assert others
    for _, parent, edited, critique, templates, recorded in others:
        assert parent
        assert edited == "system"
        rule = critique.removeprefix("Some lack a rule: ").removesuffix(".\n\nThat is all.")
        assert f"{rule}." in json.loads(templates)["system"]["template"]
        assert critique.partition("\n")[0] in json.loads(recorded)[0]
    assert (tmp_path / FILE).exists()


class Touching:
    """A pickle of it runs a command when it is loaded."""

    def __init__(self, file: Path) -> None:
        self.file = file

    def __reduce__(self) -> tuple[Any, ...]:
        return os.system, (f"touch {self.file}",)


async def test_a_state_that_would_run_code_is_not_loaded(tmp_path: Path) -> None:
    state = tmp_path / "run" / "gepa" / "gepa_state.bin"
    state.parent.mkdir(parents=True)
    state.write_bytes(pickle.dumps({"program_candidates": [Touching(tmp_path / "touched")]}))
    async with writing(reflecting) as (server, settings):
        with pytest.raises(ConfigError, match=r"gepa_state\.bin is no state of a search.*it names posix\.system"):
            await search(settings, tmp_path / "run", most=10)
    assert not (tmp_path / "touched").exists()
    assert server.requests == []
    pickle.loads(state.read_bytes())  # the control
    assert (tmp_path / "touched").exists()
