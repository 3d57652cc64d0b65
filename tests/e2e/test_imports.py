"""The architecture's rules, read from the source: lazy imports and those for type checkers count as well."""

import ast
import sys
from collections.abc import Iterator
from graphlib import CycleError, TopologicalSorter
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[2]
PACKAGES = ("schemas", "producers", "consumers", "pipeline")  # each imports itself and those before it
MAX_ENTRIES = 13
# Third-party packages that schemas may import: none of them talks to anything.
SCHEMA_LIBRARIES = {"fastavro", "google", "jinja2", "opentelemetry.proto", "pydantic", "pydantic_settings"}
# Modules that start processes from what `deploy` holds.
LAUNCHERS = {"pipeline.cli", "pipeline.models.vllm_process"}
# Tasks and threads that are not supervised, by module and function: each is awaited by the function that starts it,
# belongs to a task group, or runs an agent or a hook, whose failure ends its attempt.
UNSUPERVISED = {
    ("producers.supervisor", "thread"),
    ("producers.supervisor", "_start"),
    ("consumers.log.kafka", "_stop"),
    ("consumers.runner.attempt", "_in_thread"),
    ("consumers.runner.attempt", "start"),
    ("consumers.runner.attempt", "_in_thread"),
    ("consumers.runner.hooks", "_start"),
    ("pipeline.algorithms.policy_gradient", "_ask"),
    ("pipeline.algorithms.policy_gradient", "_validate_meanwhile"),
    ("pipeline.prompts.apo", "run"),
    ("pipeline.tracing.blocking", "noted"),
    ("pipeline.tracing.blocking", "run_blocking"),
    ("pipeline.cli.setup.up", "_run"),
    ("pipeline.models.role", "run"),
    ("pipeline.services.fleet_load", "read"),
    ("pipeline.models.vllm_replica", "_until_down"),
    ("pipeline.models.vllm_server", "start"),
    ("pipeline.training.deployment", "_local_roles"),
    ("pipeline.training.run", "checkpoint"),
    ("pipeline.training.deployment", "_supervised"),
}


def modules() -> dict[str, Path]:
    """Files by module name, without the leading ``millstream.``."""
    folders = [(package, ROOT / package) for package in (*PACKAGES, "deploy")]
    folders.append(("integrations", ROOT / "millstream" / "integrations"))
    found = {}
    for package, folder in folders:
        for file in folder.rglob("*.py"):
            parts = (package, *file.relative_to(folder).with_suffix("").parts)
            found[".".join(parts).removesuffix(".__init__")] = file
    return found


MODULES = modules()
TREES = {module: ast.parse(file.read_text("utf-8")) for module, file in MODULES.items()}


def imports_of(module: str) -> Iterator[str]:
    """Absolute names; those of the project without ``millstream.``, the facade itself as ``millstream``."""
    file = MODULES[module]
    package = module if file.name == "__init__.py" else module.rpartition(".")[0]
    for node in ast.walk(TREES[module]):
        if isinstance(node, ast.Import):
            yield from (alias.name.removeprefix("millstream.") for alias in node.names)
        elif isinstance(node, ast.ImportFrom):
            source = node.module or ""
            if node.level:
                parent = package.split(".")[: len(package.split(".")) - node.level + 1]
                source = ".".join([*parent, *([source] if source else [])])
            for alias in node.names:
                whole = f"{source}.{alias.name}".removeprefix("millstream.")
                yield whole if whole in MODULES else source.removeprefix("millstream.")


IMPORTS = {module: set(imports_of(module)) - {module} for module in MODULES}


def within(module: str, *packages: str) -> bool:
    return any(f"{module}.".startswith(f"{package}.") for package in packages)


def violations(allowed: dict[str, tuple[str, ...]], of: tuple[str, ...]) -> list[str]:
    """Imports from ``of`` by a module in a key of ``allowed`` that its value does not cover."""
    return [
        f"{module} imports {imported}"
        for module, found in IMPORTS.items()
        for importer, packages in allowed.items()
        if within(module, importer)
        for imported in found
        if within(imported, *of) and not within(imported, *packages)
    ]


def test_the_graph_is_read() -> None:
    """The rules below hold for something: a module of each package, a lazy import, one for type checkers."""
    assert {module.partition(".")[0] for module in MODULES} == {*PACKAGES, "deploy", "integrations"}
    assert "pipeline.training.checkpoint" in IMPORTS["pipeline.training.run"]
    assert "torch" in IMPORTS["pipeline.models.server"]
    assert sum(map(len, IMPORTS.values())) > 500


def test_imports_point_one_way() -> None:
    allowed = {package: PACKAGES[: i + 1] for i, package in enumerate(PACKAGES)}
    assert violations(allowed, PACKAGES) == []


def test_nothing_imports_the_facade_and_integrations_import_producers_only() -> None:
    inside = dict.fromkeys(PACKAGES, ())
    assert violations(inside, ("millstream", "integrations")) == []
    assert violations({"integrations": ("producers", "schemas")}, (*PACKAGES, "deploy")) == []


def test_no_module_imports_itself_through_others() -> None:
    try:
        TopologicalSorter(IMPORTS).prepare()
    except CycleError as error:
        pytest.fail(f"a circle: {' ← '.join(error.args[1])}")


def test_schemas_import_no_client_library() -> None:
    foreign = {
        imported
        for module, found in IMPORTS.items()
        if within(module, "schemas")
        for imported in found
        if imported not in MODULES and imported.partition(".")[0] not in sys.stdlib_module_names
    }
    assert {name for name in foreign if not within(name, *SCHEMA_LIBRARIES)} == set()
    assert foreign


def test_proxy_and_models_share_only_protocols() -> None:
    assert violations({"pipeline.proxy": ()}, ("pipeline.models",)) == []
    assert violations({"pipeline.models": ()}, ("pipeline.proxy",)) == []


def test_only_launchers_import_deploy() -> None:
    importers = {module for module, found in IMPORTS.items() for name in found if within(name, "deploy")}
    assert {m for m in importers if not within(m, *LAUNCHERS, "deploy")} == set()


def folders() -> list[Path]:
    """Those with Python files, and all above them."""
    roots = [ROOT / name for name in (*PACKAGES, "tests")]
    return sorted(
        {folder for root in roots for file in root.rglob("*.py") for folder in file.parents} - {*ROOT.parents, ROOT}
    )


@pytest.mark.parametrize("folder", folders(), ids=lambda folder: str(folder.relative_to(ROOT)))
def test_a_folder_has_few_entries(folder: Path) -> None:
    ignored = {"__pycache__", "__init__.py"}
    entries = [path.name for path in folder.iterdir() if path.name not in ignored and not path.name.startswith(".")]
    assert len(entries) <= MAX_ENTRIES, sorted(entries)


def starts() -> set[tuple[str, str]]:
    """Where tasks and threads are started, but through a supervisor."""
    found = set()
    for module, tree in TREES.items():
        for function in ast.walk(tree):
            if not isinstance(function, ast.FunctionDef | ast.AsyncFunctionDef):
                continue
            for node in ast.walk(function):
                name = ast.unparse(node.func).rpartition(".")[2] if isinstance(node, ast.Call) else ""
                if name in ("create_task", "ensure_future", "Thread", "Timer"):
                    found.add((module, function.name))
    return found


def test_every_background_task_and_thread_is_started_by_a_supervisor() -> None:
    """Use `supervisor().loop`, ``job`` or ``thread``; or add the function above if it awaits the task itself."""
    assert starts() == UNSUPERVISED
