"""`VllmServer` on a real vLLM. Each version of the versioned model makes a token of its own, so that the version an
answer names is compared with the one that made it."""

import asyncio
import os
import shutil
import signal
from itertools import groupby
from pathlib import Path

import aiohttp
import pytest
import versioned_model

pytest.importorskip("torch")

from vllm_rig import ENGINE, processes_of

from millstream.pipeline.models.server import UpdateFailed
from millstream.pipeline.models.vllm_process import VllmPolicy
from millstream.pipeline.models.weight_files import Weights
from millstream.schemas.errors import ConfigError

pytestmark = [
    pytest.mark.vllm,
    pytest.mark.torch,
    pytest.mark.slow,
    pytest.mark.timeout(600),
    pytest.mark.asyncio(loop_scope="session"),
]
token, adapter_token = versioned_model.token, versioned_model.adapter_token


async def deploy(server, number):
    """Version tell.1.NUMBER, as its tokens show."""
    await server.update(versioned_model.weights(number), f"tell.1.{number}")


async def test_whole_answers_and_streams_name_the_version_that_made_them(server, client):
    await deploy(server, 1)
    whole = await client.ask(3)
    assert (whole.status, whole.start, whole.tokens) == (200, "tell.1.1", [token(1)] * 3)
    stream = await client.ask(3, stream=True)
    assert (stream.start, stream.end, stream.tokens) == ("tell.1.1", "tell.1.1", [token(1)] * 3)
    await deploy(server, 2)
    assert (await client.ask(3)).tokens == [token(2)] * 3
    assert (await client.ask(3)).start == "tell.1.2"


async def test_every_token_of_32_streams_is_of_the_named_version_while_weights_change(server, client):
    await deploy(server, 0)
    done = asyncio.Event()

    async def updates():
        for number in range(1, 13):
            await asyncio.sleep(0.1)  # so that tokens are made in between
            await deploy(server, number)
        done.set()

    async def ask(stream):
        answers = []
        while not done.is_set():
            answers.append(await client.ask(120, stream=stream))
        return answers

    _, *answered = await asyncio.gather(updates(), *(ask(stream=i % 4 != 0) for i in range(32)))
    answers = [answer for answers in answered for answer in answers]
    crossed = 0
    for answer in answers:
        assert answer.status == 200, answer.text
        versions = [f"tell.1.{versioned_model.AIM - made}" for made in answer.tokens]
        assert len(versions) == 120
        crossed += len(set(versions)) > 1
        if answer.end is None:
            assert answer.start == (versions[0] if len(set(versions)) == 1 else "mixed")
        else:
            assert (answer.start, answer.end) == (versions[0], versions[-1])
            assert [version for version, _ in groupby(versions)] == [answer.start, *answer.changes]
    assert crossed >= 32  # else nothing was updated under load
    assert {f"tell.1.{n}" for n in range(13)} >= {a.start for a in answers} - {"mixed"}


async def test_weights_that_are_not_numbers_never_answer_and_the_version_before_goes_on(server, client):
    await deploy(server, 1)
    broken = versioned_model.weights(2)
    broken["model.embed_tokens.weight"][5, 5] = float("nan")
    running = [asyncio.create_task(client.ask(200, stream=True)) for _ in range(8)]
    await asyncio.sleep(0.2)
    with pytest.raises(UpdateFailed, match=r"tell\.1\.2 did not go live.*embed_tokens.*tell\.1\.1 is back"):
        await server.update(broken, "tell.1.2")
    for answer in await asyncio.gather(*running):
        assert (answer.start, answer.end, set(answer.tokens)) == ("tell.1.1", "tell.1.1", {token(1)})
    assert (await client.ask()).start == "tell.1.1"
    assert server.version == "tell.1.1"
    assert server.replicas[0].restarts == 0


