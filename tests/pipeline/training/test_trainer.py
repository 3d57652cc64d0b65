"""The trainer in one process: what it publishes, waits for, learns from, keeps, and says when something is wrong."""

import asyncio
import json
from contextlib import asynccontextmanager

import openai
import pytest
from policy_server import PolicyServer

import millstream as ms
from millstream.consumers.adapter.adapter import Adapter
from millstream.consumers.log.memory_log import MemoryLog
from millstream.consumers.runner.runner import Runner
from millstream.pipeline.algorithms.policy_gradient import PolicyGradient
from millstream.pipeline.proxy import Proxy
from millstream.pipeline.services.serve_aiohttp import serve
from millstream.pipeline.training.deployment import ANY_PORT
from millstream.pipeline.training.report import mean_reward
from millstream.pipeline.training.trainer import Trainer
from millstream.schemas.config.settings import load_settings
from millstream.schemas.errors import ConfigError

TASKS = [{"number": n} for n in range(10)]


def agent(task, rollout, resources):
    if task["number"] == 3:
        raise ValueError("three is too many")
    ms.emit_reward(task["number"] / 10)
    return f"{rollout.mode} {sorted(resources)}"


@pytest.mark.parametrize(
    ("tasks", "val_tasks", "says"),
    [
        ([{"q": 1}, {"q": object()}], [], "task 1.q is a builtins.object"),
        ([1], [{"a": [print]}], "val_task 0.a[0] is a"),
    ],
)
def test_tasks_that_are_not_json_are_refused_before_anything_starts(tmp_path, tasks, val_tasks, says):
    """Entry D3: the error came after all had started, and named neither task nor field."""
    trainer = Trainer(algorithm=PolicyGradient(object()), agent=agent, run_dir=tmp_path / "run", strategy=None)
    with pytest.raises(ConfigError) as raised:
        trainer.fit(tasks, val_tasks)
    assert says in str(raised.value)
    assert not (tmp_path / "run").exists()


def test_dev_runs_the_agent_through_everything(tmp_path):
    finished = Trainer(agent=agent, run_dir=tmp_path).dev(TASKS)
    assert [f.end.reward for f in finished] == [None if n == 3 else n / 10 for n in range(10)]
    assert [f.end.status for f in finished].count("succeeded") == 9
    assert finished[3].end.reason == "failed: ValueError: three is too many"
    assert mean_reward(finished) == pytest.approx(sum(n for n in range(10) if n != 3) / 90)


async def test_train_can_be_awaited_and_says_what_it_lacks(tmp_path):
    with pytest.raises(ConfigError, match="needs an algorithm"):
        await Trainer(agent=agent, run_dir=tmp_path).train(TASKS)
    with pytest.raises(ConfigError, match="needs tasks"):
        await Trainer(agent=agent, run_dir=tmp_path, algorithm=PolicyGradient(object())).train([])
    with pytest.raises(ConfigError, match=r"needs a loop: PolicyGradient\(object"):
        await Trainer(agent=agent, run_dir=tmp_path, algorithm=object()).train(TASKS)
    with pytest.raises(ConfigError, match="unknown strategy 'rabbit': use one of memory, kafka"):
        Trainer(agent=agent, strategy="rabbit")


def test_an_agent_that_cannot_be_imported_ends_the_run_with_its_name(tmp_path):
    with pytest.raises(ConfigError, match="nowhere:agent"):
        Trainer(agent="nowhere:agent", run_dir=tmp_path).dev(TASKS)


async def test_runners_without_a_proxy_use_those_that_the_trainer_announces(tmp_path, monkeypatch):
    monkeypatch.setenv("OPENAI_BASE_URL", "")  # what the runner sets is undone after the test
    monkeypatch.setenv("OPENAI_API_KEY", "")
    monkeypatch.setenv("MILLSTREAM_PROXY_SECRET", "secret" * 6)
    settings, model = load_settings(), PolicyServer()
    log = MemoryLog(settings.topics)

    def asking(task):
        message = {"role": "user", "content": "say three words more"}
        return float(len(openai.OpenAI().chat.completions.create(model="m", messages=[message]).choices))

    @asynccontextmanager
    async def roles_elsewhere(setup):
        stop = asyncio.Event()
        adapter = Adapter(log, setup.settings.topics, transactional_id="adapter")
        async with asyncio.TaskGroup() as roles:
            roles.create_task(adapter.run(stop))
            roles.create_task(Runner(log, load_settings(), asking, processes=0).run(stop))
            yield log, None
            stop.set()

    async with serve(model.app, ANY_PORT) as url, serve(Proxy(log, load_settings(model_url=url)).app, ANY_PORT) as url:
        trainer = Trainer(strategy=roles_elsewhere, settings=load_settings(proxy_url=url), run_dir=tmp_path)
        finished = await trainer._dev(TASKS[:2])
    assert [(f.end.status, f.end.reward, f.end.turns) for f in finished] == [("succeeded", 1.0, 1)] * 2
    assert [len(f.triplets) for f in finished] == [1, 1]


