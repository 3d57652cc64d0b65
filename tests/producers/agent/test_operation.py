"""`ms.operation` as a decorator and around a body."""

import asyncio
import json
import logging
import threading
from collections.abc import AsyncIterator, Generator, Iterator
from dataclasses import dataclass
from datetime import date
from typing import Any

import pytest
from pydantic import BaseModel

import millstream as ms
from millstream.producers.agent import emit
from millstream.schemas.wire.records import Span
from tests.producers.agent.test_span_processor import an_attempt


def told(span: Span) -> tuple[Any, ...]:
    """Inputs and output."""
    attributes = span.attributes
    return tuple(json.loads(attributes[f"agentlightning.operation.{way}"]) for way in ("input", "output"))


class Searcher:
    @ms.operation
    def search(self, city: str, *more: str, depth: int = 1) -> dict[str, Any]:
        """Finds."""
        ms.emit_span("within")
        return {"found": city, "more": more}


def test_a_function() -> None:
    with an_attempt() as spans:
        assert Searcher().search("Paris", "Lyon", depth=2) == {"found": "Paris", "more": ("Lyon",)}
    within, search, root = spans
    assert search.name == "Searcher.search"
    assert (within.parent_id, search.parent_id) == (search.span_id, root.span_id)
    assert told(search) == ({"city": "Paris", "more": ["Lyon"], "depth": 2}, {"found": "Paris", "more": ["Lyon"]})
    assert search.end > search.start
    assert Searcher.search.__doc__ == "Finds."


async def test_coroutines_at_the_same_time_each_with_its_own() -> None:
    @ms.operation("wait", {"gen_ai.operation.name": "execute_tool", "pool": {"size": 2}})
    async def wait(n: int) -> int:
        await asyncio.sleep(0)
        ms.emit_span(f"within {n}")
        return n

    with an_attempt() as spans:
        assert await asyncio.gather(*(wait(n) for n in range(3))) == [0, 1, 2]
    waits = {told(s)[1]: s for s in spans if s.name == "wait"}
    for n in range(3):
        (within,) = [s for s in spans if s.name == f"within {n}"]
        assert within.parent_id == waits[n].span_id
    assert {(s.kind, s.attributes["pool"]) for s in waits.values()} == {("tool", '{"size": 2}')}


def test_a_generator_is_current_only_while_it_works() -> None:
    @ms.operation
    def count(n: int) -> Generator[int, str, str]:
        for i in range(n):
            ms.emit_span(f"made {i}")
            got = yield i
            ms.emit_span(got)
        return "done"

    with an_attempt() as spans:
        made = count(2)
        assert next(made) == 0
        ms.emit_span("looked at")
        assert made.send("sent") == 1
        with pytest.raises(StopIteration) as end:
            made.send("again")
    assert end.value.value == "done"
    by_name = {s.name.rpartition(".")[2]: s for s in spans}
    operation, root = by_name["count"], spans[-1]
    assert told(operation) == ({"n": 2}, [0, 1])
    assert by_name["looked at"].parent_id == root.span_id
    assert {by_name[n].parent_id for n in ("made 0", "sent", "made 1", "again")} == {operation.span_id}


def test_a_generator_that_is_left_or_thrown_into() -> None:
    closed = []

    @ms.operation("numbers")
    def numbers() -> Iterator[int]:
        try:
            yield 1
            yield 2
        except KeyError:
            yield 3
        finally:
            closed.append(True)

    with an_attempt() as spans:
        for number in numbers():
            if number == 1:
                break
        thrown_into = numbers()
        next(thrown_into)
        assert thrown_into.throw(KeyError("k")) == 3  # type: ignore[attr-defined]
        assert list(thrown_into) == []
    assert closed == [True, True]
    left, thrown, _ = spans
    assert (left.status, left.attributes["agentlightning.operation.output"]) == ("Unset", "[1]")
    assert (thrown.status, thrown.attributes["agentlightning.operation.output"]) == ("Unset", "[1,3]")


