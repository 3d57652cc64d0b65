"""The ``millstream`` command: its families of commands, and how errors end it.

A command imports its own family alone: importing all of them takes a second and more.
"""

import logging
import sys
from collections.abc import Sequence
from functools import cache
from importlib import import_module
from typing import Annotated, Any, Final

import typer
from typer.core import TyperCommand, TyperGroup
from typer.main import get_group

from millstream.pipeline.services.hidden_memory import hide_memory
from millstream.producers.log_lines import write_logs, writes_json
from millstream.schemas.errors import ConfigError, Fenced, MillstreamError
from millstream.schemas.redaction import without_passwords
from millstream.schemas.spans.text import utf8

logger = logging.getLogger(__name__)

# Command, or group of commands → its module, and how its own help begins. A group's module is ``MODULE:APP``.
COMMANDS: Final = {
    "up": ("setup.up", "Run an agent with all that it needs"),
    "init": ("setup.init", "Write a project to start from"),
    "runner": ("roles", "Claim tasks and run an agent on them."),
    "adapter": ("roles", "Settle rollouts: turn their spans into triplets, and end each rollout exactly once."),
    "sink": ("roles", "Write all records to ClickHouse, or to a sink of your own."),
    "proxy": ("roles", "Forward agents' calls to model servers, and record each call as a span."),
    "gateway": (
        "roles",
        "Serve HTTP: publish, cancel, pause, status of rollouts, OTLP spans",
    ),
    "autoscale": ("roles", "Run as many runners on this machine as there is work."),
    "ui": ("roles", "Show the deployment in a browser: rollouts, rewards, training, dead letters, SQL."),
    "train": ("training", "Train with a configuration file; show progress, then a summary."),
    "reproduce": ("training", "Train a second time as a record says, in a new folder."),
    "check": ("training", "Compare a run's checkpoints, positions in the log, steps in the store and served weights."),
    "publish": ("control", "Publish the tasks of a file: all or none"),
    "cancel": ("control", "Cancel rollouts that are queued, running, or published later."),
    "pause": ("control", "Stop claiming an experiment's tasks"),
    "resume": ("control", "Claim a paused experiment's tasks again."),
    "paused": ("control", "List paused experiments."),
    "top": ("questions.top", "Show the deployment, live: rollouts of the last ten minutes, workers, load"),
    "workers": ("questions.workers", "List running processes, their slots and their running attempts."),
    "lag": ("questions.workers", "Show waiting tasks and the load"),
    "rollouts": ("questions.ask", "List rollouts, newest first."),
    "rollout": ("questions.ask", "Show a rollout: its conversation with the model, tools and rewards, what it printed"),
    "spans": ("questions.ask", "Show a rollout's spans as a tree per attempt"),
    "triplets": ("questions.ask", "List triplets: the prompt, answer and reward of each model call."),
    "rewards": ("questions.ask", "Plot the reward by model version."),
    "diff": ("questions.ask", "Show where two rollouts of a group diverge"),
    "steps": ("questions.steps", "List the steps of a training run"),
    "sql": ("questions.sql", "Run a query on the store."),
    "export": ("questions.sql", "Write a table, or the result of a query, to a file."),
    "replay": ("replay", "Make triplets again from recorded events, with another adapter or reward function."),
    "kafka": ("setup.kafka:app", "An Apache Kafka on this machine, for development."),
    "topics": ("setup.kafka:topics_app", "The deployment's topics."),
    "config": ("setup.config:app", "The settings"),
    "dead": ("dead_letters:app", "Records that could not be used, and rollouts that failed."),
    "explain": ("replay:explain_app", "Explain what the adapter makes of a rollout."),
    "dataset": ("questions.dataset:app", "Triplets as data sets, written to standard output."),
    "experiments": ("questions.experiments:app", "Training runs: what they were started with"),
    "prompts": ("questions.prompts:app", "Prompts that were searched for"),
    "model": ("roles:model_app", "A model's versions: deploy them, go back, split traffic among them."),
}


@cache
def _family(place: str) -> TyperGroup:
    module, _, name = place.partition(":")
    return get_group(getattr(import_module(f"millstream.pipeline.cli.{module}"), name or "app"))


class Families(TyperGroup):
    """Imports the module of a command when the command is asked for. Lists and completes names without any import."""

    names_only = False

    def list_commands(self, ctx: Any) -> list[str]:
        return list(COMMANDS)

    def get_command(self, ctx: Any, cmd_name: str) -> Any:
        if cmd_name not in COMMANDS:
            return None
        place, summary = COMMANDS[cmd_name]
        if self.names_only:
            return TyperCommand(cmd_name, help=f"{summary.removesuffix('.')}.")
        found = _family(place)
        if ":" not in place:
            return found.commands[cmd_name]
        found.name = cmd_name
        return found

    def format_help(self, ctx: Any, formatter: Any) -> None:
        self.names_only = True
        try:
            super().format_help(ctx, formatter)
        finally:
            self.names_only = False

    def shell_complete(self, ctx: Any, incomplete: str) -> Any:
        self.names_only = True
        try:
            return super().shell_complete(ctx, incomplete)
        finally:
            self.names_only = False

    @property
    def commands(self) -> dict[str, Any]:
        return {name: self.get_command(None, name) for name in COMMANDS}

    @commands.setter
    def commands(self, given: object) -> None:
        """There are none but `COMMANDS`."""


app = typer.Typer(
    cls=Families,
    no_args_is_help=True,
    pretty_exceptions_enable=False,  # a stack goes into logs as it is
    help="Train AI agents over an event stream.",
)


def _version(wanted: bool) -> None:
    if wanted:
        from importlib.metadata import version as package_version

        typer.echo(f"millstream {package_version('millstream')}")
        raise typer.Exit


@app.callback()
def _options(
    version: Annotated[
        bool, typer.Option("--version", callback=_version, is_eager=True, help="Print the version.")
    ] = False,
) -> None:
    """Train AI agents over an event stream."""


def main() -> None:
    """Entry point. Millstream's own errors are printed as one line, without a traceback. The memory of the
    process, which holds the secrets, is hidden from other processes of its user."""
    hide_memory()
    write_logs()  # until the settings are known
    try:
        _refuse_undecodable(sys.argv[1:])
        app(prog_name="millstream")
    except MillstreamError as error:
        _report("fenced" if isinstance(error, Fenced) else "error", without_passwords(str(error)))
        sys.exit(error.exit_code)
    except OSError as error:
        if error.filename is None:
            raise
        _report("error", f"{error.filename}: {error.strerror}")
        sys.exit(ConfigError.exit_code)


def _report(word: str, message: str) -> None:
    if writes_json():
        logger.error("%s", message)
        return
    from rich.markup import escape

    from millstream.pipeline.cli.output import err

    err.print(f"[red]{word}:[/red]", escape(message), highlight=False, soft_wrap=True)


def _refuse_undecodable(arguments: Sequence[str]) -> None:
    """Raises `ConfigError` for an argument that is not text in the terminal's encoding: no record could hold it."""
    for argument in arguments:
        if utf8(argument) != argument:
            raise ConfigError(f"the argument {argument!a} is not valid {sys.getfilesystemencoding()} text")
