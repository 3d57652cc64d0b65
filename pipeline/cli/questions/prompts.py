"""``millstream prompts``: candidates of a search over prompts, their scores and differences, and the way back."""

from typing import TYPE_CHECKING, Annotated, Any

import typer

from millstream.pipeline.cli.open import open_settings, open_store, with_log
from millstream.pipeline.cli.output import Json, note, print_fields, print_json, print_rows, say
from millstream.pipeline.cli.questions.experiments import known_experiment
from millstream.schemas.errors import ConfigError

if TYPE_CHECKING:
    from millstream.consumers.log.port import Log

app = typer.Typer(no_args_is_help=True, help="Prompts that were searched for: list, compare, go back.")

Experiment = Annotated[str, typer.Argument(help="Its id, or the name of its run: then the newest.")]
Which = Annotated[str, typer.Argument(help="A candidate's number, or its resources version.")]


@app.command("list", epilog="Example: millstream prompts list calculator-prompts")
def prompts_list(experiment: Experiment, as_json: Json = False) -> None:
    """List the candidates with their parents and scores. `current`: what rollouts get that name no version."""
    _, rows = _found(experiment)
    if as_json:
        print_json(rows)
        return
    if not rows:
        note("this experiment has no candidates: it was no search for prompts")
        return
    columns = ["number", "round", "parent", "score", "batch_score", "parent_score", "", "refused", "resources_id"]
    table = [
        [
            row["number"],
            row["round"],
            row["parent_number"],
            *(_rounded(row[name]) for name in ("score", "batch_score", "parent_score")),
            "current" if row["current"] else "",
            row["refused"],
            row["resources_id"],
        ]
        for row in rows
    ]
    print_rows(columns, table, False, main=("number", "parent", "score", "", "refused"), texts=("refused",))


@app.command("show", epilog="Example: millstream prompts show calculator-prompts 7")
def prompts_show(experiment: Experiment, which: Which, as_json: Json = False) -> None:
    """Show a candidate: its templates, the critique that it answers, its scores."""
    from millstream.pipeline.store.candidates import candidate

    experiment_id, rows = _found(experiment)
    row = candidate(rows, which, experiment_id)
    if as_json:
        print_json(row)
        return
    hidden = ("templates", "engines", "critique", "created_at", "parent", "experiment_id")
    print_fields({name: value for name, value in row.items() if name not in hidden and value not in (None, "")})
    if row["critique"]:
        say(f"\ncritique of its parent:\n{row['critique']}")
    for name, text in row["templates"].items():
        say(f"\n{name} ({row['engines'][name]}):\n{text}")


@app.command("diff", epilog="Example: millstream prompts diff calculator-prompts 7")
def prompts_diff(
    experiment: Experiment,
    which: Which,
    other: Annotated[str, typer.Argument(help="Another candidate. Default: the parent.")] = "",
    as_json: Json = False,
) -> None:
    """Show the lines in which a candidate differs from its parent, or from another."""
    from millstream.pipeline.store.candidates import candidate, changes

    experiment_id, rows = _found(experiment)
    new = candidate(rows, which, experiment_id)
    if not other and new["parent_number"] is None:
        raise ConfigError(f"candidate {new['number']} has no parent: name another to compare it with")
    old = candidate(rows, other or str(new["parent_number"]), experiment_id)
    found = list(changes(old["templates"], new["templates"]))
    if as_json:
        print_json([{"template": name, "sign": sign, "line": line} for name, sign, line in found])
        return
    if not found:
        say("They have the same texts.")
    for name in dict.fromkeys(name for name, _, _ in found):
        say(f"{name}: candidate {old['number']} → {new['number']}")
        for _, sign, line in (each for each in found if each[0] == name):
            say(f"{sign} {line}".rstrip())


@app.command("rollback", epilog="Example: millstream prompts rollback calculator-prompts --to 3")
def prompts_rollback(
    experiment: Experiment, to: Annotated[str, typer.Option(help="A candidate's number, or its resources version.")]
) -> None:
    """Make a candidate the experiment's current version again, for all rollouts from now on that name no version. What
    is under way keeps the one that it has."""
    from millstream.pipeline.store.candidates import candidate, templates_of
    from millstream.schemas.ids import new_id

    experiment_id, rows = _found(experiment)
    row = candidate(rows, to, experiment_id)
    if row["refused"] and row["score"] is None:
        raise ConfigError(f"candidate {row['number']} was refused: {row['refused']}")
    settings, resources_id = open_settings(), new_id()

    async def publish(log: "Log") -> None:
        from millstream.consumers.control import ControlFollower
        from millstream.producers.control import publish_resources
        from millstream.producers.log.port import closing
        from millstream.schemas.control import Resources

        control = ControlFollower(log, settings.topics)
        await control.start()
        try:
            now = control.latest(experiment_id)
        finally:
            await control.close()
        items: dict[str, Any] = {} if now is None else dict(now.items)
        version = Resources(resources_id=resources_id, experiment_id=experiment_id, items=items | templates_of(row))
        async with closing(log.producer()) as producer:
            await publish_resources(producer, settings.topics, version)

    with_log(settings, publish)
    say(f"candidate {row['number']} is current: resources {resources_id}")


@app.command("split", epilog="Example: millstream prompts split calculator-prompts 3=0.5 7=0.5")
def prompts_split(
    experiment: Experiment,
    shares: Annotated[list[str], typer.Argument(help="CANDIDATE=SHARE of each; a rollout and its retries keep one.")],
) -> None:
    """Compare candidates: share the rollouts that name no version among them. The next version that is published, as by
    `prompts rollback`, ends it."""
    from millstream.pipeline.cli.model import shares_of
    from millstream.pipeline.prompts.splitting import split
    from millstream.pipeline.store.candidates import candidate

    experiment_id, rows = _found(experiment)
    numbers = {str(row["number"]) for row in rows}
    given = {
        candidate(rows, which, experiment_id)["resources_id"] if which in numbers else which: share
        for which, share in shares_of(shares, "7=0.5").items()
    }
    settings = open_settings()
    made = with_log(settings, lambda log: split(log, settings.topics, experiment_id, given))
    whole = sum(made.shares.values())
    for version, share in made.shares.items():
        say(f"{share / whole:.1%} of the rollouts: resources {version}")
    say(f"millstream prompts rollback {experiment} --to CANDIDATE ends it")


def _found(experiment: str) -> tuple[str, list[dict[str, Any]]]:
    from millstream.pipeline.store.candidates import candidates_of

    with open_store(open_settings()) as store:
        experiment_id = known_experiment(store, experiment)
        return experiment_id, candidates_of(store.sql, experiment_id)


def _rounded(value: float | None) -> str:
    return "" if value is None else f"{value:.4g}"
