"""``millstream init``: a folder to start from, with an agent, tasks, and settings for this machine."""

from importlib.resources import files
from pathlib import Path
from secrets import token_hex
from typing import Annotated, Final

import typer

from millstream.pipeline.cli.output import say
from millstream.schemas.errors import ConfigError
from millstream.schemas.folders import make_folder, write_private

app = typer.Typer()

TEMPLATES: Final = ("agent.py", "tasks.jsonl", "train.toml")  # agent.py.txt: it imports the facade, as no module does
SETTINGS: Final = "millstream.toml"


@app.command(epilog="Example: millstream init my-agent")
def init(folder: Annotated[Path, typer.Argument(help="A new folder, or one without these files.")] = Path()) -> None:
    """Write a project to start from: agent.py, tasks.jsonl, train.toml and millstream.toml."""
    taken = [name for name in (*TEMPLATES, SETTINGS) if (folder / name).exists()]
    if taken:
        raise ConfigError(f"{folder / taken[0]} exists: choose another folder, nothing was written")
    make_folder(folder, "FOLDER")
    template = files("millstream.pipeline.cli.setup").joinpath("template")
    for name in TEMPLATES:
        (folder / name).write_bytes(template.joinpath(f"{name}.txt" if name.endswith(".py") else name).read_bytes())
    text = template.joinpath(SETTINGS).read_text("utf-8")
    write_private(folder / SETTINGS, text.replace("SECRET", token_hex(32)))
    said = f"cd {folder}, then " if folder != Path() else ""
    say(f"wrote {', '.join((*TEMPLATES, SETTINGS))} in {folder}; next: {said}`millstream up agent:agent`")
