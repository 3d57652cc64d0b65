# ruff: noqa: E402 — torch comes with the `train` extra
import asyncio
import math
import threading
import time
from collections import Counter
from collections.abc import AsyncIterator, Callable
from itertools import pairwise
from pathlib import Path
from typing import Any

import pytest

torch = pytest.importorskip("torch")

from examples.calculator import model
from millstream.pipeline.models.engine import Completion, Engine, EngineClosed
from millstream.pipeline.models.policy import copy_weights, left_pad, load_model, load_tokenizer, one_thread, parameters
from millstream.schemas.errors import ConfigError

pytestmark = pytest.mark.torch

SHORT = [{"role": "user", "content": "8 plus 3 ?"}]
LONG = [{"role": "user", "content": "take 3 from 8 then times 2 ?"}, {"role": "assistant", "content": "add"}] * 3


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    one_thread()  # else the models here fight over the cores
    path = tmp_path_factory.mktemp("model") / "calculator"
    model.create(path, seed=1)
    return path


@pytest.fixture
async def engine(folder: Path) -> AsyncIterator[Engine]:
    engine = Engine(folder, version="run.0.0", seed=7)
    yield engine
    await engine.close()


def ask(messages: Any = SHORT, **fields: Any) -> dict[str, Any]:
    return {"model": "calculator", "messages": messages, "max_tokens": 1, **fields}


EXACT = {"logprobs": True, "return_token_ids": True}


async def body(engine: Engine, **fields: Any) -> dict[str, Any]:
    answer = await engine.chat(ask(**fields))
    assert answer.status == 200, answer.body
    return answer.body


async def test_an_answer_in_vllms_form(engine: Engine, folder: Path) -> None:
    answer = await engine.chat(ask(max_tokens=3, request_id="abc", **EXACT))
    tokenizer = load_tokenizer(folder)
    choice = answer.body["choices"][0]
    assert (answer.status, answer.model_version) == (200, "run.0.0")
    assert (answer.body["id"], answer.body["object"], answer.body["model"]) == (
        "chatcmpl-abc",
        "chat.completion",
        "calculator",
    )
    assert tokenizer.decode(answer.body["prompt_token_ids"]) == (
        "<|im_start|> user 8 plus 3 ? <|im_end|> <|im_start|> assistant"
    )
    words = [token["token"] for token in choice["logprobs"]["content"]]
    assert words == tokenizer.convert_ids_to_tokens(choice["token_ids"])
    assert choice["message"] == {"role": "assistant", "content": " ".join(words)}
    assert choice["finish_reason"] == "length"
    assert answer.body["usage"] == {"prompt_tokens": 9, "completion_tokens": 3, "total_tokens": 12}


async def test_ids_and_logprobs_come_only_when_asked_for(engine: Engine) -> None:
    answer = await body(engine)
    assert "prompt_token_ids" not in answer
    assert "token_ids" not in answer["choices"][0]
    assert answer["choices"][0]["logprobs"] is None


async def test_batching_changes_no_answer(engine: Engine, folder: Path) -> None:
    """Greedy answers, together and alone, against the plain model without padding or cache."""
    requests = [ask(SHORT, temperature=0, max_tokens=4, **EXACT), ask(LONG, temperature=0, max_tokens=6, **EXACT)] * 5
    together = await asyncio.gather(*(engine.chat(request) for request in requests))
    alone = [await engine.chat(request) for request in requests[:2]]
    reference = load_model(folder)
    for i, answer in enumerate(together):
        choice = answer.body["choices"][0]
        assert choice["token_ids"] == alone[i % 2].body["choices"][0]["token_ids"]
        ids = list(answer.body["prompt_token_ids"])
        for token, entry in zip(choice["token_ids"], choice["logprobs"]["content"], strict=True):
            with torch.no_grad():
                logprobs = torch.log_softmax(reference(torch.tensor([ids])).logits[0, -1], -1)
            assert token == int(logprobs.argmax())
            assert entry["logprob"] == pytest.approx(float(logprobs[token]), abs=1e-4)
            ids.append(token)


