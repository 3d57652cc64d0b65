"""``millstream dead``: lists, shows and replays dead letters, as the log holds them."""

from dataclasses import asdict
from typing import TYPE_CHECKING, Annotated

import typer

from millstream.pipeline.cli.open import open_settings, with_log
from millstream.pipeline.cli.output import Json, print_fields, print_rows
from millstream.schemas.errors import CodecError, ConfigError, TooLarge

if TYPE_CHECKING:
    from millstream.consumers.log.port import Log

app = typer.Typer(no_args_is_help=True, help="Records that could not be used, and rollouts that failed.")

Place = Annotated[str, typer.Argument(help="partition:offset, as `millstream dead list` prints it.")]


@app.command("list", epilog="Example: millstream dead list --reason lost_attempts_exhausted")
def dead_list(
    reason: Annotated[str | None, typer.Option(help="Only these: undecodable, attempts_exhausted, …")] = None,
    role: Annotated[str | None, typer.Option(help="Only what this role refused: runner, adapter, sink.")] = None,
    as_json: Json = False,
) -> None:
    """List dead letters, oldest first in each partition."""
    from millstream.consumers.dead_letters import letter_key, letter_place, list_dead_letters

    settings = open_settings()
    found = with_log(settings, lambda log: list_dead_letters(log, settings.topics, reason, role))
    rows = [
        [letter_place(record), x.role, x.reason, letter_key(x) or "", f"{x.topic}[{x.partition}]@{x.offset}", x.error]
        for record, x in found
    ]
    columns = ("place", "role", "reason", "key", "from", "error")
    print_rows(columns, rows, as_json, main=("place", "role", "reason", "key", "error"), texts=("error",))


@app.command("show", epilog="Example: millstream dead show 0:17")
def dead_show(place: Place, as_json: Json = False) -> None:
    """Show a dead letter, with its body decoded if possible."""
    from millstream.consumers.dead_letters import find_dead_letters, letter_key, readable

    settings = open_settings()
    (letter,) = with_log(settings, lambda log: find_dead_letters(log, settings.topics, [place]))
    fields = asdict(letter) | {"key": letter_key(letter), "value": readable(letter.value)}
    fields["headers"] = {name: readable(value) for name, value in letter.headers.items()}
    if as_json:
        print_rows(list(fields), [list(fields.values())], True)
    else:
        print_fields(fields)


@app.command("replay", epilog="Example: millstream dead replay --all --reason lost_attempts_exhausted")
def dead_replay(
    places: Annotated[
        list[str] | None, typer.Argument(help="partition:offset of each, as `millstream dead list` prints it.")
    ] = None,
    everything: Annotated[
        bool, typer.Option("--all", help="Instead of places: all, or all of --reason, --role.")
    ] = False,
    reason: Annotated[str | None, typer.Option(help="With --all: only these.")] = None,
    role: Annotated[str | None, typer.Option(help="With --all: only what this role refused.")] = None,
) -> None:
    """Send records again; the task of a failed rollout becomes a new rollout with fresh budgets.

    Each letter is replayed as often as it is named. With --all, those that can't be replayed are listed and left, and
    the command ends with 1."""
    from millstream.consumers.dead_letters import find_dead_letters, letter_place, list_dead_letters, replay
    from millstream.producers.log.port import closing

    settings = open_settings()
    if bool(places) == everything or ((reason or role) and not everything):
        raise ConfigError("name places, or all of them by --all, with --reason or --role if you like")

    async def work(log: "Log") -> int:
        if everything:
            found = [
                (letter_place(record), letter)
                for record, letter in await list_dead_letters(log, settings.topics, reason, role)
            ]
        else:
            named = places or []
            found = list(zip(named, await find_dead_letters(log, settings.topics, named), strict=True))
        failed = 0
        async with closing(log.producer()) as producer:
            for place, letter in found:
                try:
                    typer.echo(f"{place}: {await replay(producer, settings, letter)}")
                except (ConfigError, CodecError, TooLarge) as error:
                    if not everything:
                        raise
                    failed += 1
                    typer.echo(f"{place}: not replayed: {error}", err=True)
        if everything:
            typer.echo(f"{len(found) - failed} of {len(found)} replayed")
        return failed

    if with_log(settings, work):
        raise typer.Exit(1)
