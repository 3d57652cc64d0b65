"""Records the traces that tests/consumers/adapter/test_golden.py reads: real agents, libraries, a local model server.

    python tests/support/frameworks/record.py                  # all of `RECORDINGS` whose libraries are installed here
    python tests/support/frameworks/record.py openai_sdk …     # these
    python tests/support/frameworks/record.py NAME MODULE:AGENT '{"city": "Paris"}'    # one more

Each is an Avro object container of `Span` records in log order, ``traces/NAME.avro``. What the table of dialects has to
know comes from libraries that clash with each other; each in an environment of its own, with this project:

    openinference     openinference-instrumentation-openai==0.1.66 openinference-instrumentation-langchain==0.1.80
    openllmetry       opentelemetry-instrumentation-openai==0.62.4 opentelemetry-instrumentation-langchain==0.62.4
    agent_lightning   agentlightning==0.3.0
    crewai            .venv-crewai (make setup-crewai)
"""

import json
import sys
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from importlib.util import find_spec
from itertools import count
from pathlib import Path
from typing import Any

import fastavro

sys.path += [str(Path(__file__).parent), str(Path(__file__).parents[1]), str(Path(__file__).parents[3])]

import framework_rig
import model_server

from millstream.schemas.wire import codec

TRACES = Path(__file__).parent / "traces"
PARIS = {"city": "Paris"}


@dataclass(frozen=True)
class Recording:
    agent: str  # module:attribute
    task: Any
    proxy: bool = True
    instrument: str | None = None  # as --instrument
    needs: str = "openai"  # a module


def _example(name: str, needs: str, task: Any = PARIS, **options: Any) -> Recording:
    return Recording(f"tests.support.frameworks.recorded:{name}", task, needs=needs, **options)


def _dialect(name: str, agent: str, needs: str, **options: Any) -> Recording:
    return Recording(
        f"tests.support.frameworks.dialects.{name}:{agent}", PARIS, instrument="none", needs=needs, **options
    )


_TRACELOOP = "opentelemetry.instrumentation"
RECORDINGS = {
    "openai_sdk": _example("openai_sdk", "openai", {"way": "tools", **PARIS}),
    "openai_sdk_stream": _example("openai_sdk", "openai", {"way": "stream", **PARIS}, proxy=False),
    "openai_sdk_responses": _example("openai_sdk", "openai", {"way": "responses", **PARIS}, proxy=False),
    "anthropic_sdk": _example("anthropic_sdk", "anthropic", {"way": "tools", **PARIS}, proxy=False),
    "langchain": _example("langchain_agent", "langchain"),
    "langgraph": _example("langgraph_agent", "langgraph"),
    "openai_agents": _example("openai_agents", "agents.tracing"),
    "autogen": _example("autogen_team", "autogen_agentchat"),
    "crewai": _example("crewai_crew", "crewai"),
    "plain_http": _example("plain_http", "aiohttp"),
    "openinference_openai": _dialect(
        "openinference", "openai_agent", "openinference.instrumentation.openai", proxy=False
    ),
    "openinference_langchain": _dialect("openinference", "langchain_agent", "openinference.instrumentation.langchain"),
    "openllmetry_openai": _dialect("openllmetry", "openai_agent", f"{_TRACELOOP}.openai"),
    "openllmetry_langchain": _dialect("openllmetry", "langchain_agent", f"{_TRACELOOP}.langchain", proxy=False),
    "agent_lightning": _dialect("agent_lightning", "agent", "agentlightning", proxy=False),
}


def record(name: str, recording: Recording) -> None:
    model_server._numbers = count(1)  # so that ids are the same each time
    options = {} if recording.instrument is None else {"instrument": recording.instrument}
    (trace,) = framework_rig.run(recording.agent, [recording.task], proxy=recording.proxy, **options)
    if trace.status != "succeeded":
        raise SystemExit(f"{name}: {trace.status}, {trace.ended.last.error}")
    TRACES.mkdir(exist_ok=True)
    with (TRACES / f"{name}.avro").open("wb") as file:
        fastavro.writer(file, codec.load_schema("Span"), map(asdict, trace.spans), codec="deflate")
    print(f"{name}: {len(trace.spans)} spans\n{trace.tree()}")


def _installed(module: str) -> bool:
    try:
        return find_spec(module) is not None
    except ModuleNotFoundError:
        return False


def main(arguments: Sequence[str]) -> None:
    if len(arguments) == 3 and ":" in arguments[1]:
        record(arguments[0], Recording(arguments[1], json.loads(arguments[2])))
        return
    for name in arguments or [name for name, recording in RECORDINGS.items() if _installed(recording.needs)]:
        record(name, RECORDINGS[name])


if __name__ == "__main__":
    main(sys.argv[1:])
