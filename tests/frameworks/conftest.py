"""Which feature of which framework a test is of; without its extra, a test is skipped.

CrewAI has an environment of its own (`make test-all`): it wants another openai than the rest."""

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


@pytest.fixture(scope="class")
def traces(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> Any:
    """What the agent of `AgentCases` did, all in one process."""
    from framework_rig import run

    cities = ("Paris", "Atlantis", "Nowhere")
    tasks = [*({"city": city} for city in cities), {"city": "Paris", "stream": True}]
    home = {"XDG_DATA_HOME": str(tmp_path_factory.mktemp("home"))}  # CrewAI keeps each crew's last outputs there
    return dict(zip((*cities, "stream"), run(request.cls.agent, tasks, env=home), strict=True))
