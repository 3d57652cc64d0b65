"""``millstream config``: the settings of this folder and environment."""

import os
import sys
from typing import Annotated, Any

import typer

from millstream.pipeline.cli.open import open_settings
from millstream.pipeline.cli.output import Json, print_rows
from millstream.pipeline.cli.setup.reference import Page, page
from millstream.schemas.redaction import without_passwords
from millstream.schemas.spans.text import json_text

app = typer.Typer(no_args_is_help=True, help="The settings, and where each comes from.")


@app.command("show", epilog="Example: millstream config show --changed")
def config_show(
    changed: Annotated[bool, typer.Option("--changed", help="Only those that are set somewhere.")] = False,
    as_json: Json = False,
) -> None:
    """Show each setting with its value, where it comes from and what it means. Secrets are hidden."""
    from millstream.schemas.config.settings import Settings

    settings = open_settings()
    rows = [
        [name, value_of(getattr(settings, name)), source_of(name), field.description]
        for name, field in Settings.model_fields.items()
    ]
    shown = [row for row in rows if not changed or row[2] != "default"]
    print_rows(
        ["setting", "value", "from", "meaning"],
        shown,
        as_json,
        main=("setting", "value", "from"),
        texts=("meaning", "value"),
    )


@app.command("docs", epilog="Example: millstream config docs settings")
def config_docs(
    name: Annotated[Page, typer.Argument(help="Which page: settings, tasks, training-files, tables.")],
) -> None:
    """Print a reference page as Markdown: of all settings, fields of a task, training files, or tables of the store."""
    sys.stdout.write(page(name))


def value_of(value: Any) -> str:
    """As text; a secret as whether it is set."""
    from pydantic import BaseModel, SecretStr

    if isinstance(value, SecretStr):
        return "(hidden)" if value.get_secret_value() else ""
    if isinstance(value, BaseModel):
        return json_text(value.model_dump(mode="json", exclude_defaults=True))
    if isinstance(value, dict):
        return json_text(
            {
                name: each.model_dump(mode="json", exclude_defaults=True) if isinstance(each, BaseModel) else each
                for name, each in value.items()
            }
        )
    return without_passwords(str("" if value is None else value))


def source_of(name: str) -> str:
    """The variable or the file that sets it, or ``default``."""
    import tomllib

    from millstream.schemas.config.secret_files import SUFFIX
    from millstream.schemas.config.settings import ACCEPTED_NAMES, ENV_PREFIX, config_file

    names = [name, *(old for old, new in ACCEPTED_NAMES.items() if new == name)]
    names += [f"{each}{SUFFIX}" for each in names]
    for each in names:
        if (variable := ENV_PREFIX + each.upper()) in os.environ:
            return variable
    file = config_file()
    if file.is_file():
        given = tomllib.loads(file.read_text("utf-8"))
        if any(each in given for each in names):
            return str(file)
    return "default"
