"""The ``millstream`` command: each role as a process, and what people ask of a deployment."""

import asyncio
import gc
import logging
import os
import signal
import sys
from collections.abc import Awaitable, Callable, Coroutine
from contextlib import AsyncExitStack
from dataclasses import astuple, fields
from pathlib import Path
from typing import Annotated, Any
from urllib.parse import urlsplit

import typer
from rich.logging import RichHandler
from rich.markup import escape

from millstream.consumers.log.kafka_log import KafkaLog
from millstream.consumers.log.port import Log
from millstream.deploy.kafka.local import LocalKafka
from millstream.pipeline.cli.ask import app as ask_app
from millstream.pipeline.cli.control import app as control_app
from millstream.pipeline.cli.dataset import app as dataset_app
from millstream.pipeline.cli.dead_letters import app as dead_app
from millstream.pipeline.cli.explain import app as explain_app
from millstream.pipeline.cli.model import app as model_app
from millstream.pipeline.cli.open import with_log
from millstream.pipeline.cli.output import Json, err, out, print_rows
from millstream.pipeline.cli.replay import app as replay_app
from millstream.pipeline.cli.store import app as store_app
from millstream.pipeline.cli.workers import app as workers_app
from millstream.pipeline.services.health import Health, watched
from millstream.schemas import metrics
from millstream.schemas.config.settings import Settings, load_settings
from millstream.schemas.errors import ConfigError, Fenced, MillstreamError

app = typer.Typer(no_args_is_help=True, add_completion=False, help="Train AI agents over an event stream.")
topics_app = typer.Typer(no_args_is_help=True, help="The deployment's topics.")
kafka_app = typer.Typer(no_args_is_help=True, help="An Apache Kafka on this machine, for development.")
app.add_typer(topics_app, name="topics")
app.add_typer(kafka_app, name="kafka")
app.add_typer(dead_app, name="dead")
app.add_typer(explain_app, name="explain")
app.add_typer(dataset_app, name="dataset")
app.add_typer(model_app, name="model")
app.add_typer(store_app, name="store")
app.add_typer(ask_app)
app.add_typer(control_app)
app.add_typer(replay_app)
app.add_typer(workers_app)

EXIT_ERROR = 1
EXIT_FENCED = 3  # another process has this one's identity: the supervisor should start it again
EXIT_INTERRUPTED = 130

HealthPort = Annotated[int, typer.Option(min=0, help="Serves /livez, /readyz and /metrics; 0: nowhere.")]
DataDir = Annotated[Path, typer.Option(help="Where the broker keeps its data.")]
KAFKA_DIR = Path("runs/kafka")


def main() -> None:
    """Entry point: errors of ours are one line, not a traceback."""
    logging.basicConfig(
        level=logging.INFO, format="%(name)s: %(message)s", handlers=[RichHandler(console=err, show_path=False)]
    )
    for noisy in ("aiokafka", "httpx", "httpx2", "faststream", "urllib3.connectionpool", "clickhouse_connect"):
        logging.getLogger(noisy).setLevel(logging.ERROR)
    try:
        app()
    except Fenced as error:
        err.print("[red]fenced:[/red]", escape(str(error)), highlight=False)
        sys.exit(EXIT_FENCED)
    except MillstreamError as error:
        err.print("[red]error:[/red]", escape(str(error)), highlight=False)
        sys.exit(EXIT_ERROR)


# --- topics and tasks


@topics_app.command("create", epilog="Example: millstream topics create")
def topics_create(as_json: Json = False) -> None:
    """Create the topics that are missing."""
    settings = load_settings()
    asyncio.run(KafkaLog(settings).create_topics())
    print_rows(
        ["topic", "partitions", "cleanup", "key"],
        [[t.name, t.partitions, t.cleanup, t.key] for t in settings.topics.all],
        as_json,
    )


@app.command(epilog="Example: millstream publish tasks.jsonl --group-size 8 --priority high")
def publish(
    file: Annotated[Path, typer.Argument(help='One JSON object a line: {"input": …, "mode": …, "metadata": …}.')],
    group_size: Annotated[int, typer.Option(min=1, help="Rollouts of each line, in one group.")] = 1,
    priority: Annotated[str, typer.Option(help="high, normal or low.")] = "normal",
    experiment: Annotated[str, typer.Option(help="The experiment they belong to.")] = "",
    skip_bad: Annotated[bool, typer.Option(help="Publish the good lines although others are bad.")] = False,
    as_json: Json = False,
) -> None:
    """Publish the tasks of a file; without --skip-bad all of them or none."""
    from millstream.producers.log.port import closing
    from millstream.producers.tasks import TaskPublisher, read_tasks

    settings = load_settings()
    tasks, bad = read_tasks(
        file, settings, group_size=group_size, priority=priority, experiment_id=experiment, skip_bad=skip_bad
    )
    for problem in bad:
        err.print(f"skipped: {problem}", highlight=False)

    async def work(log: Log) -> None:
        async with closing(log.producer()) as producer:
            await TaskPublisher(producer, settings.topics).publish(tasks)

    with_log(settings, work)
    print_rows(["rollout_id", "group_id"], [[t.rollout_id, t.group_id] for t in tasks], as_json, limit=20)


