"""Commands about a model's versions: deploy, roll back, split, and their results. (`serve` is a role, in `roles`.)"""

from pathlib import Path
from typing import Annotated, Any

import typer

from millstream.pipeline.cli.open import open_settings, open_store, with_log
from millstream.pipeline.cli.output import Json, out, print_rows
from millstream.schemas.errors import ConfigError, MillstreamError

app = typer.Typer(no_args_is_help=True, help="A model's versions: deploy them, go back, split traffic among them.")

Model = Annotated[str, typer.Argument(help="The name that agents ask for.")]
WaitS = Annotated[float, typer.Option(min=0, help="Seconds to wait for the server's answer.")]


@app.command(epilog="Example: millstream model deploy policy runs/adapters/7 --version policy.0.7 --lora")
def deploy(
    model: Model,
    folder: Annotated[Path, typer.Argument(help="Safetensors, below weights_root; as the server sees it.")],
    version: Annotated[str, typer.Option(help="run.epoch.step")],
    lora: Annotated[bool, typer.Option(help="An adapter, served beside the model and other adapters.")] = False,
    wait_s: WaitS = 600.0,
) -> None:
    """Load a version; all rollouts use it once it has been checked, else nothing changes."""
    _ask(model, wait_s, action="deploy", version=version, folder=str(folder.absolute()), lora=lora)


@app.command(epilog="Example: millstream model export runs/calculator runs/exported --version calculator.0.42")
def export(
    run: Annotated[Path, typer.Argument(help="The run's folder (run_dir).")],
    target: Annotated[Path, typer.Argument(help="A new Hugging Face folder.")],
    version: Annotated[
        str, typer.Option(help="run.epoch.step, or the checkpoint's name, such as step-42. Default: the last one.")
    ] = "",
    base: Annotated[
        Path | None, typer.Option("--model", help="Its configuration and tokenizer. Default: the run's model.")
    ] = None,
) -> None:
    """Write a checkpoint as a Hugging Face folder, for transformers and vLLM."""
    from millstream.pipeline.training.reporting.export import export_checkpoint  # needs torch

    found = export_checkpoint(run, target, version, base)
    out.print(f"{target}: version {found}", highlight=False, markup=False, soft_wrap=True)


@app.command(epilog="Example: millstream model rollback policy --to policy.0.6")
def rollback(
    model: Model,
    to: Annotated[str, typer.Option(help="A kept version; the one before, if it is not given.")] = "",
    wait_s: WaitS = 600.0,
) -> None:
    """Go back to a kept version."""
    _ask(model, wait_s, action="rollback", version=to)


@app.command(epilog="Example: millstream model split policy policy.0.6=0.9 policy.0.7=0.1")
def split(
    model: Model,
    shares: Annotated[list[str], typer.Argument(help="VERSION=SHARE of each; a rollout stays with one.")],
    wait_s: WaitS = 600.0,
) -> None:
    """Share the rollouts among kept versions."""
    _ask(model, wait_s, action="split", shares=shares_of(shares, "policy.0.7=0.1"))


def shares_of(texts: list[str], example: str) -> dict[str, float]:
    """Shares by version, from texts ``VERSION=SHARE``. Raises `ConfigError`."""
    found: dict[str, float] = {}
    for text in texts:
        version, _, share = text.rpartition("=")
        try:
            if not version:
                raise ValueError
            found[version] = float(share)
        except ValueError:
            raise ConfigError(f"{text!r} is not VERSION=SHARE, as {example}") from None
    return found


@app.command(epilog="Example: millstream model status --json")
def status(as_json: Json = False) -> None:
    """Show each model's versions with their shares, and the replicas that serve them."""
    from millstream.pipeline.models.commands import read_models

    settings = open_settings()
    control = with_log(settings, lambda log: read_models(log, settings.topics))
    table, rows = control.follower.routing, []
    for model, arms in table.models.items():
        for arm in arms:
            state = control.servers.get(arm.upstream)
            served = state is not None and (arm.version == state.version or arm.served_as in state.adapters)
            alive = [] if state is None else [replica["url"] for replica in state.replicas if replica["alive"]]
            count = 0 if state is None else len(state.replicas)
            loaded = "" if not served else f"{len(alive)} of {count}"
            rows.append([model, arm.version, arm.weight, arm.upstream, arm.served_as, loaded, arm.weights])
    if not as_json and table.table_id:
        out.print(f"table {table.table_id}: {table.reason}", highlight=False, markup=False)
    columns = ["model", "version", "share", "upstream", "served_as", "loaded_at", "weights"]
    print_rows(columns, rows, as_json, main=("model", "version", "share", "upstream", "loaded_at"))


@app.command(epilog="Example: millstream model compare policy")
def compare(model: Model, as_json: Json = False) -> None:
    """Compare a model's versions: mean reward of the rollouts that succeeded, with its 95 % confidence interval."""
    from millstream.pipeline.store.queries import COMPARE_VERSIONS

    with open_store(open_settings()) as store:
        result = store.sql(COMPARE_VERSIONS, {"model": model})
    print_rows(result.columns, result.rows, as_json)


def _ask(model: str, wait_s: float, **command: Any) -> None:
    """``command``: other fields of a `ModelCommand`."""
    from millstream.pipeline.models.commands import answered
    from millstream.schemas.control import ModelCommand
    from millstream.schemas.ids import new_id

    settings = open_settings()
    asked = ModelCommand(command_id=new_id(), model=model, **command)
    answer = with_log(settings, lambda log: answered(log, settings.topics, asked, wait_s))
    if answer.error:
        raise MillstreamError(answer.error)
    out.print(f"{asked.action} {model}: table {answer.table_id}", highlight=False)
