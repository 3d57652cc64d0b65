"""From the seed of a task each model call of its attempts gets one, so that another attempt gets the same answers."""

import asyncio
import json
import re

import aiohttp
import openai
import pytest
from policy_server import Fault
from proxy_rig import SECRET, rig_of

from millstream.schemas.attempt_keys import attempt_key, attempt_path
from millstream.schemas.ids import derived_seed, new_id

SAY = [{"role": "user", "content": "say one two three"}]
ASKED = {"model": "policy", "messages": SAY}
SEED = -7
FIRST, SECOND, THIRD = (derived_seed(SEED, number) for number in (1, 2, 3))


def seeded(rig, seed=SEED):
    """The rig's attempt, of a task with that seed."""
    key = attempt_key(SECRET, rig.rollout, rig.attempt, valid_s=60.0, seed=seed)
    rig.client = rig.client.with_options(api_key=key)
    rig.claude = rig.claude.with_options(api_key=key)
    return rig


async def collected(stream):
    return [chunk async for chunk in stream]


async def chat(rig, **more):
    await rig.client.chat.completions.create(**ASKED, **more)


async def chat_stream(rig, **more):
    await collected(await rig.client.chat.completions.create(**ASKED, stream=True, **more))


async def completions(rig, **more):
    await rig.client.completions.create(model="policy", prompt="say one", **more)


async def completions_stream(rig, **more):
    await collected(await rig.client.completions.create(model="policy", prompt="say one", stream=True, **more))


async def responses(rig):
    await rig.client.responses.create(model="policy", input=SAY)


async def responses_stream(rig):
    await collected(await rig.client.responses.create(model="policy", input=SAY, stream=True))


async def messages(rig):
    await rig.claude.messages.create(model="policy", max_tokens=9, messages=SAY)


async def messages_stream(rig):
    await collected(await rig.claude.messages.create(model="policy", max_tokens=9, messages=SAY, stream=True))


OPENAI = (chat, chat_stream, completions, completions_stream)


@pytest.mark.parametrize("ask", [*OPENAI, responses, responses_stream, messages, messages_stream])
async def test_each_call_of_an_attempt_has_a_seed_of_its_own(rig, ask):
    seeded(rig)
    for _ in range(2):
        await ask(rig)
    assert [request["seed"] for request in rig.model.requests] == [FIRST, SECOND]
    assert [span.attributes["gen_ai.request.seed"] for span in await rig.spans()] == [str(FIRST), str(SECOND)]
    assert 0 <= FIRST < 2**63


@pytest.mark.parametrize("ask", OPENAI)
async def test_a_clients_own_seed_stays_and_takes_none(rig, ask):
    seeded(rig)
    await ask(rig, seed=0)
    await ask(rig, extra_body={"seed": None})
    assert [request["seed"] for request in rig.model.requests] == [0, FIRST]
    assert (await rig.spans())[0].attributes["gen_ai.request.seed"] == "0"


@pytest.mark.parametrize(
    ("seed", "sent"), [(None, None), (0, derived_seed(0, 1)), (2**63 - 1, derived_seed(2**63 - 1, 1))]
)
async def test_without_a_seed_none_is_sent(rig, seed, sent):
    await chat(seeded(rig, seed))
    assert rig.model.requests[0].get("seed") == sent


@pytest.mark.parametrize("kind", ["openai", "anthropic"])
async def test_other_servers_get_none_since_some_refuse_it(kind):
    external = {"upstreams": {"other": {"urls": ["{url}"], "kind": kind}}, "routes": {"*": "other"}}
    async with rig_of(**external) as rig:
        await chat(seeded(rig))
        assert "seed" not in rig.model.requests[0]
        assert "gen_ai.request.seed" not in (await rig.span()).attributes


async def test_embeddings_need_no_seed(rig):
    await seeded(rig).client.embeddings.create(model="policy", input="x", encoding_format="float")
    await chat(rig)
    assert [request.get("seed") for request in rig.model.requests] == [None, FIRST]


async def test_every_replica_gets_the_same_seed():
    async with rig_of(models=3) as rig:
        for model in rig.models:
            model.faults.append(Fault(503))
        await chat(seeded(rig))
        asked = [[request["seed"] for request in model.requests] for model in rig.models]
    assert sum(map(bool, asked)) > 1
    assert {seed for seeds in asked for seed in seeds} == {FIRST}


async def test_a_continued_stream_has_another_seed_as_with_one_of_the_clients(rig):
    rig.model.faults.append(Fault(break_after=2))
    await chat_stream(seeded(rig), max_tokens=9)
    await chat(rig)
    assert [request["seed"] for request in rig.model.requests] == [FIRST, FIRST + 2, SECOND]


