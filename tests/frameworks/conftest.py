"""The table of frameworks and features at the end of a run; without its extra, a test is skipped.

CrewAI has an environment of its own (`make test-all`): it wants another openai than the rest."""

from collections import defaultdict
from importlib.util import find_spec
from pathlib import Path
from typing import Any

import pytest

pytest.register_assert_rewrite("agent_cases", "framework_rig")

NEEDED = {
    "frameworks": ("anthropic", "langchain", "langgraph", "agents", "autogen_agentchat"),
    "crewai": ("crewai",),
}
FOLDER = Path(__file__).parent
MARKS = {"passed": "✓", "skipped": "skipped", "failed": "FAILED", "error": "FAILED"}  # the worst last


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    missing = {extra: [name for name in names if find_spec(name) is None] for extra, names in NEEDED.items()}
    for item in items:
        if item.path.parent == FOLDER:
            extra = "crewai" if "crewai" in item.path.name else "frameworks"
            item.add_marker(pytest.mark.frameworks)
            if missing[extra]:
                reason = f"needs {', '.join(missing[extra])}: pip install 'millstream[{extra}]'"
                item.add_marker(pytest.mark.skip(reason=reason))


def pytest_runtest_setup(item: pytest.Item) -> None:
    for feature in item.iter_markers("feature"):
        name, *frameworks = feature.args
        for framework in frameworks or [item.path.stem.removeprefix("test_")]:
            item.user_properties.append(("feature", (framework, name)))


def pytest_terminal_summary(terminalreporter: Any) -> None:
    results: dict[str, dict[str, str]] = defaultdict(dict)
    features: dict[str, None] = {}
    for outcome, mark in MARKS.items():
        for report in terminalreporter.getreports(outcome):
            if report.when != "call" and outcome == "passed":
                continue
            for key, value in getattr(report, "user_properties", ()):
                if key == "feature":
                    framework, feature = value
                    results[framework][feature] = mark  # of several tests of a feature the worst counts: it comes last
                    features[feature] = None
    if not results:
        return
    terminalreporter.section("frameworks")
    width = max(map(len, results))
    terminalreporter.write_line(" " * width + "  " + "  ".join(features))
    for framework in sorted(results):
        cells = [results[framework].get(feature, "–").ljust(len(feature)) for feature in features]
        terminalreporter.write_line(f"{framework.ljust(width)}  {'  '.join(cells)}".rstrip())


@pytest.fixture(scope="class")
def traces(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> Any:
    """What the agent of `AgentCases` did, all in one process."""
    from framework_rig import run

    cities = ("Paris", "Atlantis", "Nowhere")
    tasks = [*({"city": city} for city in cities), {"city": "Paris", "stream": True}]
    home = {"XDG_DATA_HOME": str(tmp_path_factory.mktemp("home"))}  # CrewAI keeps each crew's last outputs there
    return dict(zip((*cities, "stream"), run(request.cls.agent, tasks, env=home), strict=True))
