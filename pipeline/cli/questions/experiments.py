"""``millstream experiments``: training runs, what they were started with, and how two of them differ."""

from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from millstream.pipeline.cli.open import open_settings, open_store
from millstream.pipeline.cli.output import Json, date, note, print_fields, print_json, print_rows, say
from millstream.schemas.errors import ConfigError, StoreError
from millstream.schemas.spans.text import json_text, parsed

if TYPE_CHECKING:
    from millstream.pipeline.store.clickhouse import ClickHouseStore

app = typer.Typer(no_args_is_help=True, help="Training runs: what they were started with, and what became of them.")

SHOWN = 5  # of the experiments that there are, if one is unknown

Name = Annotated[str, typer.Argument(help="Its id, the name of its run (then the newest), or the run's folder.")]


@app.command("list", epilog="Example: millstream experiments list --limit 10")
def experiments_list(
    limit: Annotated[int, typer.Option(min=1, help="Maximum number of rows.")] = 50, as_json: Json = False
) -> None:
    """List training runs, newest first, with their steps and rewards."""
    from millstream.pipeline.store.queries import TRAINING_RUNS

    with open_store(open_settings()) as store:
        found = store.sql(TRAINING_RUNS).records()[:limit]
    if not found:
        note("the store has no experiments yet")
    if as_json:
        print_json(found)
    elif found:
        shown = [{**row, "created_at": date(row["created_at"]), "seconds": round(row["seconds"] or 0)} for row in found]
        rounded = [{k: f"{v:.4g}" if isinstance(v, float) else v for k, v in row.items()} for row in shown]
        main = ("experiment_id", "run", "steps", "reward", "validation_reward", "created_at")
        print_rows(list(found[0]), [list(row.values()) for row in rounded], False, main=main, texts=("run",))


@app.command("show", epilog="Example: millstream experiments show calculator")
def experiments_show(experiment: Name, as_json: Json = False) -> None:
    """Show what a training run was started with: algorithm, configuration, digests, versions, git commit, seeds.
    ``changes``: what was different when it went on."""
    from millstream.pipeline.training.reporting.record import flat

    experiment_id, configuration = record_of(experiment)
    if as_json:
        print_json({"experiment_id": experiment_id, **configuration})
        return
    say(f"experiment {experiment_id}")
    print_fields({name: _shown(value) for name, value in flat(configuration)})


@app.command("diff", epilog="Example: millstream experiments diff calculator calculator-small")
def experiments_diff(a: Name, b: Name, as_json: Json = False) -> None:
    """Show where two training runs were started with different values."""
    from millstream.pipeline.training.reporting.record import differences

    sides = [record_of(name) for name in (a, b)]
    found = differences(*(configuration for _, configuration in sides))
    if as_json:
        print_json([{"name": name, "a": left, "b": right} for name, (left, right) in found.items()])
        return
    if not found:
        say("They were started with the same values.")
        return
    rows = [[name, *("" if value is None else _shown(value) for value in values)] for name, values in found.items()]
    print_rows(["name", *(experiment_id for experiment_id, _ in sides)], rows, False)


def known_experiment(store: "ClickHouseStore", wanted: str) -> str:
    """The id of an experiment, which may be named by its run: then the newest. Raises `ConfigError`."""
    from millstream.pipeline.store.recorded import find_experiment

    return find_experiment(store, wanted, note)


def record_of(wanted: str) -> tuple[str, dict[str, Any]]:
    """The id and the record of an experiment: from its run's folder, else from the store. Raises `ConfigError`,
    `StoreError`."""
    from millstream.pipeline.training.reporting.record import RECORD

    path = Path(wanted) / RECORD
    if path.is_file():
        try:
            found = parsed(path.read_text("utf-8"))
            return str(found.pop("experiment_id")), found
        except (ValueError, KeyError, TypeError, AttributeError) as error:
            raise ConfigError(f"{path} can't be read ({type(error).__name__}: {error})") from error
    if Path(wanted).is_dir() and "/" in wanted:
        raise ConfigError(f"{wanted} is not the folder of a run: it has no {RECORD}")
    with open_store(open_settings()) as store:
        return _configuration(store, wanted)


def _configuration(store: "ClickHouseStore", wanted: str) -> tuple[str, dict[str, Any]]:
    """Raises `ConfigError` for an unknown experiment, `StoreError` for one that no training run has recorded."""
    from millstream.pipeline.store import recorded

    experiment_id = known_experiment(store, wanted)
    found = recorded.record_of(store.sql, experiment_id)
    if found is None:
        raise StoreError(f"experiment {experiment_id} was started by no trainer: its tasks were published with its id")
    return experiment_id, found


def _shown(value: Any) -> str:
    return value if isinstance(value, str) else json_text(value)