async def test_sampling_follows_the_softmax_at_its_temperature(engine: Engine, folder: Path) -> None:
    """Chi-squared over the words, pooled to those that are expected five times or more."""
    count = 1500
    answers = await asyncio.gather(*(body(engine, temperature=0.5, **EXACT) for _ in range(count)))
    drawn = Counter(answer["choices"][0]["token_ids"][0] for answer in answers)
    with torch.no_grad():
        logits = load_model(folder)(torch.tensor([answers[0]["prompt_token_ids"]])).logits[0, -1]
    expected = torch.softmax(logits / 0.5, -1) * count
    common = [i for i, value in enumerate(expected.tolist()) if value >= 5]
    rest = count - sum(float(expected[i]) for i in common)
    statistic = sum((drawn[i] - float(expected[i])) ** 2 / float(expected[i]) for i in common)
    statistic += (count - sum(drawn[i] for i in common) - rest) ** 2 / rest
    assert len(common) > 20
    assert statistic < len(common) + 5 * math.sqrt(2 * len(common))  # five deviations
    token = answers[0]["choices"][0]["logprobs"]["content"][0]["logprob"]
    assert token == pytest.approx(
        float(torch.log_softmax(logits, -1)[answers[0]["choices"][0]["token_ids"][0]]), abs=1e-4
    )  # the model's own, not the temperature's


async def test_a_seed_repeats_an_answer_in_any_batch(engine: Engine) -> None:
    alone = await body(engine, seed=5, max_tokens=8, **EXACT)
    company = [body(engine, messages=LONG) for _ in range(6)]
    again, *_ = await asyncio.gather(body(engine, seed=5, max_tokens=8, **EXACT), *company)
    other = await body(engine, seed=6, max_tokens=8, **EXACT)
    assert again["choices"][0]["token_ids"] == alone["choices"][0]["token_ids"]
    assert other["choices"][0]["token_ids"] != alone["choices"][0]["token_ids"]


@pytest.mark.parametrize("max_tokens", [1, 8])
async def test_deterministic_answers_are_the_same_bit_by_bit_whatever_else_is_asked(
    folder: Path, max_tokens: int
) -> None:
    """Also those that another engine gives, and after other requests without a seed."""
    engine, other = (Engine(folder, version="v1", seed=seed, deterministic=True) for seed in (1, 2))
    exact = {"seed": 5, "max_tokens": max_tokens, "request_id": "r", **EXACT}
    alone = await body(other, **exact)
    company = [body(engine, messages=(SHORT, LONG)[n % 2], max_tokens=1 + n % 3) for n in range(64)]
    *_, among_others = await asyncio.gather(*company, body(engine, **exact))
    assert among_others | {"created": 0} == alone | {"created": 0}
    assert (engine.version, other.version) == ("v1", "v1")
    for each in (engine, other):
        await each.close()


async def test_a_stop_text_ends_the_answer(engine: Engine) -> None:
    words = (await body(engine, seed=5, max_tokens=8))["choices"][0]["message"]["content"].split()
    at = next(n for n in range(1, len(words)) if not any(words[n] in earlier for earlier in words[:n]))
    choice = (await body(engine, seed=5, max_tokens=8, stop=[words[at]]))["choices"][0]
    assert choice["message"]["content"].split() == words[:at]
    assert choice["finish_reason"] == "stop"


async def test_the_end_token_ends_the_answer(folder: Path, engine: Engine) -> None:
    weights = {name: tensor.clone() for name, tensor in parameters(load_model(folder)).items()}
    weights["model.norm.weight"].zero_()  # every logit 0: the end is drawn once in 130 tokens
    engine.load(weights, "flat")
    choices = [(await body(engine, max_tokens=400, seed=i, **EXACT))["choices"][0] for i in range(3)]
    ended = [choice for choice in choices if choice["finish_reason"] == "stop"]
    assert ended
    for choice in ended:
        assert choice["logprobs"]["content"][-1]["token"] == model.END
        assert model.END not in choice["message"]["content"]


async def test_text_parts_and_nulls_are_understood(engine: Engine) -> None:
    parts = [{"role": "user", "content": [{"type": "text", "text": "8 plus"}, {"type": "text", "text": " 3 ?"}]}]
    plain = await body(engine, **EXACT)
    given = await body(engine, messages=parts, **EXACT, stop=None, n=1)
    assert given["prompt_token_ids"] == plain["prompt_token_ids"]


