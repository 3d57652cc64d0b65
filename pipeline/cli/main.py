"""The ``millstream`` command: its families of commands, and how errors end it."""

import logging
import sys
from collections.abc import Sequence

import typer
from rich.markup import escape

from millstream.pipeline.cli import control, dead_letters, kafka, model, replay, roles, training, workers
from millstream.pipeline.cli.output import err
from millstream.pipeline.cli.questions import ask, dataset, experiments, sql, steps
from millstream.pipeline.services.hidden_memory import hide_memory
from millstream.producers.log_lines import write_logs, writes_json
from millstream.schemas.errors import ConfigError, Fenced, MillstreamError
from millstream.schemas.redaction import without_passwords
from millstream.schemas.spans.text import utf8

logger = logging.getLogger(__name__)

app = typer.Typer(no_args_is_help=True, add_completion=False, help="Train AI agents over an event stream.")
app.add_typer(roles.app)
app.add_typer(training.app)
app.add_typer(control.app)
app.add_typer(workers.app)
app.add_typer(ask.app)
app.add_typer(steps.app)
app.add_typer(sql.app)
app.add_typer(replay.app)
app.add_typer(kafka.app, name="kafka")
app.add_typer(kafka.topics_app, name="topics")
app.add_typer(dead_letters.app, name="dead")
app.add_typer(replay.explain_app, name="explain")
app.add_typer(dataset.app, name="dataset")
app.add_typer(experiments.app, name="experiments")
app.add_typer(model.app, name="model")


def main() -> None:
    """Entry point. Millstream's own errors are printed as one line, without a traceback. The memory of the
    process, which holds the secrets, is hidden from other processes of its user."""
    hide_memory()
    write_logs()  # until the settings are known
    try:
        _refuse_undecodable(sys.argv[1:])
        app()
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
    else:
        err.print(f"[red]{word}:[/red]", escape(message), highlight=False, soft_wrap=True)


def _refuse_undecodable(arguments: Sequence[str]) -> None:
    """Raises `ConfigError` for an argument that is not text in the terminal's encoding: no record could hold it."""
    for argument in arguments:
        if utf8(argument) != argument:
            raise ConfigError(f"the argument {argument!a} is not valid {sys.getfilesystemencoding()} text")
