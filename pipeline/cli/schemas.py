"""``millstream schemas``: may this version of the records be released?"""

import json
from pathlib import Path
from typing import Annotated

import typer

from millstream.pipeline.cli.output import Json, out, print_rows
from millstream.schemas.errors import ConfigError
from millstream.schemas.evolution import check_evolution
from millstream.schemas.wire.codec import CODECS, load_schema

app = typer.Typer(no_args_is_help=True, help="The records' Avro schemas.")


@app.command("check", epilog="Example: millstream schemas check schemas/released")
def schemas_check(
    old_dir: Annotated[Path, typer.Argument(help="Folder of released .avsc files, one folder a version or flat.")],
    as_json: Json = False,
) -> None:
    """Check that this version's records and released ones can be read by each other; exit status 1 if not."""
    released = sorted(old_dir.rglob("*.avsc"))
    if not released:
        raise ConfigError(f"no .avsc files below {old_dir}")
    current = {t.__name__: load_schema(t.__name__) for t in CODECS}
    found: list[tuple[str, str, str, str]] = []
    for file in released:
        try:
            old = json.loads(file.read_text("utf-8"))
            name = old["name"]
        except (ValueError, KeyError, TypeError) as error:
            raise ConfigError(f"{file} is no Avro schema of a record: {type(error).__name__}: {error}") from error
        version = str(file.parent.relative_to(old_dir))
        if name not in current:
            found.append((version, name, "", "was released and is gone: its records could not be read any more"))
        else:
            found += [(version, f.schema, f.field, f.problem) for f in check_evolution(old, current[name])]
    if found or as_json:
        print_rows(("release", "schema", "field", "problem"), found, as_json)
    if found:
        raise typer.Exit(1)
    if not as_json:
        out.print(f"{len(released)} released schemas: every record of theirs and of ours can be read by the other")