@pytest.mark.parametrize(
    ("fields", "param"),
    [
        ({"n": 2}, "n"),
        ({"stream": True}, "stream"),
        ({"tools": [{"type": "function"}]}, "tools"),
        ({"top_p": 0.9}, "top_p"),
        ({"response_format": {"type": "json_object"}}, "response_format"),
        ({"guided_regex": "a+"}, "guided_regex"),
        ({"temperature": -1}, "temperature"),
        ({"temperature": math.nan}, "temperature"),
        ({"max_tokens": 0}, "max_tokens"),
        ({"max_tokens": 1.5}, "max_tokens"),
        ({"seed": True}, "seed"),
        ({"stop": [""]}, "stop"),
        ({"stop": 3}, "stop"),
        ({"messages": []}, "messages"),
        ({"messages": None}, "messages"),
        ({"messages": ["hello"]}, "messages"),
        ({"messages": [{"role": "user", "content": [{"type": "image_url"}]}]}, "messages"),
        ({"messages": [{"role": "assistant", "content": "", "tool_calls": [{}]}]}, "messages"),
        ({"messages": [{"role": "user", "content": "add " * 600}]}, "messages"),
        ({"max_tokens": 510}, "messages"),
    ],
)
async def test_unsupported_fields_are_named(engine: Engine, fields: dict[str, Any], param: str) -> None:
    answer = await engine.chat({**ask(), **fields})
    assert answer.status == 400
    assert answer.body["error"]["type"] == "invalid_request_error"
    assert answer.body["error"]["param"] == param


class Interrupted(Engine):
    """Calls ``on_token`` with the tokens of an answer so far, in the thread that samples, between two passes."""

    on_token: Callable[[list[int]], None] = staticmethod(lambda _: None)

    def _append(self, job: Any, *token: Any) -> None:
        super()._append(job, *token)
        self.on_token(job.tokens)


@pytest.fixture(scope="module")
def versions(folder: Path) -> dict[str, dict[str, torch.Tensor]]:
    """Three sets of weights that say different things."""
    weights = parameters(load_model(folder))
    return {f"v{i}": {name: tensor * (1 + i / 2) for name, tensor in weights.items()} for i in range(3)}


def recomputed(folder: Path, weights: dict[str, torch.Tensor], body: dict[str, Any]) -> list[float]:
    """The log-probability of each token of an answer, all by the same weights."""
    model = load_model(folder).eval()
    copy_weights(model, weights)
    prompt, made = body["prompt_token_ids"], body["choices"][0]["token_ids"]
    with torch.inference_mode():
        logits = model(**left_pad([prompt + made])).logits[0, len(prompt) - 1 : -1]
    found: list[float] = torch.log_softmax(logits.float(), -1).gather(1, torch.tensor(made)[:, None])[:, 0].tolist()
    return found


def check(folder: Path, versions: dict[str, dict[str, torch.Tensor]], answer: Completion) -> None:
    """Each token's log-probability is the one that the named version gives it."""
    said = [token["logprob"] for token in answer.body["choices"][0]["logprobs"]["content"]]
    ends = [first for first, _ in answer.versions[1:]] + [len(said)]
    for (first, version), end in zip(answer.versions, ends, strict=True):
        assert said[first:end] == pytest.approx(recomputed(folder, versions[version], answer.body)[first:end], abs=1e-3)


async def test_weights_that_change_within_an_answer_make_the_tokens_that_they_are_named_for(
    folder: Path, versions: dict[str, dict[str, torch.Tensor]]
) -> None:
    engine = Interrupted(folder, version="v0", seed=7)

    def load(tokens: list[int]) -> None:
        if len(tokens) in (3, 4):
            number = len(tokens) - 2
            engine.load(versions[f"v{number}"], f"v{number}")

    engine.on_token = load
    answer = await engine.chat(ask(max_tokens=8, temperature=0, **EXACT))
    assert (answer.model_version, answer.versions) == ("mixed", ((0, "v0"), (3, "v1"), (4, "v2")))
    check(folder, versions, answer)
    others = [recomputed(folder, versions[version], answer.body) for version in versions]
    assert all(abs(a - b) > 1e-2 for a, b in pairwise(each[5] for each in others))  # else nothing was compared
    engine.on_token = lambda _: None
    after = await engine.chat(ask(max_tokens=2, **EXACT))
    assert (after.model_version, after.versions) == ("v2", ((0, "v2"),))
    await engine.close()


async def test_answers_of_one_batch_are_continued_with_new_weights_from_where_they_are(
    folder: Path, versions: dict[str, dict[str, torch.Tensor]]
) -> None:
    """Prompts of different lengths; one answer is over when the weights change, and names the first version alone."""
    engine = Interrupted(folder, version="v0", seed=7)
    taken, gate = threading.Event(), threading.Event()

    def block(_: list[int]) -> None:
        taken.set()
        gate.wait(60)

    engine.on_token = block
    blocking = asyncio.create_task(engine.chat(ask()))
    assert await asyncio.to_thread(taken.wait, 60)  # else the others could be of its batch
    asked = [ask(messages, max_tokens=limit, **EXACT) for messages, limit in ((SHORT, 6), (LONG, 6), (SHORT, 2))]
    tasks = [asyncio.create_task(engine.chat(request)) for request in asked]
    await asyncio.sleep(0)  # let them be queued

    def load(tokens: list[int]) -> None:
        if len(tokens) == 4 and engine.version == "v0":  # of the first row: the second has still its fourth to come
            engine.load(versions["v1"], "v1")

    engine.on_token = load
    gate.set()
    await blocking
    answers = await asyncio.gather(*tasks)
    assert [answer.versions for answer in answers] == [((0, "v0"), (4, "v1"))] * 2 + [((0, "v0"),)]
    for answer in answers:
        check(folder, versions, answer)
    await engine.close()