# --- roles


@app.command(epilog="Example: millstream runner examples.calculator.agent:agent --processes 2 --concurrency 8")
def runner(
    agent: Annotated[str, typer.Argument(help="module:attribute of the agent, found from the current folder.")],
    processes: Annotated[int | None, typer.Option(min=0, help="Agent processes; 0: threads of this one.")] = None,
    concurrency: Annotated[int | None, typer.Option(min=1, help="Attempts at a time in each process.")] = None,
    env: Annotated[list[str] | None, typer.Option(help="Variable that agents may see; repeat it.")] = None,
    drain_s: Annotated[float, typer.Option(min=0, help="Seconds that running attempts get at the end.")] = 30.0,
    hook: Annotated[list[str] | None, typer.Option(help="module:attribute of a hook; repeat it.")] = None,
    instrument: Annotated[
        str | None,
        typer.Option(help="Frameworks to trace: openai,langchain …, or none; else all installed."),
    ] = None,
    memory_limit: Annotated[int | None, typer.Option(min=1, help="MiB that an agent process may hold.")] = None,
    max_attempts_per_process: Annotated[int | None, typer.Option(min=1, help="Then it is replaced.")] = None,
    health_port: HealthPort = 0,
) -> None:
    """Claim tasks and run an agent on them."""
    from millstream.consumers.runner.runner import Runner

    settings = load_settings(runner_processes=processes, runner_concurrency=concurrency)

    async def work(log: Log, health: Health, stop: asyncio.Event) -> None:
        role = Runner(
            log,
            settings,
            agent,
            env=env or (),
            drain_s=drain_s,
            memory_limit=memory_limit,
            max_attempts_per_process=max_attempts_per_process,
            hooks=hook or (),
            instrument=instrument,
        )
        health.export(metrics.SLOTS, lambda: role.load()[0])
        health.export(metrics.RUNNING, lambda: role.load()[1])
        health.export(metrics.HEARTBEAT_AGE, lambda: role.silent_s)
        health.check(metrics.STARVING, lambda: role.starving_s)
        health.registry.register(role)
        await role.run(stop)

    _run_role(settings, "runner", health_port, work)


@app.command(epilog="Example: millstream adapter --replica 0")
def adapter(
    replica: Annotated[
        str, typer.Option(help="Stable name of this replica; two with the same name fence each other.")
    ] = "0",
    function: Annotated[str, typer.Option("--adapter", help="module:attribute of your own Trace → triplets.")] = "",
    health_port: HealthPort = 0,
) -> None:
    """Settle rollouts: turn their spans into triplets and end each exactly once."""
    from millstream.consumers.adapter.adapter import LOST_CALL_S, Adapter
    from millstream.consumers.adapter.triplets import TripletMaker
    from millstream.schemas.import_path import load_object

    settings = load_settings()
    maker = TripletMaker(settings.triplets)
    chosen = load_object("adapter", function, str(Path.cwd())) if function else maker

    async def work(log: Log, health: Health, stop: asyncio.Event) -> None:
        topics = settings.topics
        transactional_id = f"{topics.prefix}.adapter.{replica}"
        role = Adapter(log, topics, transactional_id=transactional_id, to_triplets=chosen)
        health.check(metrics.TRANSACTION_AGE, lambda: role.call_s, LOST_CALL_S)
        if chosen is maker:
            health.export(metrics.CALLS_DROPPED, lambda: maker.calls_dropped)
            health.export(metrics.REWARDS_LEFT_OUT, lambda: maker.rewards_left_out)
        await role.run(stop)

    _run_role(settings, "adapter", health_port, work)


