"""Commands for the broker: a local one for development, and the topics of a deployment."""

import time
from dataclasses import astuple, fields
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

from millstream.pipeline.cli.open import open_settings, with_log
from millstream.pipeline.cli.output import MAX_PORT, Json, note, print_rows, working
from millstream.schemas.errors import LogUnavailable

if TYPE_CHECKING:
    from millstream.consumers.log.port import Log
    from millstream.deploy.kafka.local import LocalKafka
    from millstream.schemas.config.settings import Settings

app = typer.Typer(no_args_is_help=True, help="An Apache Kafka on this machine, for development.")
topics_app = typer.Typer(no_args_is_help=True, help="The deployment's topics.")

DataDir = Annotated[Path, typer.Option(help="Folder of the broker's data.")]
KAFKA_DIR = Path("runs/kafka")
KAFKA_PORT = 9092
RETRY_S = 1.0


@app.command("up", epilog="Example: millstream kafka up --port 9092")
def kafka_up(
    data_dir: DataDir = KAFKA_DIR,
    port: Annotated[int, typer.Option(min=0, max=MAX_PORT, help="Port of the broker; 0: any free one.")] = KAFKA_PORT,
    as_json: Json = False,
) -> None:
    """Start a broker in the background, unless it runs. Needs Java 17 and, the first time, Maven."""
    kafka = _local(data_dir, port)
    with working("starting Kafka; the first time it is downloaded, which takes a minute or two"):
        kafka.up()
    _print_status(kafka, as_json)


@app.command("down", epilog="Example: millstream kafka down")
def kafka_down(data_dir: DataDir = KAFKA_DIR) -> None:
    """Stop the broker and keep its data."""
    with working("stopping Kafka"):
        stopped = _local(data_dir).down()
    if not stopped:
        note(f"no broker runs in {data_dir}")


@app.command("status", epilog="Example: millstream kafka status --json")
def kafka_status(data_dir: DataDir = KAFKA_DIR, as_json: Json = False) -> None:
    """Show whether the broker runs, and its address."""
    _print_status(_local(data_dir), as_json)


def _local(data_dir: Path, port: int = KAFKA_PORT) -> "LocalKafka":
    from millstream.deploy.kafka.local import LocalKafka  # slow to import

    return LocalKafka(data_dir, port=port)


def _print_status(kafka: "LocalKafka", as_json: bool) -> None:
    found = kafka.status()
    if found is None:
        raise LogUnavailable(f"no broker runs in {kafka.folder}; start one with: millstream kafka up")
    columns = [field.name for field in fields(found)]
    print_rows(columns, [astuple(found)], as_json, main=("pid", "bootstrap_servers", "folder"))


@topics_app.command("create", epilog="Example: millstream topics create --wait-s 60")
def topics_create(
    wait_s: Annotated[float, typer.Option(min=0, help="Seconds to wait for a broker that does not answer yet.")] = 0.0,
    as_json: Json = False,
) -> None:
    """Create missing topics."""
    import asyncio

    settings = open_settings()
    with working("creating topics"):
        asyncio.run(_create(settings, wait_s))
    print_rows(
        ["topic", "partitions", "cleanup", "key"],
        [[t.name, t.partitions, t.cleanup, t.key] for t in settings.topics.all],
        as_json,
    )


async def _create(settings: "Settings", wait_s: float) -> None:
    import asyncio

    from millstream.consumers.log.kafka_log import KafkaLog

    deadline = time.monotonic() + wait_s
    while True:
        try:
            return await KafkaLog(settings).create_topics()
        except LogUnavailable:
            if time.monotonic() >= deadline:
                raise
        await asyncio.sleep(RETRY_S)


@topics_app.command("list", epilog="Example: millstream topics list --json")
def topics_list(as_json: Json = False) -> None:
    """List the topics with how many records each holds; transaction markers count, too."""
    settings = open_settings()

    async def held(log: "Log") -> dict[str, int]:
        from millstream.schemas.wire.log import Partition

        consumer = log.consumer()
        try:
            every = [Partition(topic.name, n) for topic in settings.topics.all for n in range(topic.partitions)]
            await consumer.assign(every)
            first, ends = await consumer.beginning_offsets(every), await consumer.end_offsets(every)
        finally:
            await consumer.close()
        return {
            topic.name: sum(ends[each] - first[each] for each in every if each.topic == topic.name)
            for topic in settings.topics.all
        }

    records = with_log(settings, held)
    print_rows(
        ["topic", "partitions", "cleanup", "key", "records"],
        [[t.name, t.partitions, t.cleanup, t.key, records[t.name]] for t in settings.topics.all],
        as_json,
    )
