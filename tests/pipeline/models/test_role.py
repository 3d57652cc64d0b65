"""The role that serves a model: what it does with commands, with a server that only notes what it loads."""

import asyncio
import json
from contextlib import asynccontextmanager
from types import SimpleNamespace

import pytest

from millstream.consumers.log.memory_log import MemoryLog
from millstream.pipeline.models.commands import answered, read_models
from millstream.pipeline.models.role import ModelRole
from millstream.pipeline.models.server import UpdateFailed
from millstream.pipeline.models.weight_files import Weights
from millstream.producers.control import publish_control
from millstream.schemas.control import ModelCommand
from millstream.schemas.ids import new_id
from millstream.schemas.wire.records import Control
from millstream.schemas.wire.topics import Topics

TOPICS = Topics("t", partitions=1)


class Server:
    """A `VllmServer` without a vLLM."""

    def __init__(self, folder):
        self.base = Weights("run.0.0", folder / "base")
        self.version = ""
        self.adapters = {}
        self.replicas = [SimpleNamespace(process=SimpleNamespace(url="http://a"), alive=True, restarts=0)]
        self.loaded = []

    def weights(self, folder, version, *, lora=False):
        return Weights(version, folder)

    async def start(self, whole, adapters):
        self.version, self.adapters = (whole or self.base).version, dict(adapters)

    async def deploy(self, folder, version, *, lora=False):
        if folder.name == "broken":
            raise UpdateFailed(f"{version} did not go live")
        self.loaded.append(version)
        if lora:
            self.adapters[f"policy@{version}"] = Weights(version, folder)
        else:
            self.version = version

    async def remove_adapter(self, name):
        del self.adapters[name]

    async def close(self):
        pass


@asynccontextmanager
async def serving(log, server):
    stop = asyncio.Event()
    role = asyncio.create_task(ModelRole(log, TOPICS, server, "policy", "vllm", report_s=0.01).run(stop))
    try:
        async with asyncio.timeout(10):
            while not server.version or "vllm" not in (await read_models(log, TOPICS)).servers:  # noqa: ASYNC110 - no event
                await asyncio.sleep(0.01)
        yield
    finally:
        stop.set()
        await role


async def ask(log, action, **fields):
    command = ModelCommand(command_id=new_id(), action=action, model="policy", **fields)
    return await answered(log, TOPICS, command, 10.0)


async def shares(log):
    control = await read_models(log, TOPICS)
    return {arm.version: arm.weight for arm in control.follower.routing.models["policy"]}


async def test_versions_are_deployed_rolled_back_and_split(tmp_path):
    log, server = MemoryLog(TOPICS), Server(tmp_path)
    async with serving(log, server):
        assert await shares(log) == {"run.0.0": 1.0}
        assert (await ask(log, "deploy", version="run.0.1", folder=str(tmp_path / "1"))).error == ""
        assert (server.loaded, await shares(log)) == (["run.0.1"], {"run.0.0": 0.0, "run.0.1": 1.0})
        for number in (2, 3):
            await ask(log, "deploy", version=f"run.0.{number}", folder=str(tmp_path / str(number)), lora=True)
        assert (await ask(log, "split", shares={"run.0.2": 1, "run.0.3": 3})).error == ""
        assert await shares(log) == {"run.0.0": 0.0, "run.0.1": 0.0, "run.0.2": 1, "run.0.3": 3}
        assert list((await read_models(log, TOPICS)).servers["vllm"].adapters) == ["policy@run.0.2", "policy@run.0.3"]
        assert (await ask(log, "rollback", version="run.0.0")).error == ""
        assert (server.version, (await shares(log))["run.0.0"]) == ("run.0.0", 1.0)


async def test_a_command_that_fails_is_answered_and_changes_nothing(tmp_path):
    log, server = MemoryLog(TOPICS), Server(tmp_path)
    async with serving(log, server):
        answer = await ask(log, "deploy", version="run.0.1", folder=str(tmp_path / "broken"))
        assert answer.error == "run.0.1 did not go live"
        assert "no version before" in (await ask(log, "rollback")).error
        answer = await ask(log, "deploy", version="run.0.0", folder=str(tmp_path / "other"))
        assert "give these weights another version" in answer.error
        assert (server.loaded, await shares(log)) == ([], {"run.0.0": 1.0})


@pytest.mark.parametrize(
    "fields",
    [
        {"action": "split", "shares": {"run.0.0": "0.5"}},
        {"action": "split", "shares": None},
        {"action": "rollback", "version": 3},
        {"action": "deploy", "version": "run.0.1", "folder": "\0"},
        {"action": "deploy", "version": "run.0.1", "lora": "no"},
    ],
    ids=str,
)
async def test_a_command_of_wrong_types_is_answered_and_ends_no_role(tmp_path, fields):
    """A6: neither now nor at the next start."""
    log, command_id = MemoryLog(TOPICS), new_id()
    body = json.dumps({"command_id": command_id, "model": "policy"} | fields)
    async with serving(log, Server(tmp_path)):
        await publish_control(
            log.producer(), TOPICS, Control(kind="model-command", name=command_id, body=body, created_at=1)
        )
        assert (await ask(log, "rollback", version="run.0.0")).error == ""  # after it
    async with serving(log, Server(tmp_path)):
        found = (await read_models(log, TOPICS)).answers[command_id]
        assert found.error


async def test_a_successor_serves_what_the_role_served_and_answers_no_command_again(tmp_path):
    log, first, second = MemoryLog(TOPICS), Server(tmp_path), Server(tmp_path)
    async with serving(log, first):
        await ask(log, "deploy", version="run.0.1", folder=str(tmp_path / "1"))
        await ask(log, "deploy", version="run.0.2", folder=str(tmp_path / "2"), lora=True)
    async with serving(log, second):
        assert (second.version, list(second.adapters), second.loaded) == ("run.0.0", ["policy@run.0.2"], [])
        await ask(log, "rollback")
        assert (second.version, await shares(log)) == ("run.0.1", {"run.0.0": 0.0, "run.0.1": 1.0, "run.0.2": 0.0})
