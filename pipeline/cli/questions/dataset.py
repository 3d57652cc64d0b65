"""``millstream dataset``: writes the log's triplets as data sets for other training methods."""

import sys
from collections.abc import Callable, Iterable, Iterator
from contextlib import nullcontext
from typing import TYPE_CHECKING, Annotated, Any

import typer

from millstream.pipeline.cli.open import open_settings, with_log
from millstream.pipeline.cli.output import Mode, err, working
from millstream.schemas.spans.text import json_text

if TYPE_CHECKING:
    from millstream.consumers.log.port import Log
    from millstream.schemas.wire.records import Triplet

app = typer.Typer(no_args_is_help=True, help="Triplets as data sets, written to standard output.")

Experiment = Annotated[str | None, typer.Option(help="Only of this experiment: its id, or the name of its run.")]
OfMode = Annotated[Mode, typer.Option("--mode", help="Only of this mode.")]


@app.command("messages", epilog="Example: millstream dataset messages --min-reward 0.9 > sft.jsonl")
def dataset_messages(
    experiment: Experiment = None,
    mode: OfMode = "train",
    min_reward: Annotated[float | None, typer.Option(help="Calls that earned at least this.")] = None,
    best_of_group: Annotated[
        int, typer.Option(min=0, help="Of each group so many rollouts, which earned the most; 0: all.")
    ] = 0,
    merge_turns: Annotated[
        bool, typer.Option("--merge-turns", help="One line a conversation, for trainers that learn every answer in it.")
    ] = False,
    object_arguments: Annotated[
        bool, typer.Option("--object-arguments", help="Arguments of tool calls as objects, not as text: for TRL.")
    ] = False,
) -> None:
    """Write OpenAI's fine-tuning format, with tools: one line a call. `type = "sft"` chooses alike."""
    from millstream.pipeline.training import datasets

    choice = datasets.Choice(min_reward, best_of_group)

    def form(rollouts: "Iterable[list[Triplet]]") -> Iterator[str]:
        examples = datasets.messages(rollouts, choice, merge_turns)
        return map(_line, map(datasets.with_object_arguments, examples) if object_arguments else examples)

    _write(experiment, mode, form)


@app.command("preferences", epilog="Example: millstream dataset preferences --experiment run1 > dpo.jsonl")
def dataset_preferences(
    experiment: Experiment = None,
    mode: OfMode = "train",
    margin: Annotated[float, typer.Option(min=0, help="Rewards of a pair differ by more than this.")] = 0.0,
    every: Annotated[bool, typer.Option("--all-pairs", help="Every two answers, not the best and the worst.")] = False,
) -> None:
    """Write OpenAI's preference format: pairs of answers to a prompt of a group. `type = "dpo"` chooses alike."""
    from millstream.pipeline.training import datasets

    choice = datasets.PairChoice(margin, every)
    _write(experiment, mode, lambda rollouts: map(_line, datasets.preferences(rollouts, choice)))


@app.command("text", epilog="Example: millstream dataset text --experiment run1 > dialogues.md")
def dataset_text(experiment: Experiment = None, mode: OfMode = "train") -> None:
    """Write each rollout as a dialogue with its rewards."""
    from millstream.pipeline.training import datasets

    _write(experiment, mode, lambda rollouts: (text + "\n\n" for text in datasets.texts(rollouts)))


def _line(example: dict[str, Any]) -> str:
    return json_text(example) + "\n"


def _write(experiment: str | None, mode: str, form: "Callable[[Iterable[list[Triplet]]], Iterator[str]]") -> None:
    from millstream.consumers.control import find_experiment
    from millstream.pipeline.training import datasets
    from millstream.producers.blob_store import Blobs

    settings = open_settings()

    async def read(log: "Log") -> "list[list[Triplet]]":
        found = None if experiment is None else await find_experiment(log, settings.topics, experiment)
        return await datasets.read_rollouts(log, settings.topics, found, mode, progress=show)

    with working("reading the log", "records") as show:
        rollouts = with_log(settings, read)
    blobs = Blobs(settings.blob_url)
    written = 0
    shown = nullcontext(lambda *_: None) if sys.stdout.isatty() else working("writing", "examples")
    with shown as show:
        for text in form([datasets.with_contents(triplet, blobs) for triplet in rollout] for rollout in rollouts):
            sys.stdout.write(text)
            written += 1
            show(written, None)
    if not written:
        searched = f"experiment {experiment}, mode {mode}" if experiment else f"mode {mode}, of any experiment"
        err.print(f"nothing was written: {datasets.why_none(rollouts, searched)}", highlight=False, markup=False)
