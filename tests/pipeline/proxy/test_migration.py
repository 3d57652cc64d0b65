"""Streams that break: another replica continues them, and the client does not notice."""

import json

import openai
import pytest
from policy_server import LOGPROB, Fault, ids
from proxy_rig import float32, int32, rig_of

from millstream.pipeline.protocols.answers import RECENT
from millstream.pipeline.proxy.migration import cut
from millstream.schemas.spans import semconv

SAID = "one two three four five"
SAY = [{"role": "user", "content": f"say {SAID}"}]
ASKED = {"model": "policy", "messages": SAY, "stream": True}
IMAGE = {"type": "image_url", "image_url": {"url": "data:image/png;base64,iVBORw0KGgo="}}


async def chunks_of(rig, **more):
    return [chunk async for chunk in await rig.client.chat.completions.create(**ASKED | more)]


async def chat(rig, **more):
    return "".join(choice.delta.content or "" for chunk in await chunks_of(rig, **more) for choice in chunk.choices)


async def completions(rig):
    stream = await rig.client.completions.create(model="policy", prompt=f"say {SAID}", stream=True)
    return "".join([choice.text async for chunk in stream for choice in chunk.choices])


async def anthropic(rig):
    async with rig.claude.messages.stream(model="policy", max_tokens=9, messages=SAY) as stream:
        final = await stream.get_final_message()
    assert (final.stop_reason, final.usage.output_tokens) == ("end_turn", 5)
    assert final.usage.input_tokens == len(ids("user say one two three four five"))
    return final.content[0].text


async def responses(rig):
    async with rig.client.responses.stream(model="policy", input=SAY) as stream:
        final = await stream.get_final_response()
    assert (final.status, final.usage.output_tokens) == ("completed", 5)
    return final.output_text


@pytest.mark.parametrize("ask", [chat, completions, anthropic, responses])
@pytest.mark.parametrize("fault", [Fault(break_after=2), Fault(abort_after=2), Fault(error_after=2)])
async def test_the_remainder_is_asked_for_by_ids_and_the_span_is_that_of_an_unbroken_stream(rig, ask, fault):
    rig.model.faults.append(fault)
    assert await ask(rig) == SAID
    span = await rig.span()
    prompt = ids(f"say {SAID}" if ask is completions else f"user say {SAID}")
    assert rig.model.requests[-1]["prompt"] == prompt + ids("one two")
    assert (span.prompt_token_ids, span.response_token_ids) == (int32(prompt), int32(ids(SAID)))
    assert span.response_logprobs == float32([LOGPROB] * 5)
    assert (span.status, span.model_version, span.attributes[semconv.OUTPUT_TOKENS]) == ("Ok", "run.0.3", "5")
    assert json.loads(span.attributes[semconv.RESPONSE_MESSAGE])["content"] == SAID
    assert json.loads(span.attributes[semconv.FINISH_REASONS]) == ["stop"]
    assert (span.attributes[semconv.CONTINUED], semconv.UNTRAINABLE in span.attributes) == ("1", False)


async def test_another_replica_is_asked_and_the_first_again_if_that_one_breaks_too():
    async with rig_of(models=2) as rig:
        for model in rig.models:
            model.faults.append(Fault(break_after=2))
        assert await chat(rig, max_tokens=9) == SAID
        assert sorted(len(model.requests) for model in rig.models) == [1, 2]
        span = await rig.span()
    assert (span.response_token_ids, span.attributes[semconv.CONTINUED]) == (int32(ids(SAID)), "2")


@pytest.mark.parametrize("text", [False, True])
async def test_every_chunk_is_as_it_would_have_been(rig, text):
    """In all its fields."""
    asked = {"model": "policy", "stream": True, "extra_body": {"return_token_ids": True}}
    asked |= {"stream_options": {"include_usage": True}, "logprobs": 1 if text else True}

    async def dumped():
        if text:
            stream = await rig.client.completions.create(**asked, prompt=f"say {SAID}")
        else:
            stream = await rig.client.chat.completions.create(**asked, messages=SAY, max_tokens=9)
        chunks = [chunk.model_dump() async for chunk in stream]
        assert len({chunk.pop("id") for chunk in chunks}) == 1
        return chunks

    unbroken = await dumped()
    rig.model.faults.extend([Fault(break_after=2), Fault(503), Fault(break_after=1)])
    broken = await dumped()
    assert broken == unbroken
    assert (await rig.spans())[1].attributes[semconv.CONTINUED] == "2"