async def test_an_async_generator() -> None:
    @ms.operation("stream")
    async def stream(n: int) -> AsyncIterator[int]:
        for i in range(n):
            await asyncio.sleep(0)
            ms.emit_span(f"made {i}")
            yield i
        raise ValueError("worn out")

    async def read() -> None:
        async for _ in stream(2):
            ms.emit_span("looked at")

    with an_attempt() as spans:
        with pytest.raises(ValueError, match="worn out"):
            await read()
        left = stream(5)
        async for _ in left:
            break
        await left.aclose()  # type: ignore[attr-defined]
    whole, broken = [s for s in spans if s.name == "stream"]
    root = spans[-1]
    assert {s.parent_id for s in spans if s.name == "looked at"} == {root.span_id}
    assert {s.parent_id for s in spans if s.name == "made 1"} == {whole.span_id}
    assert (whole.status, whole.status_message, told(whole)) == ("Error", "ValueError: worn out", ({"n": 2}, [0, 1]))
    assert (broken.status, told(broken)) == ("Unset", ({"n": 5}, [0]))


def test_a_body() -> None:
    with an_attempt() as spans, ms.operation("look up", {"source": "wiki"}) as op:
        op.set_input(city="Paris")
        ms.emit_span("within")
        op.set_output([1, 2])
    within, operation, _ = spans
    assert within.parent_id == operation.span_id
    assert (operation.name, told(operation)) == ("look up", ({"city": "Paris"}, [1, 2]))
    assert operation.attributes["source"] == "wiki"
    with pytest.raises(TypeError, match="needs a name"), ms.operation():
        pass


def test_an_error_is_recorded_and_goes_on_its_way() -> None:
    @ms.operation("f")
    def fail() -> None:
        raise KeyError("Atlantis")

    with an_attempt() as spans, pytest.raises(KeyError, match="Atlantis"):
        fail()
    span = spans[0]
    assert (span.status, span.attributes["error.type"], span.events[0].name) == ("Error", "KeyError", "exception")
    assert "agentlightning.operation.output" not in span.attributes
    with an_attempt() as spans, pytest.raises(TypeError, match="unexpected keyword argument 'x'"):
        fail(x=1)  # type: ignore[call-arg]
    assert spans[0].status == "Error"


def test_models_dataclasses_and_dates_are_json() -> None:
    class Answer(BaseModel):
        text: str
        when: date

    @dataclass
    class Reply:
        answers: list[BaseModel]

    @ms.operation
    def reply(to: object) -> Reply:
        return Reply([Answer(text="é", when=date(2026, 1, 2))])

    with an_attempt() as spans:
        reply(Answer)
    inputs, output = told(spans[0])
    assert output == {"answers": [{"text": "é", "when": "2026-01-02"}]}
    assert "Answer" in inputs["to"]


def test_what_is_no_json_is_shown_and_what_is_too_large_is_refused() -> None:
    circle: list[Any] = []
    circle.append(circle)

    @ms.operation("f")
    def f(value: Any) -> Any:
        return value

    with an_attempt() as spans:
        assert f(circle) is circle
        f(["\ud800"])  # half a character
        with pytest.raises(emit.EmitError, match=r"span 'f': attribute 'agentlightning\.operation\.input'"):
            f("x" * (emit.MAX_ATTRIBUTE_BYTES + 1))
    assert [s.status for s in spans[:-1]] == ["Unset", "Unset", "Error"]
    outputs = [s.attributes.get("agentlightning.operation.output") for s in spans[:-1]]
    assert outputs == ['["..."]', "['\\ud800']", None]


async def test_outside_a_rollout_it_warns_once_and_does_its_work(
    caplog: pytest.LogCaptureFixture, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(emit, "_warned", threading.Event())

    @ms.operation("double")
    def double(n: int) -> int:
        return 2 * n

    @ms.operation("numbers")
    async def numbers() -> AsyncIterator[int]:
        yield 1
        yield 2

    with caplog.at_level(logging.WARNING):
        assert double(2) == 4
        assert [n async for n in numbers()] == [1, 2]
        with ms.operation("body") as op:
            op.set_input(a=1)
            op.set_output(2)
        ms.emit_message("hello")
    assert [r.message for r in caplog.records] == [
        "operation 'double' is not recorded: this code does not run within a rollout"
    ]
