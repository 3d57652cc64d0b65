"""``millstream model`` as people use it: processes, over a real Kafka, on a real vLLM."""

import asyncio
import json
import os
import sys

import aiohttp
import pytest
import versioned_model

pytest.importorskip("torch")

from vllm_rig import ARGS, PYTHON, Client

from millstream.consumers.log.kafka_log import KafkaLog
from millstream.pipeline.addresses import free_port
from millstream.pipeline.models.weight_files import save

pytestmark = [pytest.mark.vllm, pytest.mark.kafka, pytest.mark.torch, pytest.mark.slow, pytest.mark.timeout(900)]


class Deployment:
    """A serving role of two replicas, and the command line beside it."""

    def __init__(self, settings, root):
        self.root = root
        self.port = free_port()
        self.role = None
        self.environment = {k: v for k, v in os.environ.items() if not k.startswith("MILLSTREAM_")} | {
            "MILLSTREAM_KAFKA_BOOTSTRAP_SERVERS": settings.kafka_bootstrap_servers,
            "MILLSTREAM_TOPIC_PREFIX": settings.topic_prefix,
            "MILLSTREAM_KAFKA_PARTITIONS": str(settings.kafka_partitions),
            "MILLSTREAM_WEIGHTS_ROOT": str(root),
            "MILLSTREAM_VLLM_PYTHON": str(PYTHON),
            "VLLM_CPU_OMP_THREADS_BIND": "nobind",
        }

    async def start(self):
        switches = [f"--arg={arg}" for arg in (*ARGS, "--tokenizer", str(self.root / "tokenizer"))]
        options = ["--version", "tell.0.0", "--replicas", "2", "--adapters", "2", "--port", str(self.port)]
        self.role = await self._process("serve", str(self.root / "model"), *options, *switches)

    async def _process(self, *arguments, **options):
        return await asyncio.create_subprocess_exec(
            *(sys.executable, "-m", "millstream.pipeline", "model", *arguments),
            env=self.environment,
            cwd=self.root,
            **options,
        )

    async def run(self, *arguments):
        """Exit code and output of a command."""
        pipe = asyncio.subprocess.PIPE
        process = await self._process(*arguments, stdout=pipe, stderr=asyncio.subprocess.STDOUT)
        output, _ = await process.communicate()
        return process.returncode, " ".join(output.decode().split())

    async def shares(self):
        """Of each version, and at how many replicas it is loaded."""
        code, output = await self.run("status", "--json")
        assert code == 0, output
        return {row["version"]: (row["share"], row["loaded_at"]) for row in json.loads(output)}

    async def wait_until(self, shares):
        while await self.shares() != shares:
            assert self.role.returncode is None
            await asyncio.sleep(0.5)


@pytest.fixture
async def deployment(kafka_settings, vllm_root):
    settings = kafka_settings()
    await KafkaLog(settings).create_topics()
    deployment = Deployment(settings, vllm_root)
    await deployment.start()
    yield deployment
    if deployment.role.returncode is None:
        deployment.role.terminate()
        await deployment.role.wait()


async def test_versions_are_deployed_split_rolled_back_and_survive_the_role(deployment, tmp_path):
    root = deployment.root
    await deployment.wait_until({"tell.0.0": (1.0, "2 of 2")})
    whole = save(root / "saved", versioned_model.weights(2), "tell.0.2").folder
    broken_weights = versioned_model.weights(3)
    broken_weights["model.norm.weight"][0] = float("inf")
    broken = save(root / "saved", broken_weights, "tell.0.3").folder
    versioned_model.create_adapter(root / "commanded", 0)

    assert (await deployment.run("deploy", "policy", str(root / "commanded"), "--version", "l.0.1", "--lora"))[0] == 0
    both = {"tell.0.0": (0.0, "2 of 2"), "l.0.1": (1.0, "2 of 2")}
    assert await deployment.shares() == both
    assert (await deployment.run("split", "policy", "tell.0.0=0.75", "l.0.1=0.25"))[0] == 0
    split = {"tell.0.0": (0.75, "2 of 2"), "l.0.1": (0.25, "2 of 2")}
    assert await deployment.shares() == split

    for arguments, why in (
        (["deploy", "policy", str(broken), "--version", "tell.0.3"], "holds values that are not numbers"),
        (["deploy", "policy", str(tmp_path), "--version", "tell.0.4"], "does not lie below"),
        (["deploy", "policy", str(whole), "--version", "7"], "run.epoch.step"),
        (["split", "policy", "tell.0.0=0.5", "tell.0.9=0.5"], "no version tell.0.9; kept are"),
        (["rollback", "policy", "--to", "tell.0.9"], "no version tell.0.9"),
        (["deploy", "other", str(whole), "--version", "tell.0.2"], "no server serves other; served are: policy"),
    ):
        code, output = await deployment.run(*arguments)
        assert (code, why in output) == (1, True), output
    assert await deployment.shares() == split

    async with aiohttp.ClientSession() as session:
        replicas = [Client(session, f"http://127.0.0.1:{deployment.port + i}") for i in range(2)]
        deployed = asyncio.create_task(deployment.run("deploy", "policy", str(whole), "--version", "tell.0.2"))
        answers = []
        while not deployed.done():  # without a failed call
            answers += await asyncio.gather(*(replica.ask(20) for replica in replicas))
        assert (await deployed)[0] == 0
        assert {answer.status for answer in answers} == {200}
        for replica in replicas:
            answer = await replica.ask(2)
            assert (answer.start, answer.tokens) == ("tell.0.2", [versioned_model.token(2)] * 2)
        code, output = await deployment.run("split", "policy", "tell.0.0=1", "tell.0.2=1")
        assert (code, "a server has one at a time" in output) == (1, True)

        assert (await deployment.run("rollback", "policy", "--to", "tell.0.0"))[0] == 0
        assert [(await replica.ask()).tokens for replica in replicas] == [[versioned_model.token(0)]] * 2
        assert (await deployment.run("rollback", "policy", "--to", "tell.0.2"))[0] == 0

    live = {"tell.0.0": (0.0, ""), "l.0.1": (0.0, "2 of 2"), "tell.0.2": (1.0, "2 of 2")}
    assert await deployment.shares() == live
    deployment.role.kill()
    await deployment.role.wait()
    await deployment.start()
    await deployment.wait_until(live | {"l.0.1": (0.0, "")})  # an unused version is loaded when it is deployed again
    async with aiohttp.ClientSession() as session:
        answer = await Client(session, f"http://127.0.0.1:{deployment.port}").ask()
        assert (answer.start, answer.tokens) == ("tell.0.2", [versioned_model.token(2)])
