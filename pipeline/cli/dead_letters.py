"""Commands on dead letters, read from the log itself: list, show, replay."""

from collections.abc import Sequence
from dataclasses import asdict
from typing import Annotated, Any

import typer

from millstream.consumers.dead_letters import letter_key, read_dead_letters, replay
from millstream.consumers.log.port import Log
from millstream.pipeline.cli.open import with_log
from millstream.pipeline.cli.output import Json, print_rows
from millstream.producers.log.port import closing
from millstream.schemas.config.settings import load_settings
from millstream.schemas.errors import CodecError, ConfigError
from millstream.schemas.wire import codec
from millstream.schemas.wire.log import LogRecord
from millstream.schemas.wire.records import DeadLetter
from millstream.schemas.wire.topics import Topics

app = typer.Typer(no_args_is_help=True, help="Records that could not be used, and rollouts that failed.")

Place = Annotated[str, typer.Argument(help="partition:offset, as `millstream dead list` prints it.")]
COLUMNS = ("place", "role", "reason", "key", "from", "error")


@app.command("list", epilog="Example: millstream dead list --reason lost_attempts_exhausted")
def dead_list(
    reason: Annotated[str | None, typer.Option(help="Only these: undecodable, attempts_exhausted, …")] = None,
    role: Annotated[str | None, typer.Option(help="Only what this role refused: runner, adapter, sink.")] = None,
    as_json: Json = False,
) -> None:
    """List dead letters, oldest first in each partition."""
    settings = load_settings()
    print_rows(COLUMNS, with_log(settings, lambda log: listed(log, settings.topics, reason, role)), as_json)


@app.command("show", epilog="Example: millstream dead show 0:17")
def dead_show(place: Place, as_json: Json = False) -> None:
    """Show a dead letter; its body decoded, if it can be."""
    settings = load_settings()
    (letter,) = with_log(settings, lambda log: find(log, settings.topics, [place]))
    fields = asdict(letter) | {"key": letter_key(letter), "value": _readable(letter.value)}
    fields["headers"] = {name: _readable(value) for name, value in letter.headers.items()}
    if as_json:
        print_rows(list(fields), [list(fields.values())], True)
    else:
        print_rows(["field", "value"], list(fields.items()), False)


@app.command("replay", epilog="Example: millstream dead replay 0:17 0:18")
def dead_replay(
    places: Annotated[list[str], typer.Argument(help="partition:offset of each, as `millstream dead list` prints it.")],
) -> None:
    """Send records again; the task of a rollout that failed as a new rollout, with fresh budgets."""
    settings = load_settings()

    async def work(log: Log) -> None:
        letters = await find(log, settings.topics, places)
        async with closing(log.producer()) as producer:
            for place, letter in zip(places, letters, strict=True):
                typer.echo(f"{place}: {await replay(producer, settings.topics, letter)}")

    with_log(settings, work)


async def listed(log: Log, topics: Topics, reason: str | None, role: str | None) -> list[list[str]]:
    """A row of `COLUMNS` for each dead letter."""
    return [
        [
            _place(record),
            letter.role,
            letter.reason,
            letter_key(letter) or "",
            f"{letter.topic}[{letter.partition}]@{letter.offset}",
            letter.error,
        ]
        async for record, letter in read_dead_letters(log, topics)
        if reason in (None, letter.reason) and role in (None, letter.role)
    ]


async def find(log: Log, topics: Topics, places: Sequence[str]) -> list[DeadLetter]:
    """The dead letters at these places of the topic. Raises `ConfigError` naming those that are not there."""
    found = {
        _place(record): letter async for record, letter in read_dead_letters(log, topics) if _place(record) in places
    }
    if missing := [place for place in places if place not in found]:
        raise ConfigError(f"no dead letter at {', '.join(missing)}; see `millstream dead list` (partition:offset)")
    return [found[place] for place in places]


def _place(record: LogRecord) -> str:
    return f"{record.partition.number}:{record.offset}"


def _readable(body: bytes | None) -> Any:
    """A record's fields; of what is none, its text."""
    if body is None:
        return None
    try:
        fields = asdict(codec.decode(body))
    except CodecError:
        return body.decode(errors="backslashreplace")
    return {n: v.decode(errors="backslashreplace") if isinstance(v, bytes) else v for n, v in fields.items()}
