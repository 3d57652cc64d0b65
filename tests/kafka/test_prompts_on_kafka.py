"""A search over prompts on a real Kafka: two runners, a trainer that dies, and the way back by a command."""

import asyncio
import json
from collections.abc import Callable
from pathlib import Path

import pytest
from typer.testing import CliRunner

import millstream as ms
from millstream.consumers.control import ControlFollower
from millstream.consumers.log.kafka_log import KafkaLog
from millstream.consumers.runner.runner import Runner
from millstream.pipeline.cli.main import app
from millstream.pipeline.prompts.apo import Apo
from millstream.pipeline.prompts.search import Beam
from millstream.pipeline.prompts.versions import FILE
from millstream.pipeline.training.report import Summary
from millstream.schemas.config.settings import Settings
from tests.pipeline.prompts.rig import FIRST, TASKS, VAL_TASKS, agent, writing
from tests.pipeline.prompts.test_apo import Killed, dying_after

BEAM = Beam(beam_width=2, branch_factor=2, rounds=2, batch=4, validation_batch=8)


@pytest.mark.kafka
@pytest.mark.slow
async def test_a_search_over_kafka_goes_on_with_what_had_been_asked_for(
    kafka_settings: Callable[..., Settings], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    async with writing() as (_, local):
        dsn = f"chdb://{tmp_path}/store"
        settings = kafka_settings(upstreams=local.upstreams, routes=local.routes, clickhouse_dsn=dsn)
        prompts = {"system": ms.PromptTemplate(template=FIRST)}

        async def search() -> Summary:
            trainer = ms.Trainer(
                algorithm=Apo(critic="critic", beam=BEAM),
                agent=agent,
                prompts=prompts,
                strategy="kafka",
                run_dir=tmp_path / "run",
                settings=settings,
            )
            return await trainer.train(TASKS, VAL_TASKS)

        log, stop = KafkaLog(settings), asyncio.Event()
        await log.create_topics()
        second = Runner(log, settings.model_copy(update={"proxy_url": ""}), agent, processes=0, drain_s=0.0)
        running = asyncio.create_task(second.run(stop))
        with pytest.MonkeyPatch.context() as patch:
            patch.setattr(ms.Run, "checkpoint", dying_after(4))
            with pytest.raises(Killed):
                await search()
        summary = await search()
        stop.set()
        await running
    assert [step.step for step in summary.steps] == [0, 1]
    assert summary.validation_reward is not None
    assert summary.validation_reward > 0.0

    store = ms.ClickHouseStore(settings)
    ends = store.sql("SELECT status, count(), uniqExact(rollout_id) FROM rollouts GROUP BY status").rows
    workers = store.sql("SELECT uniqExact(worker_id) FROM attempts WHERE worker_id LIKE '%' AND attempt = 1").rows
    store.close()
    assert all(rows == different for _, rows, different in ends)
    assert workers[0][0] >= 2

    for name in ("kafka_bootstrap_servers", "topic_prefix", "kafka_partitions", "clickhouse_dsn"):
        monkeypatch.setenv(f"MILLSTREAM_{name.upper()}", str(getattr(settings, name)))

    async def command(*arguments: str) -> None:
        done = await asyncio.to_thread(CliRunner().invoke, app, ["prompts", *arguments])
        assert done.exit_code == 0, done.output

    async def drawn() -> set[str | None]:
        await control.wait_until_current()
        return {control.version_for(summary.experiment_id, str(number)) for number in range(50)}

    best = json.loads((tmp_path / "run" / FILE).read_text())["candidate"]
    assert best != 0
    control = ControlFollower(KafkaLog(settings), settings.topics)
    await control.start()
    assert len(await drawn()) == 1
    await command("split", summary.experiment_id, "0=0.5", f"{best}=0.5")
    assert len(await drawn()) == 2
    await command("rollback", summary.experiment_id, "--to", "0")
    assert len(await drawn()) == 1
    current = control.latest(summary.experiment_id)
    await control.close()
    assert current is not None
    assert current.items == prompts