@pytest.mark.torch
class TestLearning:
    """With an algorithm that learns nothing but keeps what it was given."""

    @pytest.fixture
    def algorithm(self):
        import torch

        class Recorder:
            model = None

            def __init__(self):
                self.steps = []

            def update(self, groups):
                self.steps.append(groups)
                return {"steps": float(len(self.steps))}

            def weights(self):
                return {}

            def state(self):
                return {"weights": {"w": torch.tensor([float(len(self.steps))])}}

            def load_state(self, state):
                raise NotImplementedError

        return PolicyGradient(Recorder(), groups_per_step=3, group_size=4)

    def test_each_step_learns_from_whole_groups_and_leaves_a_checkpoint(self, tmp_path, algorithm):
        from millstream.pipeline.training.checkpoint import load_latest

        reports = []
        trainer = Trainer(algorithm=algorithm, agent=agent, run_dir=tmp_path, max_steps=3, on_step=reports.append)
        summary = trainer.fit(TASKS, TASKS[:2])
        assert [len(groups) for groups in algorithm.learner.steps] == [3, 3, 3]
        for groups in algorithm.learner.steps:
            for group in groups:
                assert len(group.members) == 4
                assert {m.end.group_id for m in group.members} == {group.group_id}
        assert [r.model_version for r in reports] == ["run.0.0", "run.0.1", "run.0.2"]
        assert summary.validation_reward == pytest.approx(0.05)
        assert summary.rollouts == 3 * 12 + 2
        saved = load_latest(tmp_path / "checkpoints")
        assert saved.step == 3
        assert saved.algorithm_state["weights"]["w"].item() == 3.0
        assert saved.extra["model_version"] == "run.0.3"
        assert saved.extra["outstanding"] == []
        assert sum(saved.positions.values()) > 0

    def test_training_stops_when_it_is_good_enough(self, tmp_path, algorithm):
        trainer = Trainer(algorithm=algorithm, agent=agent, run_dir=tmp_path, stop_reward=0.5, patience=2)
        summary = trainer.fit([{"number": 6}])
        assert len(summary.steps) == 2
        assert summary.validation_reward is None

    def test_training_goes_on_while_the_validation_falls_short(self, tmp_path, algorithm):
        options = {"algorithm": algorithm, "agent": agent, "stop_reward": 0.5, "patience": 2, "max_steps": 5}
        summary = Trainer(run_dir=tmp_path / "short", **options).fit([{"number": 6}], [{"number": 1}])
        assert (len(summary.steps), summary.validation_reward) == (5, 0.1)
        summary = Trainer(run_dir=tmp_path / "good", **options).fit([{"number": 6}], [{"number": 8}])
        assert (len(summary.steps), summary.validation_reward) == (2, 0.8)

    def test_the_store_has_everything_when_the_run_is_over(self, tmp_path, algorithm):
        import subprocess
        import sys

        Trainer(algorithm=algorithm, agent=agent, run_dir=tmp_path, max_steps=2).fit(TASKS)
        query = (
            "SELECT count() AS n, countIf(status = 'succeeded') AS ok, countIf(reward IS NOT NULL) AS r FROM rollouts"
        )
        answer = subprocess.run(
            [sys.executable, "-m", "millstream.pipeline", "sql", "--json", query],
            env={"MILLSTREAM_CLICKHOUSE_DSN": f"chdb://{tmp_path / 'store'}", "PATH": ""},
            capture_output=True,
            text=True,
            check=True,
        )
        (row,) = json.loads(answer.stdout)
        assert row["n"] == 24
        assert row["ok"] == row["r"]

    def test_steps_are_records_whose_phases_are_the_time_that_they_took(self, tmp_path, algorithm):
        from millstream.pipeline.store.clickhouse import ClickHouseStore

        summary = Trainer(algorithm=algorithm, agent=agent, run_dir=tmp_path, max_steps=3).fit(TASKS)
        store = ClickHouseStore(load_settings(clickhouse_dsn=f"chdb://{tmp_path / 'store'}"))
        query = "SELECT step, model_version, reward_mean, wait_s + update_s + save_s + publish_s + other_s AS whole, "
        query += "(toUnixTimestamp64Nano(ended_at) - toUnixTimestamp64Nano(started_at)) / 1e9 AS took "
        rows = store.sql(query + "FROM training_steps ORDER BY step").rows
        store.close()
        assert [row[:2] for row in rows] == [(n, f"run.0.{n}") for n in (1, 2, 3)]
        assert [row[2] for row in rows] == pytest.approx([step.reward for step in summary.steps])
        assert [row[3] for row in rows] == pytest.approx([row[4] for row in rows], rel=0.01)
        assert all(0 < step.idle_share < 1 for step in summary.steps)


def test_ctrl_c_ends_a_run_gracefully(tmp_path):
    """What asyncio.run does at Ctrl-C: it cancels the main task."""

    started = asyncio.Event()
    ended = []

    async def slow(task):
        started.set()
        try:
            await asyncio.sleep(600)
        except asyncio.CancelledError:
            ended.append(task["number"])
            raise

    async def interrupted():
        running = asyncio.create_task(Trainer(agent=slow, run_dir=tmp_path)._dev(TASKS))
        await started.wait()
        running.cancel()
        done, _ = await asyncio.wait([running], timeout=30)
        return bool(done) and running.cancelled()

    assert asyncio.run(interrupted())
    assert ended