async def test_the_versions_of_both_parts_are_recorded(rig):
    for version, said in (("run.0.3", "run.0.3"), ("run.0.4", "mixed")):
        rig.model.token_gate.clear()
        rig.model.faults.append(Fault(break_after=2))
        stream = await rig.client.chat.completions.create(**ASKED)
        await anext(stream)
        await anext(stream)  # "one" is there
        begun, rig.model.version = rig.model.requests[-1], version
        rig.model.token_gate.set()
        assert "".join([chunk.choices[0].delta.content or "" async for chunk in stream]) == " two three four five"
        assert begun is not rig.model.requests[-1]
        span = (await rig.spans())[-1]
        assert span.model_version == said
        ranges = '[[0,"run.0.3"],[1,"run.0.4"]]' if said == "mixed" else None
        assert span.attributes.get(semconv.RESPONSE_VERSIONS) == ranges


async def test_a_stream_that_breaks_after_its_last_token_is_completed(rig):
    usage = {"include_usage": True}
    rig.model.faults.append(Fault(break_after=6))  # behind the finish reason
    *_, last, end = await chunks_of(rig, stream_options=usage)
    assert (last.choices[0].finish_reason, end.usage.completion_tokens) == ("stop", 5)
    rig.model.faults.append(Fault(break_after=3))  # behind as many tokens as were asked for
    *_, last, end = await chunks_of(rig, stream_options=usage, max_tokens=3)
    assert (last.choices[0].finish_reason, end.usage.completion_tokens) == ("length", 3)
    assert len(rig.model.requests) == 2
    first, second = await rig.spans()
    assert (first.status, first.attributes[semconv.OUTPUT_TOKENS]) == ("Ok", "5")
    assert (second.status, second.response_token_ids) == ("Ok", int32(ids("one two three")))


async def test_the_remainder_is_sampled_like_the_beginning(rig):
    sampling = {"temperature": 0.7, "top_p": 0.9, "stop": ["~"], "logit_bias": {"7": 1}, "seed": 11}
    extra = {"top_k": 5, "min_p": 0.1, "min_tokens": 4, "repetition_penalty": 1.1}
    rig.model.faults.append(Fault(break_after=2))
    await chunks_of(rig, **sampling, presence_penalty=0, max_completion_tokens=9, extra_body=extra)
    same = {name: value for name, value in (sampling | extra).items() if name not in ("seed", "min_tokens")}
    rest = rig.model.requests[-1]
    assert same.items() <= rest.items()
    assert (rest["max_tokens"], rest["min_tokens"], rest["seed"]) == (7, 2, 13)  # which gives other random numbers
    assert "messages" not in rest


async def test_without_a_limit_the_remainder_may_be_as_long_as_the_model_allows(rig):
    """vLLM does so for a chat, but not for a completion."""
    rig.model.faults.append(Fault(break_after=2))
    assert await chat(rig) == SAID
    assert rig.model.paths[-2:] == ["/tokenize", "/v1/completions"]
    assert rig.model.requests[-1]["max_tokens"] == 256 - len(ids(f"user say {SAID} one two"))


@pytest.mark.parametrize(
    "more",
    [
        {"presence_penalty": 0.5},
        {"frequency_penalty": 0.5},
        {"response_format": {"type": "json_object"}},
        {"extra_body": {"structured_outputs": {"choice": ["one"]}}},
        {"extra_body": {"bad_words": ["six"]}},
        {"extra_body": {"thinking_token_budget": 3}},
        {"messages": [{"role": "user", "content": [{"type": "text", "text": f"say {SAID}"}, IMAGE]}]},
    ],
)
async def test_a_stream_that_does_not_depend_on_the_tokens_alone_fails(rig, more):
    rig.model.faults.append(Fault(break_after=2))
    with pytest.raises(openai.APIError, match="broke off"):
        await chunks_of(rig, **more)
    assert len(rig.model.requests) == 1
    span = await rig.span()
    assert (span.status, span.response_token_ids) == ("Error", int32(ids("one two")))


async def test_tokens_whose_ids_are_missing_can_not_be_continued(rig):
    rig.model.lost_ids = 1
    rig.model.faults.append(Fault(break_after=2))
    with pytest.raises(openai.APIError, match="broke off"):
        await chunks_of(rig)


async def test_when_no_replica_can_continue_the_client_gets_an_error(rig):
    rig.model.faults.extend([Fault(break_after=2), *[Fault(hang_up=True)] * 20])
    with pytest.raises(openai.APIError, match="can't be reached"):
        await chunks_of(rig)
    span = await rig.span()
    assert (span.status, span.response_token_ids) == ("Error", int32(ids("one two")))
    assert semconv.CONTINUED not in span.attributes