@app.command(epilog="Example: MILLSTREAM_CLICKHOUSE_DSN=chdb://runs/store millstream sink --flush-ms 500")
def sink(
    kind: Annotated[
        str, typer.Option("--sink", help="clickhouse, parquet, otlp, or module:attribute of your own; see ms.Sink.")
    ] = "clickhouse",
    name: Annotated[str | None, typer.Option(help="Sinks of one name share the records; else by --sink.")] = None,
    flush_rows: Annotated[int | None, typer.Option(min=1, help="Records that are stored at once.")] = None,
    flush_bytes: Annotated[int, typer.Option(min=1, help="Bytes that are stored at once.")] = 32 << 20,
    flush_ms: Annotated[int, typer.Option(min=1, help="How old a record gets before it is stored.")] = 1000,
    health_port: HealthPort = 0,
) -> None:
    """Write everything that happens to ClickHouse, to files, to a tracing back end, or to a sink of your own."""
    from millstream.consumers.sink.sink import FlushPolicy, SinkRole
    from millstream.pipeline.store.choose_sink import open_sink, sink_name

    settings = load_settings(span_batch_size=flush_rows)
    group = sink_name(kind) if name is None else name
    policy = FlushPolicy(settings.span_batch_size, flush_bytes, flush_ms / 1000)

    async def work(log: Log, health: Health, stop: asyncio.Event) -> None:
        opened = open_sink(kind, settings)
        try:
            role = SinkRole(log, opened, settings, name=group, flush=policy)
            health.trouble = lambda: role.trouble
            health.export(metrics.SINK_OUTAGE, lambda: role.outage_s)
            health.export(metrics.SINK_WAITING, lambda: role.waiting)
            health.export(metrics.SINK_STORED, lambda: role.stats.records)
            health.export(metrics.SINK_RETRIES, lambda: role.stats.retries)
            health.export(metrics.SINK_DEAD, lambda: role.stats.dead_letters)
            await role.run(stop)
        finally:
            opened.close()

    _run_role(settings, "sink", health_port, work)


@app.command(epilog="Example: MILLSTREAM_MODEL_URL=http://127.0.0.1:8500 millstream proxy")
def proxy(
    listen: Annotated[str, typer.Option(help="Where to listen; else at the first of proxy_url.")] = "",
    admin: Annotated[str, typer.Option(help="Where the admin endpoint listens, http://HOST:PORT.")] = "",
    drain_s: Annotated[float, typer.Option(min=0, help="Seconds that calls under way get at the end.")] = 60.0,
    health_port: HealthPort = 0,
) -> None:
    """Stand between agents and the model servers, and record every call."""
    import uvloop

    from millstream.pipeline.proxy import Proxy
    from millstream.pipeline.proxy.app import check_open
    from millstream.pipeline.services.serve_aiohttp import serve

    settings = load_settings()

    url = listen or next(iter(settings.proxy_urls), "http://127.0.0.1:8400")
    check_open(settings, urlsplit(url).hostname or "", urlsplit(admin).hostname or "")

    async def work(log: Log, health: Health, stop: asyncio.Event) -> None:
        front = Proxy(log, settings)
        health.export(metrics.CALLS_IN_FLIGHT, lambda: front.in_flight)
        health.export(metrics.CALLS_UNRECORDED, lambda: front.unrecorded)
        async with AsyncExitStack() as stack:
            await stack.enter_async_context(serve(front.app, url, shutdown_s=drain_s, reuse_port=True))
            if admin:
                await stack.enter_async_context(serve(front.admin(), admin))
            await stop.wait()

    _run_role(settings, "proxy", health_port, work, uvloop.run)


@model_app.command(
    epilog="Example: millstream model serve runs/model --name policy --adapters 4 --arg=--dtype=bfloat16"
)
def serve(
    folder: Annotated[Path, typer.Argument(help="Hugging Face folder, below weights_root.")],
    name: Annotated[str, typer.Option(help="The name that agents ask for.")] = "policy",
    version: Annotated[str, typer.Option(help="run.epoch.step of what the folder holds.")] = "base.0.0",
    upstream: Annotated[str, typer.Option(help="Its name in the proxies' settings: [upstreams.NAME].")] = "policy",
    replicas: Annotated[int, typer.Option(min=1, help="vLLM processes; one at a time gets new weights.")] = 1,
    port: Annotated[int, typer.Option(min=1, help="Of the first replica, on loopback; the others follow.")] = 8500,
    adapters: Annotated[int, typer.Option(min=0, help="LoRA adapters of a batch, at most; 0: none.")] = 0,
    arg: Annotated[
        list[str] | None, typer.Option(help="A switch of vLLM, as --arg=--dtype=float32; repeat it.")
    ] = None,
    log_dir: Annotated[Path, typer.Option(help="Where vLLM's output goes.")] = Path("runs/vllm"),
    health_port: HealthPort = 0,
) -> None:
    """Serve a model with vLLM, and do what `millstream model` asks. Needs `make vllm`, or vLLM on GPUs."""
    from millstream.pipeline.models.role import ModelRole
    from millstream.pipeline.models.vllm_process import VllmOptions
    from millstream.pipeline.models.vllm_server import VllmServer

    settings = load_settings()
    options = VllmOptions(names=(name,), args=tuple(arg or ()), adapters=adapters, replicas=replicas)
    server = VllmServer(folder, options, settings, log_dir, version=version, port=port)

    async def work(log: Log, health: Health, stop: asyncio.Event) -> None:
        health.trouble = lambda: None if all(r.alive for r in server.replicas) else "a vLLM process is down"
        await ModelRole(log, settings.topics, server, name, upstream).run(stop)

    _run_role(settings, "model", health_port, work)