async def test_a_deterministic_answer_is_made_by_one_version_whatever_waits(
    folder: Path, versions: dict[str, dict[str, torch.Tensor]]
) -> None:
    engine = Interrupted(folder, version="v0", deterministic=True)
    loading = threading.Thread(target=engine.load, args=(versions["v1"], "v1"))

    def load(tokens: list[int]) -> None:
        if len(tokens) == 2:
            loading.start()
            while not engine._turn.locked():  # until it waits for the weights
                time.sleep(0.001)

    engine.on_token = load
    first = await engine.chat(ask(max_tokens=6, seed=1, **EXACT))
    await asyncio.to_thread(loading.join)
    second = await engine.chat(ask(max_tokens=1, seed=1, **EXACT))
    assert (first.versions, second.versions) == (((0, "v0"),), ((0, "v1"),))
    check(folder, versions, first)
    await engine.close()


async def test_every_token_is_of_the_version_it_is_named_for_under_load(
    folder: Path, engine: Engine, versions: dict[str, dict[str, torch.Tensor]]
) -> None:
    """A load waits for one token at most, however many answers are asked for."""
    await engine.update(versions["v0"], "v0")
    asked = [asyncio.create_task(engine.chat(ask(max_tokens=5, **EXACT))) for _ in range(200)]
    for i in range(1, 20):
        await engine.update(versions[f"v{i % 3}"], f"v{i % 3}")
    answers = await asyncio.gather(*asked)
    for answer in answers[::10]:
        check(folder, versions, answer)


async def test_weights_that_do_not_fit_change_nothing(folder: Path, engine: Engine) -> None:
    before = await body(engine, temperature=0, **EXACT)
    good = {name: tensor * 2 for name, tensor in parameters(load_model(folder)).items()}
    cut = {name: tensor for name, tensor in good.items() if "norm" not in name}
    wide = good | {"model.norm.weight": torch.zeros(3)}
    for weights in (cut, wide, good | {"extra": torch.zeros(1)}):
        with pytest.raises(ConfigError, match=r"norm|extra"):
            engine.load(weights, "bad")
    assert engine.version == "run.0.0"
    after = await body(engine, temperature=0, **EXACT)
    assert after["choices"] == before["choices"]


async def test_requests_are_answered_before_it_closes(folder: Path) -> None:
    engine = Engine(folder, max_batch=2)
    asked = [asyncio.create_task(engine.chat(ask())) for _ in range(9)]
    await asyncio.sleep(0)  # let them be queued
    await engine.close()
    assert {answer.status for answer in await asyncio.gather(*asked)} == {200}
    with pytest.raises(EngineClosed):
        await engine.chat(ask())
    await engine.close()


async def test_a_caller_that_leaves_does_not_harm_others(engine: Engine) -> None:
    leaving = [asyncio.create_task(engine.chat(ask(LONG, max_tokens=50))) for _ in range(5)]
    await asyncio.sleep(0)
    for task in leaving:
        task.cancel()
    assert (await body(engine))["choices"]


async def test_a_failing_batch_reaches_its_callers_only(engine: Engine, monkeypatch: pytest.MonkeyPatch) -> None:
    with monkeypatch.context() as patch:
        patch.setattr(engine, "_sample", lambda *_: 1 / 0)
        with pytest.raises(ZeroDivisionError):
            await engine.chat(ask())
    assert (await body(engine))["choices"]


def test_a_folder_without_a_model_or_template_is_named(folder: Path, tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match=str(tmp_path)):
        Engine(tmp_path)
    for file in folder.iterdir():
        if file.name != "chat_template.jinja":
            (tmp_path / file.name).write_bytes(file.read_bytes())
    with pytest.raises(ConfigError, match="chat template"):
        Engine(tmp_path)


def test_left_padding_ends_flush() -> None:
    padded = left_pad([[5], [6, 7, 8]])
    assert padded["input_ids"].tolist() == [[0, 0, 5], [6, 7, 8]]
    assert padded["attention_mask"].tolist() == [[0, 0, 1], [1, 1, 1]]
    assert padded["position_ids"].tolist() == [[0, 0, 0], [0, 1, 2]]
