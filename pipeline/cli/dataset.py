"""``millstream dataset``: the log's triplets as data sets for other ways of learning."""

import json
import sys
from collections.abc import Callable, Iterable, Iterator
from dataclasses import replace
from typing import Annotated, Any

import typer

from millstream.consumers.log.port import Log
from millstream.consumers.log.read_to_end import read_to_end
from millstream.pipeline.cli.open import with_log
from millstream.pipeline.training import datasets
from millstream.producers.blob_store import Blobs
from millstream.schemas.config.settings import load_settings
from millstream.schemas.wire import codec
from millstream.schemas.wire.log import Partition
from millstream.schemas.wire.prefixes import expand
from millstream.schemas.wire.records import Triplet
from millstream.schemas.wire.topics import Topics

app = typer.Typer(no_args_is_help=True, help="Triplets as data sets, written to standard output.")

Experiment = Annotated[str | None, typer.Option(help="Of this experiment only.")]
Mode = Annotated[str, typer.Option(help="train, val or test.")]


@app.command("messages", epilog="Example: millstream dataset messages --min-reward 0.9 > sft.jsonl")
def dataset_messages(
    experiment: Experiment = None,
    mode: Mode = "train",
    min_reward: Annotated[float | None, typer.Option(help="Calls that earned at least this.")] = None,
) -> None:
    """Write OpenAI's fine-tuning format, with tools: one line a call."""
    _write(experiment, mode, lambda rollouts: map(_line, datasets.messages(rollouts, min_reward)))


@app.command("preferences", epilog="Example: millstream dataset preferences --experiment run1 > dpo.jsonl")
def dataset_preferences(experiment: Experiment = None, mode: Mode = "train") -> None:
    """Write OpenAI's preference format: the best and the worst answer to each prompt of a group."""
    _write(experiment, mode, lambda rollouts: map(_line, datasets.preferences(rollouts)))


@app.command("text", epilog="Example: millstream dataset text --experiment run1 > dialogues.md")
def dataset_text(experiment: Experiment = None, mode: Mode = "train") -> None:
    """Write each rollout as a dialogue with its rewards."""
    _write(experiment, mode, lambda rollouts: (text + "\n\n" for text in datasets.texts(rollouts)))


async def read_rollouts(log: Log, topics: Topics, experiment: str | None, mode: str) -> list[list[Triplet]]:
    """The rollouts whose triplets the log still holds, each whole."""
    found: dict[str, list[Triplet]] = {}
    partitions = [Partition(topics.triplets, number) for number in range(topics.partitions)]
    async for record in read_to_end(log, partitions):
        value = codec.decode(record.value)
        if isinstance(value, Triplet) and value.mode == mode and experiment in (None, value.experiment_id):
            found.setdefault(value.rollout_id, []).append(value)
    return [expand(triplets) for triplets in found.values()]


def whole(triplet: Triplet, blobs: Blobs) -> Triplet:
    """With its long contents in place of their references. Raises `BlobError`."""
    tools = None if triplet.tools is None else blobs.whole(triplet.tools)
    return replace(triplet, prompt=blobs.whole(triplet.prompt), response=blobs.whole(triplet.response), tools=tools)


def _line(example: dict[str, Any]) -> str:
    return json.dumps(example, ensure_ascii=False) + "\n"


def _write(experiment: str | None, mode: str, form: Callable[[Iterable[list[Triplet]]], Iterator[str]]) -> None:
    settings = load_settings()
    rollouts = with_log(settings, lambda log: read_rollouts(log, settings.topics, experiment, mode))
    blobs = Blobs(settings.blob_url)
    sys.stdout.writelines(form([whole(triplet, blobs) for triplet in rollout] for rollout in rollouts))