@pytest.mark.parametrize(
    ("pieces", "stops", "held", "found"),
    [
        ([("one", ["one"]), (" two", [" two"])], [], 0, (0, "")),
        ([(" one", ["one"]), (" ", [""])], [], 0, (0, "")),  # of tokenizers that tell no spaces
        ([("one", ["one"]), (" €", [" €"]), ("", [""])], [], 0, (1, "")),  # the beginning of a character
        ([("one two", ["one", " two", ""])], [], 0, (1, "")),
        ([("one ", ["one", ""])], [], 0, None),  # is the space from the second token?
        ([("one", ["one"]), ("\n", ["\n"])], ["\nEnd"], 0, None),  # half of a stop has been said
        ([("", [""])] * RECENT, [], 0, None),
        ([("", ["one"]), ("one", [" two"]), (" two", [" three"])], ["\nEnd!!"], 6, (0, " three")),
        ([("", ["one"]), ("one t", [" two"]), ("w", ["\n"])], ["\nEn"], 2, (1, "o")),  # it may become a stop
        ([("", ["one"]), ("one ", [" two\n"])], ["\nEnd!"], 4, None),  # half of that token has been said
        ([("one t", ["one", " two"]), ("wo", [" €", ""])], ["!!!"], 2, (1, " €")),
        ([("one t", ["one", "two"])], ["!!!"], 2, None),  # not what was said
        ([("", ["a"])] * RECENT, ["b" * 99], 98, None),  # who knows how much of it was said
        ([], ["stop"], 3, (0, "")),  # nothing new
        ([("", ["", " t"])], ["stop"], 3, (0, " t")),
    ],
)
def test_where_a_stream_is_continued(pieces, stops, held, found):
    said = "it said " + "".join(text for text, _ in pieces)
    assert cut(pieces, said, stops, held) == found


def told_by_vllm(tokenizer, prompt, ids, stops):
    """The pieces of a stream, as vLLM's detokeniser makes them: what may become a stop is held back."""
    stream = pytest.importorskip("tokenizers").decoders.DecodeStream(ids=prompt, skip_special_tokens=True)
    held, text, told, pieces = max(map(len, stops), default=1) - 1, "", 0, []
    for number, token in enumerate(ids, 1):
        new = stream.step(tokenizer, token) or ""
        text += new
        end = min((at for stop in stops if (at := text.find(stop)) >= 0), default=None)
        if end is None:
            end = max(told, len(text) - (held if number < len(ids) else 0))
        pieces.append((text[told:end], [new]))
        told = end
        if any(stop in text for stop in stops):
            break
    return pieces


@pytest.mark.parametrize("stops", [[], ["\nObservation:"], ["###", "🎉🎉"]])
def test_text_is_neither_lost_nor_repeated_wherever_a_stream_is_cut(stops):
    """With a tokenizer that cuts characters into bytes, as those of today's models do."""
    tokenizers = pytest.importorskip("tokenizers")
    tokenizer = tokenizers.Tokenizer(tokenizers.models.BPE())
    tokenizer.pre_tokenizer = tokenizers.pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = tokenizers.decoders.ByteLevel()
    alphabet = tokenizers.pre_tokenizers.ByteLevel.alphabet()
    trainer = tokenizers.trainers.BpeTrainer(vocab_size=300, initial_alphabet=alphabet, show_progress=False)
    tokenizer.train_from_iterator(["the tool is the thing\nThought: Action: Observation:"] * 9, trainer)
    prompt = tokenizer.encode("user: größer?\n").ids
    answer = "Thought: 你好 the tool 🎉 is\ngrößer\nAction: € 42\nObs. then # 🎉🎉 it\nObservation: the thing ### end"
    ids = tokenizer.encode(answer).ids
    pieces = told_by_vllm(tokenizer, prompt, ids, stops)
    whole = "".join(text for text, _ in pieces)
    continued = 0
    for merged in (1, 2, 3):  # tokens that come in one piece
        for number in range(merged, len(pieces), merged):
            got = pieces[:number]
            said = "".join(text for text, _ in got)
            chunks = [got[n : n + merged] for n in range(0, number, merged)]
            seen = [("".join(text for text, _ in chunk), [new for _, (new,) in chunk]) for chunk in chunks]
            found = cut(seen[-RECENT:], said, stops, max(map(len, stops), default=1) - 1)
            if not said or found is None:
                continue
            kept = number - found[0]
            rest = told_by_vllm(tokenizer, [*prompt, *ids[:kept]], ids[kept:], stops)
            assert said + found[1] + "".join(text for text, _ in rest) == whole
            assert kept + len(rest) == len(pieces)
            continued += 1
    assert continued > 1.4 * len(pieces)  # of 1.83: for nearly all