@app.command(epilog="Example: millstream gateway --port 8600")
def gateway(
    host: Annotated[str, typer.Option(help="Where to listen; not on loopback it needs gateway_token.")] = "127.0.0.1",
    port: Annotated[int, typer.Option(help="0: any free one.")] = 8600,
) -> None:
    """Serve HTTP: publish, cancel, pause, status of rollouts, OTLP, a page that describes the topics."""
    from millstream.pipeline.services.gateway import serve_gateway

    asyncio.run(serve_gateway(load_settings(), host, port))


@app.command(epilog="Example: millstream train examples/calculator/train.toml")
def train(
    config: Annotated[Path, typer.Argument(help="TOML file; see examples/calculator/train.toml.")],
    health_port: HealthPort = 0,
    as_json: Json = False,
) -> None:
    """Train as a file says; live view, then a summary. Needs the `train` extra."""
    from millstream.pipeline.training.config import train_from

    summary = train_from(config, err if as_json else out, health_port=health_port)
    values = summary.first_reward, summary.validation_reward, summary.rollouts, summary.rollouts_per_second
    columns = ["steps", "first_reward", "validation_reward", "rollouts", "rollouts_per_second", "seconds"]
    rounded = [value if value is None else round(value, 3) for value in (*values, summary.seconds)]
    print_rows(columns, [[len(summary.steps), *rounded]], as_json)


# --- local Kafka


@kafka_app.command("up", epilog="Example: millstream kafka up --port 9092")
def kafka_up(
    data_dir: DataDir = KAFKA_DIR,
    port: Annotated[int, typer.Option(help="0: any free one.")] = 9092,
    as_json: Json = False,
) -> None:
    """Start a broker in the background; needs Java 17 and, the first time, Maven."""
    kafka = LocalKafka(data_dir, port=port)
    kafka.up()
    _print_status(kafka, as_json)


@kafka_app.command("down", epilog="Example: millstream kafka down")
def kafka_down(data_dir: DataDir = KAFKA_DIR) -> None:
    """Stop the broker; its data stays."""
    LocalKafka(data_dir).down()


@kafka_app.command("status", epilog="Example: millstream kafka status --json")
def kafka_status(data_dir: DataDir = KAFKA_DIR, as_json: Json = False) -> None:
    """Say whether the broker runs, and where."""
    _print_status(LocalKafka(data_dir), as_json)


def _print_status(kafka: LocalKafka, as_json: bool) -> None:
    found = kafka.status()
    if found is None:
        raise ConfigError(f"no broker runs in {kafka.folder}; start one with: millstream kafka up")
    print_rows([field.name for field in fields(found)], [astuple(found)], as_json)


# --- shared


def _run_role(
    settings: Settings,
    role: str,
    health_port: int,
    work: Callable[[Log, Health, asyncio.Event], Awaitable[None]],
    run_loop: Callable[[Coroutine[Any, Any, None]], None] = asyncio.run,
) -> None:
    """Runs until SIGTERM or SIGINT, then lets the role end in good order. A second SIGINT ends it at once, which does
    no harm: whoever takes over finds everything in the log."""

    async def run() -> None:
        stop = asyncio.Event()

        def interrupt() -> None:
            if stop.is_set():
                os._exit(EXIT_INTERRUPTED)
            stop.set()

        asyncio.get_running_loop().add_signal_handler(signal.SIGTERM, stop.set)
        asyncio.get_running_loop().add_signal_handler(signal.SIGINT, interrupt)
        log = KafkaLog(settings)
        await log.check()
        async with watched(log, settings, role, health_port, stop, report=role != "runner") as health:
            await work(log, health, stop)

    # What is loaded by now stays: the collector, which takes up to a tenth of a busy role's time, need not look at it.
    gc.freeze()
    gc.set_threshold(20_000, 20, 50)
    run_loop(run())
