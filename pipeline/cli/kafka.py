"""Commands for the broker: a local one for development, and the topics of a deployment."""

import asyncio
from dataclasses import astuple, fields
from pathlib import Path
from typing import Annotated

import typer

from millstream.consumers.log.kafka_log import KafkaLog
from millstream.deploy.kafka.local import LocalKafka
from millstream.pipeline.cli.open import open_settings
from millstream.pipeline.cli.output import MAX_PORT, Json, print_rows
from millstream.schemas.errors import LogUnavailable

app = typer.Typer(no_args_is_help=True, help="An Apache Kafka on this machine, for development.")
topics_app = typer.Typer(no_args_is_help=True, help="The deployment's topics.")

DataDir = Annotated[Path, typer.Option(help="Folder of the broker's data.")]
KAFKA_DIR = Path("runs/kafka")


@app.command("up", epilog="Example: millstream kafka up --port 9092")
def kafka_up(
    data_dir: DataDir = KAFKA_DIR,
    port: Annotated[int, typer.Option(min=0, max=MAX_PORT, help="Port of the broker; 0: any free one.")] = 9092,
    as_json: Json = False,
) -> None:
    """Start a broker in the background. Needs Java 17 and, the first time, Maven."""
    kafka = LocalKafka(data_dir, port=port)
    kafka.up()
    _print_status(kafka, as_json)


@app.command("down", epilog="Example: millstream kafka down")
def kafka_down(data_dir: DataDir = KAFKA_DIR) -> None:
    """Stop the broker and keep its data."""
    LocalKafka(data_dir).down()


@app.command("status", epilog="Example: millstream kafka status --json")
def kafka_status(data_dir: DataDir = KAFKA_DIR, as_json: Json = False) -> None:
    """Show whether the broker runs, and its address."""
    _print_status(LocalKafka(data_dir), as_json)


def _print_status(kafka: LocalKafka, as_json: bool) -> None:
    found = kafka.status()
    if found is None:
        raise LogUnavailable(f"no broker runs in {kafka.folder}; start one with: millstream kafka up")
    print_rows([field.name for field in fields(found)], [astuple(found)], as_json)


@topics_app.command("create", epilog="Example: millstream topics create")
def topics_create(as_json: Json = False) -> None:
    """Create missing topics."""
    settings = open_settings()
    asyncio.run(KafkaLog(settings).create_topics())
    print_rows(
        ["topic", "partitions", "cleanup", "key"],
        [[t.name, t.partitions, t.cleanup, t.key] for t in settings.topics.all],
        as_json,
    )
