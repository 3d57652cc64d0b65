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
MARKS = {"passed": "✓", "failed": "FAILED", "error": "FAILED", "skipped": "skipped"}


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    missing = [name for name in NEEDED if find_spec(name) is None]
    for item in items:
        if item.path.parent == FOLDER:
            item.add_marker(pytest.mark.frameworks)
            if missing:
                reason = f"needs {', '.join(missing)}: pip install 'millstream[frameworks]'"
                item.add_marker(pytest.mark.skip(reason=reason))


def pytest_runtest_setup(item: pytest.Item) -> None:
    feature = item.get_closest_marker("feature")
    if feature is not None:
        item.user_properties.append(("feature", feature.args[0]))


def pytest_terminal_summary(terminalreporter: Any) -> None:
    results: dict[str, dict[str, str]] = defaultdict(dict)
    features: list[str] = []
    for outcome, mark in MARKS.items():
        for report in terminalreporter.getreports(outcome):
            feature = dict(getattr(report, "user_properties", ())).get("feature")
            if feature is not None and (report.when == "call" or outcome != "passed"):
                framework = Path(report.fspath).stem.removeprefix("test_")
                # Of several tests of a feature, the worst counts.
                if results[framework].get(feature) != "FAILED":
                    results[framework][feature] = mark
                if feature not in features:
                    features.append(feature)
    if not results:
        return
    terminalreporter.section("frameworks")
    width = max(map(len, results))
    terminalreporter.write_line(" " * width + "  " + "  ".join(features))
    for framework in sorted(results):
        cells = [results[framework].get(feature, "–").ljust(len(feature)) for feature in features]
        terminalreporter.write_line(f"{framework.ljust(width)}  {'  '.join(cells)}".rstrip())