@pytest.mark.parametrize(
    ("ask", "fault"), [(chat, Fault(400)), (chat_stream, Fault(400)), (chat_stream, Fault(break_after=2))]
)
async def test_a_call_that_fails_leaves_its_seed_to_the_one_that_repeats_it(rig, ask, fault):
    seeded(rig)
    await ask(rig)
    rig.model.faults.append(fault)
    with pytest.raises(openai.APIError):
        await ask(rig, presence_penalty=1.0)  # a stream with it can't be continued
    for _ in range(2):
        await ask(rig)
    assert [request["seed"] for request in rig.model.requests] == [FIRST, SECOND, SECOND, THIRD]


async def test_calls_at_the_same_time_are_numbered_in_the_order_in_which_they_arrive(rig):
    seeded(rig)
    rig.model.gate.clear()
    calls = []
    for number in range(3):
        rig.model.asked.clear()
        calls.append(asyncio.create_task(chat(rig, max_tokens=10 + number)))
        await rig.model.asked.wait()
    calls[1].cancel()
    await rig.model.gone.wait()
    rig.model.gate.set()
    await calls[0]
    await calls[2]
    await chat(rig)
    seeds = {request.get("max_tokens"): request["seed"] for request in rig.model.requests}
    assert seeds == {10: FIRST, 11: SECOND, 12: THIRD, None: SECOND}


@pytest.mark.parametrize("stream", [False, True])
@pytest.mark.parametrize("path", ["/v1/chat/completions", "/v1/completions", "/v1/messages", "/v1/responses"])
async def test_the_client_gets_the_same_bytes_with_a_seed(path, stream):
    prompt = {"/v1/completions": {"prompt": "say one two"}, "/v1/responses": {"input": SAY}}.get(
        path, {"messages": SAY}
    )
    answers = []
    for seed in (None, SEED):
        async with rig_of() as rig, aiohttp.ClientSession() as session:
            key = attempt_key(SECRET, rig.rollout, rig.attempt, valid_s=60.0, seed=seed)
            asked = {"model": "policy", "max_tokens": 9, "stream": stream, **prompt}
            headers = {"Authorization": f"Bearer {key}"}
            async with session.post(rig.base + path, json=asked, headers=headers) as response:
                body = await response.read()
                kept = {n: v for n, v in response.headers.items() if n not in ("Date", "Content-Length")}
            answers.append((response.status, kept, body if path.endswith("completions") else _without_ids(body)))
    assert answers[0] == answers[1]


def _without_ids(body):
    """Translated answers have ids of their own, and times."""
    return re.sub(rb'"(id|item_id|created_at)": ?("[^"]*"|[0-9.]+)', b"", body)


async def test_another_attempt_gets_the_same_answers_turn_by_turn(tmp_path):
    """On the demo engine, among other rollouts, with the same bits of log-probabilities."""
    pytest.importorskip("torch")
    from aiohttp.test_utils import TestServer

    from examples.calculator import model
    from millstream.pipeline.models.engine import Engine
    from millstream.pipeline.models.engine_http import engine_app

    model.create(tmp_path / "calculator", seed=1)
    engine = Engine(tmp_path / "calculator", seed=3, deterministic=True)
    async with TestServer(engine_app(engine)) as server:
        async with rig_of(upstreams={"model": {"urls": [str(server.make_url("")).rstrip("/")]}}) as rig:

            async def conversation(rollout, seed):
                attempt, said = new_id(), [{"role": "user", "content": "8 plus 3 ?"}]
                key = attempt_key(SECRET, rollout, attempt, valid_s=60.0, seed=seed)
                base = rig.url + attempt_path(rollout, attempt) + "/v1"
                for _ in range(2):
                    answer = await rig.client.with_options(api_key=key, base_url=base).chat.completions.create(
                        model="calculator", messages=said, max_tokens=4
                    )
                    said += [{"role": "assistant", "content": answer.choices[0].message.content}, said[0]]
                spans = [span for span in await rig.spans() if span.attempt_id == attempt]
                return said, [(s.response_token_ids, s.response_logprobs, s.prompt_token_ids) for s in spans]

            first = await conversation(rig.rollout, SEED)
            others = [conversation(new_id(), seed) for seed in range(2)]
            second, *different = await asyncio.gather(conversation(rig.rollout, SEED), *others)
            unseeded = [await conversation(rig.rollout, None) for _ in range(2)]
        assert len(first[1]) == 2
        assert second == first
        assert first[0] not in [said for said, _ in different]
        assert len({json.dumps(said) for said, _ in [first, *different]}) == 3
        assert unseeded[0] != unseeded[1]
    await engine.close()
