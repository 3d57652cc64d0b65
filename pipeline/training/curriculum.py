"""A curriculum: stages of training in one file, each from the last one's result. Pure."""

from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Final

from millstream.schemas.errors import ConfigError

TABLE: Final = "curriculum"
OF_THE_FILE: Final = ("run", "run_dir", "resume", "strategy")  # the same for all stages
SOURCES: Final = frozenset({"experiment", "store", "topic", "sql"})  # what says which rollouts are learnt from
EXPORTED: Final = ("best", "last")  # folders of a run that hold its model


@dataclass(frozen=True, slots=True)
class Leaving:
    """What types of algorithms leave for the stage after them, and take."""

    models: frozenset[str]  # a model in their run's folder
    prompts: frozenset[str]  # the best prompts, in their run's folder
    recorded: frozenset[str]  # learn from recorded rollouts


def stages_of(given: Mapping[str, Any], leaving: Leaving) -> list[dict[str, Any]]:
    """The training file of each stage. A stage is a table that may hold what a file holds, and takes the rest from the
    file; its run and its folder are those of the file with its name. Without a ``model`` of its own it begins with the
    last one that a stage before it has made, and its agents read the last prompts that one has found; it learns from
    the rollouts of the stage before if it learns from recorded ones. Raises `ConfigError`.
    """
    rest = {name: value for name, value in given.items() if name != TABLE}
    tables = given[TABLE]
    if not isinstance(tables, list) or not tables or not all(isinstance(table, dict) for table in tables):
        raise ConfigError(f"{TABLE}: write [[{TABLE}]] before each stage, and its [{TABLE}.algorithm] after it")
    if "algorithm" in rest:
        raise ConfigError(f"a file has [algorithm], or [[{TABLE}]] with an algorithm for each stage, not both")
    if rest.get("resume", "auto") not in ("auto", "never"):
        raise ConfigError(f"resume = {rest['resume']}: a curriculum goes on in the stage where it was; use auto")
    found: list[dict[str, Any]] = []
    names: set[str] = set()
    for number, table in enumerate(tables, 1):
        algorithm = table.get("algorithm")
        if not isinstance(algorithm, dict) or not isinstance(algorithm.get("type"), str):
            raise ConfigError(f"stage {number} of the {TABLE} needs an [{TABLE}.algorithm] with a type")
        name = str(table.get("name", algorithm["type"]))
        if name in names:
            raise ConfigError(f"two stages of the {TABLE} are called {name}: give one of them another name")
        names.add(name)
        if wrong := [field for field in OF_THE_FILE if field in table]:
            raise ConfigError(f"stage {name}: {', '.join(wrong)} can't differ between stages; write it above them")
        stage = {field: value for field, value in table.items() if field not in ("name", "start")}
        run, folder = rest.get("run", "run"), Path(rest.get("run_dir", "runs/default"))
        stage = {**rest, **stage, "run": f"{run}-{name}", "run_dir": str(folder / name)}
        stage["algorithm"] = _from_the_last(name, table, algorithm, found, leaving)
        searched = [each["run_dir"] for each in found if each["algorithm"]["type"] in leaving.prompts]
        if searched and not table.keys() & {"prompts", "prompts_from"}:
            stage["prompts_from"] = searched[-1]
        found.append(stage)
    return found


def _from_the_last(
    name: str,
    table: Mapping[str, Any],
    algorithm: Mapping[str, Any],
    before: list[dict[str, Any]],
    leaving: Leaving,
) -> dict[str, Any]:
    """The algorithm of a stage, with the model and the data that the stages before it leave."""
    options = dict(algorithm)
    if not before:
        if "start" in table:
            raise ConfigError(f"stage {name}: start is for stages after the first, which begins with its model")
        return options
    last = before[-1]
    made = next((stage for stage in reversed(before) if stage["algorithm"]["type"] in leaving.models), None)
    if "model" not in options and made is not None and options["type"] in leaving.models:
        start = table.get("start", EXPORTED[0] if "val_tasks" in made else EXPORTED[1])
        if start not in EXPORTED:
            raise ConfigError(f"stage {name}: start is {' or '.join(EXPORTED)}, not {start}")
        if start == EXPORTED[0] and "val_tasks" not in made:
            raise ConfigError(f'stage {name}: without val_tasks no model is the best; use start = "{EXPORTED[1]}"')
        options["model"] = str(Path(made["run_dir"]) / start)
    elif "start" in table:
        raise ConfigError(f"stage {name}: start says which model of the last stage it begins with; drop it, or model")
    given = options.get("data", {})
    if (
        (options["type"] in leaving.recorded or "data" in options)
        and isinstance(given, dict)
        and not given.keys() & SOURCES
    ):
        options["data"] = {**given, "experiment": last["run"]}
        if last.get("strategy") == "memory":
            options["data"]["store"] = f"chdb://{(Path(last['run_dir']) / 'store').resolve()}"
    return options
