"""A trainer with two replicas of a real vLLM: each step's weights reach both, one after the other."""

import asyncio
import os
import signal
import struct
from contextlib import asynccontextmanager

import pytest
import versioned_model

pytest.importorskip("torch")

import aiohttp
import openai
from vllm_rig import ARGS, ENGINE, Client, processes_of

from millstream.pipeline.algorithms.policy_gradient import PolicyGradient
from millstream.pipeline.models.vllm_process import VllmOptions
from millstream.pipeline.training.deployment import in_memory
from millstream.pipeline.training.trainer import Trainer

pytestmark = [pytest.mark.vllm, pytest.mark.torch, pytest.mark.slow, pytest.mark.timeout(600)]
TOKENS = 3


class Counting:
    """Learns nothing; the tokens of each version show its number."""

    def __init__(self, model):
        self.model = model
        self.version = 0
        self.made = []  # of each step: versions, and tokens
        self.at_version = {}  # what happens before that one goes to the servers

    def update(self, groups):
        triplets = [triplet for group in groups for member in group.members for triplet in member.triplets]
        tokens = [struct.unpack(f"<{TOKENS}i", triplet.response_token_ids) for triplet in triplets]
        self.made.append(({triplet.model_version for triplet in triplets}, set(sum(tokens, ())), len(triplets)))
        self.version += 1
        self.at_version.get(self.version, lambda: None)()
        return {}

    def weights(self):
        return versioned_model.weights(self.version)

    def state(self):
        return {"weights": self.weights()}


def agent(task):
    message = {"role": "user", "content": "add 3 to 8 ?"}
    openai.OpenAI().chat.completions.create(model="policy", messages=[message], max_tokens=TOKENS)
    return 1.0


async def update_while_one_is_frozen(server):
    """The other one goes on answering by the version before."""
    first, second = server.replicas
    engine = dict(processes_of(first.process.pid))[ENGINE]
    async with aiohttp.ClientSession() as session:
        clients = [Client(session, replica.process.url) for replica in (first, second)]
        os.kill(engine, signal.SIGSTOP)
        updating = asyncio.create_task(server.update(versioned_model.weights(9), "tell.0.9"))
        answers = [await clients[1].ask(2) for _ in range(20)]
        assert not updating.done()
        os.kill(engine, signal.SIGCONT)
        await updating
        assert {(a.start, *a.tokens) for a in answers} == {
            ("base.0.0", versioned_model.token(0), versioned_model.token(0))
        }
        answers = [await client.ask(2) for client in clients]
        assert [(a.start, *a.tokens) for a in answers] == [
            ("tell.0.9", versioned_model.token(9), versioned_model.token(9))
        ] * 2


def with_two_replicas(algorithm):
    @asynccontextmanager
    async def running(setup):
        async with in_memory(setup) as (log, server):
            await update_while_one_is_frozen(server)
            algorithm.at_version[2] = lambda: os.killpg(server.replicas[0].process.pid, signal.SIGKILL)
            yield log, server
            assert server.replicas[0].restarts == 1

    return running


async def test_both_get_each_steps_weights_one_at_a_time_and_a_killed_one_is_waited_for(
    vllm_root, vllm_settings, monkeypatch
):
    monkeypatch.setenv("VLLM_CPU_OMP_THREADS_BIND", "nobind")
    monkeypatch.setenv("OPENAI_BASE_URL", "")  # what the runner sets is undone after the test
    monkeypatch.setenv("OPENAI_API_KEY", "")
    algorithm, run_dir = Counting(vllm_root / "model"), vllm_root / "trained"
    options = VllmOptions(args=(*ARGS, "--tokenizer", str(vllm_root / "tokenizer")), replicas=2)
    trainer = Trainer(
        algorithm=PolicyGradient(algorithm, groups_per_step=2, group_size=8),
        agent=agent,
        strategy=with_two_replicas(algorithm),
        run_dir=run_dir,
        max_steps=3,
        settings=vllm_settings,
        vllm=options,
    )
    summary = await trainer.train(["any"] * 4)
    assert [report.failed for report in summary.steps] == [0, 0, 0]
    assert algorithm.made == [({f"run.0.{n}"}, {versioned_model.token(n)}, 16) for n in range(3)]
    for replica in range(2):
        log = (run_dir / "vllm" / "log" / f"vllm-{replica}.log").read_text()
        assert log.count('"POST /v1/chat/completions HTTP/1.1" 200') > 5, f"replica {replica} has had nothing to do"