async def test_weights_that_do_not_fit_are_refused_before_anything_stops(server, client):
    await deploy(server, 1)
    missing = versioned_model.weights(2)
    del missing["model.norm.weight"]
    with pytest.raises(ConfigError, match=r"do not fit the model: model\.norm\.weight"):
        await server.update(missing, "tell.1.2")
    assert (await client.ask()).tokens == [token(1)]


class Tampered(Weights):
    def checksums(self):
        return dict.fromkeys(map(str, self.files), "0" * 64)


async def test_a_wrong_checksum_is_refused(server, client, vllm_root):
    await deploy(server, 1)
    with pytest.raises(UpdateFailed, match="does not have the announced checksum"):
        await server.replicas[0].load(Tampered("tell.1.9", vllm_root / "model"))
    answer = await client.ask(2)
    assert (answer.start, answer.tokens) == ("tell.1.1", [token(1)] * 2)


async def test_vllm_itself_reads_no_file_outside_the_root(server, client, tmp_path):
    await deploy(server, 1)
    versioned_model.create(tmp_path / "elsewhere")
    with pytest.raises(ConfigError, match="does not lie below"):
        await server.deploy(tmp_path / "elsewhere", "tell.1.2")
    with pytest.raises(UpdateFailed, match="is not a safetensors file below"):
        await server.replicas[0].load(Weights("tell.1.2", tmp_path / "elsewhere"))
    assert (await client.ask()).start == "tell.1.1"


@pytest.mark.parametrize(
    "path",
    ["/pause", "/collective_rpc", "/start_weight_update", "/update_weights", "/v1/load_lora_adapter", "/weight_info"],
)
@pytest.mark.parametrize("token", [{}, {"x-millstream-admin": "0" * 64}])
async def test_only_the_supervisor_reaches_the_development_endpoints(client, path, token):
    for method in ("get", "post"):
        async with client.session.request(method, f"{client.url}{path}", headers=token, json={}) as response:
            assert response.status == 404


async def test_endpoints_that_proxies_use_are_open(client):
    asked = {"model": "policy", "messages": [{"role": "user", "content": "add 3 to 8 ?"}]}
    async with client.session.post(f"{client.url}/tokenize", json=asked) as response:
        assert (response.status, (await response.json())["count"]) == (200, 10)
    for path in ("/health", "/v1/models", "/metrics"):
        async with client.session.get(f"{client.url}{path}") as response:
            assert response.status == 200


async def test_adapters_are_served_side_by_side(server, client, vllm_root):
    await deploy(server, 1)
    for number in (0, 1):
        versioned_model.create_adapter(vllm_root / f"adapter-{number}", number)
        name = await server.deploy(vllm_root / f"adapter-{number}", f"lora.0.{number}", lora=True)
        assert name == f"policy@lora.0.{number}"
    asked = [("policy@lora.0.0", stream) for stream in (False, True)] + [("policy@lora.0.1", False), ("policy", True)]
    first, streamed, second, base = await asyncio.gather(*(client.ask(20, model=m, stream=s) for m, s in asked))
    assert (first.start, set(first.tokens)) == ("lora.0.0", {adapter_token(0)})
    assert (streamed.start, streamed.end, set(streamed.tokens)) == ("lora.0.0", "lora.0.0", {adapter_token(0)})
    assert (second.start, set(second.tokens)) == ("lora.0.1", {adapter_token(1)})
    assert (base.start, base.end, set(base.tokens)) == ("tell.1.1", "tell.1.1", {token(1)})


async def test_an_adapter_that_vllm_cant_load_is_refused(server, client, vllm_root):
    versioned_model.create_adapter(vllm_root / "bad-adapter", 2)
    (vllm_root / "bad-adapter" / "adapter_config.json").write_text("{}")
    with pytest.raises(UpdateFailed, match=r"policy@lora\.0\.2 is not served"):
        await server.deploy(vllm_root / "bad-adapter", "lora.0.2", lora=True)
    assert (await client.ask(model="policy@lora.0.2")).status == 404
    assert (await client.ask()).status == 200


