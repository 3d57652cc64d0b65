"""What attempts print is kept with their rollouts."""

import json
import os
from pathlib import Path

import pytest
from opentelemetry.sdk.trace import SpanLimits, TracerProvider
from runner_rig import Ended, running, write_agent

from millstream.pipeline.store.conversation import printed
from millstream.producers.printed import MAX_CHARACTERS, MAX_LINE, MAX_LINES, Printed
from millstream.schemas.spans import semconv
from millstream.schemas.wire.records import Span

AGENT = """
    import asyncio, logging, sys, threading, warnings

    print("imported")

    def work(input):
        print("hello", input)
        sys.stderr.write(f"from {input}\\n")
        logging.warning("logged %s", input)
        thread = threading.Thread(target=lambda: print("thread", input))
        thread.start()
        thread.join()
        print("open", input, end="")
        if input == "bad":
            raise ValueError("no good")
        return 1.0

    async def work_async(input):
        for n in range(3):
            print("hello", input, n)
            await asyncio.sleep(0)
        return 1.0
"""


ENV = [name for name in ("PYTHONPATH",) if name in os.environ]  # the tree that is tested


def by_name(ended: dict[str, Ended]) -> list[tuple[str, Ended]]:
    return [(json.loads(name), attempt) for name, attempt in ended.items()]


def lines(ended: Ended) -> list[str]:
    return [f"{line.who}: {line.text}" for line in printed([s for s in ended.spans if isinstance(s, Span)])]


@pytest.mark.parametrize("processes", [0, 1])
async def test_prints_are_in_the_store_with_their_attempt(
    processes: int, tmp_path: Path, capfd: pytest.CaptureFixture[str]
) -> None:
    """Entry B2: also of an attempt that fails, of its threads, and what has no line feed."""
    write_agent(tmp_path, AGENT, "printing_agent.py")
    async with running("printing_agent:work", tmp_path, processes=processes, env=ENV) as rig:
        await rig.publish(["a", "b", "bad"])
        ended = await rig.ends(3)
    for name, attempt in by_name(ended):
        said = lines(attempt)
        assert [line for line in said if line.startswith("stdout")] == [
            f"stdout: hello {name}",
            f"stdout: thread {name}",
            f"stdout: open {name}",
        ]
        assert f"stderr: from {name}" in said
    if processes:
        check_lines(capfd.readouterr().err, ended)


def check_lines(log: str, ended: dict[str, Ended]) -> None:
    """Each line of an agent process's log names its rollout and attempt."""
    assert "INFO    agent stdout: imported\n" in log
    for name, attempt in by_name(ended):
        last = attempt.last
        fields = f"rollout={last.rollout_id} attempt={last.attempt_id}"
        for said in (f"stdout: hello {name}", f"stderr: from {name}", f"stdout: thread {name}", f"stdout: open {name}"):
            assert f"INFO    agent {said} {fields}\n" in log
        assert f"logged {name} {fields}\n" in log


async def test_async_attempts_of_one_process_are_told_apart(tmp_path: Path) -> None:
    write_agent(tmp_path, AGENT, "printing_agent.py")
    async with running("printing_agent:work_async", tmp_path, processes=1, env=ENV) as rig:
        await rig.publish(list("abcdef"))
        ended = await rig.ends(6)
    for name, attempt in by_name(ended):
        assert lines(attempt) == [f"stdout: hello {name} {n}" for n in range(3)]


def kept(write: list[str]) -> tuple[list[str], int]:
    provider = TracerProvider(span_limits=SpanLimits(max_events=SpanLimits.UNSET))
    printed = Printed("r", "a")
    for text in write:
        printed.write("stdout", text)
    span = provider.get_tracer("t").start_span("root")
    printed.end(span)
    span.end()
    attributes = json.loads(span.to_json())["attributes"]  # type: ignore[attr-defined]
    return [e.attributes[semconv.PRINTED_TEXT] for e in span.events], attributes.get(semconv.PRINTED_LEFT_OUT, 0)  # type: ignore[attr-defined]


@pytest.mark.parametrize(
    ("write", "lines"),
    [
        (["a\nb\n"], ["a", "b"]),
        (["a", "b\n", "c"], ["ab", "c"]),
        (["a\r\n"], ["a"]),
        (["1 %\r", "50 %\r", "100 %\n"], ["100 %"]),
        (["\n"], [""]),
        ([], []),
        (["x" * (MAX_LINE + 1)], ["x" * MAX_LINE, "x"]),
        (["x" * (MAX_LINE + 1) + "\n"], ["x" * MAX_LINE, "x"]),
    ],
    ids=lambda value: ascii(value)[:20],
)
def test_lines_are_split(write: list[str], lines: list[str]) -> None:
    assert kept(write) == (lines, 0)


def test_the_last_lines_are_kept() -> None:
    lines, left_out = kept([f"{n}\n" for n in range(MAX_LINES + 5)])
    assert lines == [str(n) for n in range(5, MAX_LINES + 5)]
    assert left_out == 5


def test_their_size_is_bounded() -> None:
    lines, left_out = kept([f"{n:04}" + "x" * 996 + "\n" for n in range(100)])
    assert sum(map(len, lines)) <= MAX_CHARACTERS
    assert lines[-1].startswith("0099")
    assert left_out == 100 - len(lines)
