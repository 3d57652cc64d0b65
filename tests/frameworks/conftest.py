"""The table of frameworks and features at the end of a run; without the extra, its tests are skipped."""

import sys
from collections import defaultdict
from importlib.util import find_spec
from pathlib import Path
from typing import Any

import pytest

NEEDED = ("openai", "anthropic", "langchain", "langgraph", "agents", "autogen_agentchat")
FOLDER = Path(__file__).parent
sys.path.append(str(FOLDER.parent / "consumers"))  # runner_rig
MARKS = {"passed": "✓", "skipped": "skipped", "failed": "FAILED", "error": "FAILED"}  # the worst last


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    missing = [name for name in NEEDED if find_spec(name) is None]
    for item in items:
        if item.path.parent == FOLDER:
            item.add_marker(pytest.mark.frameworks)
            if missing:
                reason = f"needs {', '.join(missing)}: pip install 'millstream[frameworks]'"
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