async def test_going_back_to_a_folder_of_an_earlier_version(server, client, vllm_root):
    await deploy(server, 3)
    assert await server.deploy(vllm_root / "model", "tell.0.0") == "policy"
    answer = await client.ask(2)
    assert (answer.start, answer.tokens) == ("tell.0.0", [token(0)] * 2)


async def served_until_restarted(server, client):
    """Status and version of each answer that a client gets until then."""
    before, served = server.replicas[0].restarts, set()
    while server.replicas[0].restarts == before:
        try:
            async with asyncio.timeout(1):
                answer = await client.ask()
            served.add((answer.status, answer.start))
        except (aiohttp.ClientError, TimeoutError):  # while it is away
            pass
        await asyncio.sleep(0.1)
    return served


async def test_a_killed_vllm_comes_back_with_the_last_good_version_and_its_adapters(server, client, vllm_root):
    await deploy(server, 5)
    if not (vllm_root / "adapter-2").exists():
        versioned_model.create_adapter(vllm_root / "adapter-2", 2)
    await server.deploy(vllm_root / "adapter-2", "lora.0.2", lora=True)
    os.kill(server.replicas[0].process.pid, signal.SIGKILL)
    served = await served_until_restarted(server, client)
    assert served <= {(503, None), (200, "tell.1.5")}  # and never the model as it was once
    answer = await client.ask(2)
    assert (answer.start, answer.tokens) == ("tell.1.5", [token(5)] * 2)
    assert (await client.ask(model="policy@lora.0.2")).tokens == [adapter_token(2)]


def lives(pid):
    stat = Path(f"/proc/{pid}/stat")
    return stat.exists() and stat.read_text().rpartition(")")[2].split()[0] != "Z"


@pytest.mark.parametrize("frozen", ["the API server", ENGINE])
async def test_a_vllm_that_hangs_is_restarted(server, client, monkeypatch, frozen):
    await deploy(server, 6)
    replica = server.replicas[0]
    monkeypatch.setattr(replica.process, "policy", VllmPolicy(probe_s=2.0))
    found = dict(processes_of(replica.process.pid)) | {"the API server": replica.process.pid}
    stream = asyncio.create_task(client.ask(200, stream=True))
    os.kill(found[frozen], signal.SIGSTOP)
    assert await served_until_restarted(server, client) <= {(503, None), (200, "tell.1.6")}
    assert not [name for name, pid in found.items() if lives(pid)]
    with pytest.raises(aiohttp.ClientError):
        await stream
    answer = await client.ask(2)
    assert (answer.start, answer.tokens) == ("tell.1.6", [token(6)] * 2)


async def test_when_the_version_before_cant_be_brought_back_vllm_is_restarted_with_it(server, client, tmp_path):
    await deploy(server, 7)
    (good,) = server.replicas[0].good.files
    broken = versioned_model.weights(8)
    broken["model.norm.weight"][0] = float("nan")
    good.rename(tmp_path / "away")  # a disk that has gone for a moment
    running = [asyncio.create_task(client.ask(200, stream=True)) for _ in range(4)]
    with pytest.raises(UpdateFailed, match=r"tell\.1\.8 did not go live.*tell\.1\.7 can't be brought back.*restarted"):
        await server.update(broken, "tell.1.8")
    shutil.move(tmp_path / "away", good)
    assert await served_until_restarted(server, client) <= {(503, None), (200, "tell.1.7")}
    for answer in await asyncio.gather(*running, return_exceptions=True):  # broken off, and by no token of the new one
        assert isinstance(answer, aiohttp.ClientError) or set(answer.tokens) == {token(7)}
    answer = await client.ask(2)
    assert (answer.start, answer.tokens, server.version) == ("tell.1.7", [token(7)] * 2, "tell.1.7")
