"""Commands that run a role of a deployment as a process, and wire its parts."""

import asyncio
import gc
import logging
import os
import signal
import sys
from collections.abc import Awaitable, Callable, Coroutine
from contextlib import ExitStack
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any
from urllib.parse import urlsplit

import typer

from millstream.pipeline.addresses import LOOPBACK
from millstream.pipeline.cli.model import app as model_app
from millstream.pipeline.cli.open import open_settings
from millstream.pipeline.cli.output import MAX_PORT, HealthPort
from millstream.producers.log_lines import write_logs, writes_logs
from millstream.schemas import metrics
from millstream.schemas.errors import ConfigError
from millstream.schemas.redaction import without_passwords
from millstream.schemas.spans import semconv

if TYPE_CHECKING:
    from millstream.consumers.log.port import Log
    from millstream.pipeline.services.health import Health
    from millstream.schemas.config.settings import Settings

app = typer.Typer()
logger = logging.getLogger(__name__)

EXIT_INTERRUPTED = 130


@app.command(epilog="Example: millstream runner examples.calculator.agent:agent --processes 2 --concurrency 8")
def runner(
    agent: Annotated[str, typer.Argument(help="module:attribute of the agent, relative to the current folder.")],
    processes: Annotated[int | None, typer.Option(min=0, help="Agent processes; 0: run agents in threads.")] = None,
    concurrency: Annotated[int | None, typer.Option(min=1, help="Concurrent attempts in each process.")] = None,
    env: Annotated[list[str] | None, typer.Option(help="Environment variable to pass to agents; repeatable.")] = None,
    drain_s: Annotated[float, typer.Option(min=0, help="Seconds for attempts to end after a signal.")] = 30.0,
    hook: Annotated[list[str] | None, typer.Option(help="module:attribute of a hook; repeatable.")] = None,
    instrument: Annotated[
        str | None, typer.Option(help="Frameworks to trace: openai,langchain … or none. Default: all installed.")
    ] = None,
    memory_limit: Annotated[int | None, typer.Option(min=1, help="Memory limit of an agent process in MiB.")] = None,
    max_attempts_per_process: Annotated[int | None, typer.Option(min=1, help="Then it is replaced.")] = None,
    agent_user: Annotated[
        str | None, typer.Option(help="User that agent processes run as; needs root. Default: the runner's own.")
    ] = None,
    health_port: HealthPort = 0,
) -> None:
    """Claim tasks and run an agent on them."""
    from millstream.consumers.runner.runner import Runner

    settings = open_settings(runner_processes=processes, runner_concurrency=concurrency)

    async def work(log: "Log", health: "Health", stop: asyncio.Event) -> None:
        role = Runner(
            log,
            settings,
            agent,
            env=env or (),
            drain_s=drain_s,
            memory_limit=memory_limit,
            max_attempts_per_process=max_attempts_per_process,
            agent_user=agent_user,
            hooks=hook or (),
            instrument=instrument,
            registry=health.registry,
        )
        health.export(metrics.SLOTS, lambda: role.load()[0])
        health.export(metrics.RUNNING, lambda: role.load()[1])
        health.export(metrics.HEARTBEAT_AGE, lambda: role.heartbeat_age_s)
        health.export(metrics.PROXY_AWAY, lambda: role.proxy_away_s)
        health.export(metrics.AGENT_CPU, lambda: None if (used := role.agents_usage()) is None else used.cpu_s)
        health.export(
            metrics.AGENT_MEMORY, lambda: None if (used := role.agents_usage()) is None else used.resident_bytes
        )
        health.export(metrics.MEMORY_LIMIT, lambda: None if memory_limit is None else memory_limit << 20)
        health.check(metrics.STARVING, lambda: role.starving_s)
        health.trouble = lambda: role.trouble
        health.registry.register(role)
        await role.run(stop)

    topics = settings.topics
    proxies = ", ".join(settings.proxy_urls) or "none"
    doing = (
        f"runs {agent}; reads {topics.prefix}.tasks.*, writes {topics.events}; model calls go to the proxy at {proxies}"
    )
    _run_role(settings, "runner", health_port, work, doing)


@app.command(epilog="Example: millstream adapter --replica 0")
def adapter(
    replica: Annotated[str, typer.Option(help="Name of this replica. Two with one name fence each other.")] = "0",
    function: Annotated[str, typer.Option("--adapter", help="module:attribute of a function, Trace → triplets.")] = "",
    health_port: HealthPort = 0,
) -> None:
    """Settle rollouts: turn their spans into triplets, and end each rollout exactly once."""
    from millstream.consumers.adapter.adapter import Adapter
    from millstream.consumers.adapter.triplets import TripletMaker
    from millstream.schemas.import_path import load_object

    settings = open_settings()
    maker = TripletMaker(settings.triplets)
    chosen = load_object("adapter", function, str(Path.cwd())) if function else maker

    async def work(log: "Log", health: "Health", stop: asyncio.Event) -> None:
        topics = settings.topics
        transactional_id = f"{topics.prefix}.adapter.{replica}"
        registry = health.registry
        role = Adapter(log, topics, transactional_id=transactional_id, to_triplets=chosen, registry=registry)
        health.check(metrics.TRANSACTION_AGE, lambda: role.call_age_s, role.policy.lost_call_s)
        health.export(metrics.OPEN_ROLLOUTS, lambda: role.open_rollouts)
        health.export(metrics.CONSUMER_LAG, lambda: {(f"{topics.prefix}.adapter",): role.lag_s})
        health.export(metrics.CONSUMER_LAG_RECORDS, lambda: {(f"{topics.prefix}.adapter",): role.lag_records})
        if chosen is maker:
            health.export(metrics.CALLS_DROPPED, lambda: maker.calls_dropped)
            health.export(metrics.REWARDS_LEFT_OUT, lambda: maker.rewards_left_out)
        await role.run(stop)

    topics = settings.topics
    doing = f"replica {replica}; reads {topics.events} as group {topics.prefix}.adapter, writes {topics.triplets}"
    _run_role(settings, "adapter", health_port, work, doing)


@app.command(epilog="Example: MILLSTREAM_CLICKHOUSE_DSN=chdb://runs/store millstream sink --flush-ms 500")
def sink(
    kind: Annotated[
        str, typer.Option("--sink", help="clickhouse, or module:attribute of your own (ms.Sink).")
    ] = "clickhouse",
    name: Annotated[str | None, typer.Option(help="Sinks with one name share the records. Default: by --sink.")] = None,
    flush_rows: Annotated[int | None, typer.Option(min=1, help="Maximum records of a batch.")] = None,
    flush_bytes: Annotated[int, typer.Option(min=1, help="Maximum bytes of a batch.")] = 32 << 20,
    flush_ms: Annotated[int, typer.Option(min=1, help="Maximum age of a record when it is stored.")] = 1000,
    query_port: Annotated[
        int,
        typer.Option(
            min=0, max=MAX_PORT, help="Serves an embedded store to readers, as ClickHouse does at 8123; 0: off."
        ),
    ] = 0,
    query_host: Annotated[
        str, typer.Option(help="Where it listens. Anything but loopback needs clickhouse_password.")
    ] = LOOPBACK,
    health_port: HealthPort = 0,
) -> None:
    """Write all records to ClickHouse, or to a sink of your own."""
    from millstream.consumers.sink.choose import open_sink, sink_name
    from millstream.consumers.sink.sink import FlushPolicy, SinkRole

    settings = open_settings(span_batch_size=flush_rows)
    group = sink_name(kind) if name is None else name
    policy = FlushPolicy(settings.span_batch_size, flush_bytes, flush_ms / 1000)

    async def work(log: "Log", health: "Health", stop: asyncio.Event) -> None:
        opened = open_sink(kind, settings)
        try:
            role = SinkRole(log, opened, settings, name=group, registry=health.registry, flush=policy)
            health.trouble = lambda: role.trouble
            health.export(metrics.SINK_OUTAGE, lambda: role.outage_s)
            health.export(metrics.SINK_WAITING, lambda: role.waiting)
            health.export(metrics.SINK_STORED, lambda: role.stats.records)
            health.export(metrics.SINK_RETRIES, lambda: role.stats.retries)
            health.export(metrics.CONSUMER_LAG, lambda: {(role.group,): role.lag_s})
            health.export(metrics.CONSUMER_LAG_RECORDS, lambda: {(role.group,): role.lag_records})
            with ExitStack() as stack:
                if query_port:
                    from millstream.pipeline.store.read_server import serving_queries

                    stack.enter_context(serving_queries(settings, query_host, query_port))
                await role.run(stop)
        finally:
            opened.close()

    into = without_passwords(settings.clickhouse_dsn) if kind == "clickhouse" else kind
    queries = f"; answers queries at http://{query_host}:{query_port}" * bool(query_port)
    doing = f"reads all topics of {settings.topics.prefix} as {group}, writes to {into}{queries}"
    _run_role(settings, "sink", health_port, work, doing)


@app.command(epilog="Example: MILLSTREAM_MODEL_URL=http://127.0.0.1:8500 millstream proxy")
def proxy(
    listen: Annotated[str, typer.Option(help="Address to listen at. Default: the first of proxy_url.")] = "",
    drain_s: Annotated[float, typer.Option(min=0, help="Seconds for running calls to end after a stop signal.")] = 60.0,
    reuse_port: Annotated[
        bool,
        typer.Option(
            "--reuse-port",
            help="Let a successor listen while this proxy's last calls end. Any process of this user may then, too.",
        ),
    ] = False,
    health_port: HealthPort = 0,
) -> None:
    """Forward agents' calls to model servers, and record each call as a span."""
    import uvloop

    from millstream.pipeline.proxy import Proxy
    from millstream.pipeline.proxy.app import check_open
    from millstream.pipeline.services.serve_aiohttp import serve

    settings = open_settings()

    url = listen or next(iter(settings.proxy_urls), "http://127.0.0.1:8400")
    check_open(settings, urlsplit(url).hostname or "")

    async def work(log: "Log", health: "Health", stop: asyncio.Event) -> None:
        front = Proxy(log, settings, registry=health.registry)
        health.export(metrics.SPANS, lambda: {(semconv.SOURCE_PROXY,): front.recorded})
        health.export(metrics.CALLS_IN_FLIGHT, lambda: front.in_flight)
        health.export(metrics.CALLS_UNRECORDED, lambda: front.unrecorded)
        async with serve(front.app, url, shutdown_s=drain_s, reuse_port=reuse_port):
            await stop.wait()

    models = ", ".join(settings.upstreams) or settings.model_url
    doing = f"listens at {url}; writes {settings.topics.events}; models: {models}"
    _run_role(settings, "proxy", health_port, work, doing, uvloop.run)


@model_app.command(
    epilog="Example: millstream model serve runs/model --name policy --adapters 4 --arg=--dtype=bfloat16"
)
def serve(
    folder: Annotated[Path, typer.Argument(help="Hugging Face model folder below weights_root.")],
    name: Annotated[str, typer.Option(help="Model name that agents request.")] = "policy",
    version: Annotated[str, typer.Option(help="Version of the weights in the folder: run.epoch.step.")] = "base.0.0",
    upstream: Annotated[str, typer.Option(help="NAME of [upstreams.NAME] in the proxies' settings.")] = "policy",
    replicas: Annotated[int, typer.Option(min=1, help="vLLM processes; they load weights in turn.")] = 1,
    gpus: Annotated[
        list[str] | None, typer.Option(help="GPUs of one replica: --gpus 0,1 --gpus 2,3; one for each replica.")
    ] = None,
    port: Annotated[
        int, typer.Option(min=1, max=MAX_PORT, help="Loopback port of the first replica; the next ones follow.")
    ] = 8500,
    adapters: Annotated[int, typer.Option(min=0, help="Maximum LoRA adapters in a batch; 0: off.")] = 0,
    arg: Annotated[list[str] | None, typer.Option(help="vLLM argument: --arg=--dtype=float32; repeatable.")] = None,
    log_dir: Annotated[Path, typer.Option(help="Folder for vLLM's logs.")] = Path("runs/vllm"),
    health_port: HealthPort = 0,
) -> None:
    """Serve a model with vLLM and carry out `millstream model` commands. Needs `make vllm`, or vLLM for GPUs."""
    from millstream.pipeline.models.role import ModelRole
    from millstream.pipeline.models.vllm_process import VllmOptions
    from millstream.pipeline.models.vllm_server import VllmServer

    settings = open_settings()
    options = VllmOptions(
        names=(name,), args=tuple(arg or ()), adapters=adapters, replicas=replicas, gpus=tuple(gpus or ())
    )
    server = VllmServer(folder, options, settings, log_dir, version=version, port=port)

    async def work(log: "Log", health: "Health", stop: asyncio.Event) -> None:
        health.trouble = lambda: None if all(r.alive for r in server.replicas) else "a vLLM process is down"
        await ModelRole(log, settings.topics, server, name, upstream).run(stop)

    ports = str(port) if replicas == 1 else f"{port}–{port + replicas - 1}"
    doing = f"serves {folder} as {name} at 127.0.0.1:{ports}; reads {settings.topics.control}"
    _run_role(settings, "model", health_port, work, doing)


@app.command(epilog="Example: millstream gateway --port 8600")
def gateway(
    host: Annotated[str, typer.Option(help="Address to listen at. Unless loopback, set gateway_token.")] = "127.0.0.1",
    port: Annotated[int, typer.Option(min=0, max=MAX_PORT, help="Port to listen at; 0: any free one.")] = 8600,
) -> None:
    """Serve HTTP: publish, cancel, pause, status of rollouts, OTLP spans, and the pages of `millstream ui`."""
    from millstream.pipeline.services.gateway import Gateway
    from millstream.pipeline.services.serve_asgi import listen, uvicorn_server
    from millstream.pipeline.ui.gate import check_open
    from millstream.producers.log.port import closing

    settings = open_settings()
    check_open(settings, host)
    listener = listen(host, port)

    async def work(log: "Log", health: "Health", stop: asyncio.Event) -> None:
        async with closing(log.producer()) as producer:
            role = Gateway(log, producer, settings, health)
            server = uvicorn_server(role.app)
            role.pages.ends = lambda: server.should_exit
            await server.serve([listener])  # until SIGTERM or SIGINT

    doing = "listens at http://{}:{}; reads and writes all topics".format(*listener.getsockname()[:2])
    _run_role(settings, "gateway", 0, work, doing)


@app.command(
    epilog="Example: millstream autoscale --min 1 --max 4 -- runner examples.calculator.agent:agent --concurrency 8"
)
def autoscale(
    command: Annotated[list[str], typer.Argument(help="After --, the command of a runner: runner AGENT …")],
    lowest: Annotated[int, typer.Option("--min", min=0, help="Runners that always run.")] = 1,
    highest: Annotated[int, typer.Option("--max", min=1, help="Runners that run at most.")] = 8,
    idle_s: Annotated[float, typer.Option(min=0, help="Seconds with less work before a runner is stopped.")] = 30.0,
    drain_s: Annotated[float, typer.Option(min=0, help="Seconds for attempts to end after a signal.")] = 30.0,
    health_port: Annotated[
        int, typer.Option(min=0, max=MAX_PORT, help="As of other roles; the runners have the next ones. 0: off.")
    ] = 0,
) -> None:
    """Run as many runners on this machine as there is work. Starts again what dies."""
    from millstream.pipeline.services.autoscale.autoscaler import AutoscalePolicy, Autoscaler
    from millstream.pipeline.services.autoscale.scaling import ScalePolicy

    settings = open_settings()
    if command[0] != "runner":
        raise ConfigError(f"autoscale runs runners, not {command[0]!r}: millstream autoscale --max 4 -- runner AGENT …")
    for option in ("--drain-s", "--health-port"):
        if any(argument.partition("=")[0] == option for argument in command):
            raise ConfigError(f"give {option} to autoscale, before the --: it decides for all its runners")
    if not lowest <= highest <= settings.kafka_partitions:
        raise ConfigError(
            f"--min {lowest}, --max {highest}: use --min ≤ --max ≤ kafka_partitions, {settings.kafka_partitions}; "
            "a runner without a partition gets no task"
        )
    started = [sys.executable, "-m", "millstream.pipeline", *command]

    async def work(log: "Log", health: "Health", stop: asyncio.Event) -> None:
        scale, policy = ScalePolicy(lowest, highest, idle_s), AutoscalePolicy(drain_s=drain_s)
        first_port = health_port + 1 if health_port else 0
        await Autoscaler(log, settings.topics, started, scale, policy, health_port=first_port).run(stop)

    doing = f"runs {lowest} to {highest} runners: {' '.join(command)}"
    _run_role(settings, "autoscale", health_port, work, doing)


def _described(settings: "Settings", role: str, doing: str, health_port: int) -> str:
    from importlib.metadata import version as package_version

    probes = f"; probes at http://{settings.health_host}:{health_port}" * bool(health_port)
    version = package_version("millstream")
    return f"the {role} of millstream {version}: {doing}{probes}; Kafka at {settings.kafka_bootstrap_servers}"


@app.command(epilog="Example: MILLSTREAM_CLICKHOUSE_DSN=clickhouse://127.0.0.1:8123 millstream ui")
def ui(
    host: Annotated[str, typer.Option(help="Address to listen at. Unless loopback, set gateway_token.")] = LOOPBACK,
    port: Annotated[int, typer.Option(min=0, max=MAX_PORT, help="Port to listen at; 0: any free one.")] = 8700,
) -> None:
    """Show the deployment in a browser: rollouts, rewards, training, dead letters, SQL."""
    from millstream.consumers.log.kafka_log import KafkaLog
    from millstream.pipeline.cli.output import note
    from millstream.pipeline.ui.serve import serving_pages
    from millstream.schemas.errors import LogUnavailable

    settings = open_settings()

    async def run() -> None:
        stop = asyncio.Event()
        for number in (signal.SIGTERM, signal.SIGINT):
            asyncio.get_running_loop().add_signal_handler(number, stop.set)
        kafka = KafkaLog(settings)
        log: Log | None = kafka
        try:
            await kafka.check()
        except LogUnavailable as error:
            note(f"the pages show the store alone, without actions: {error}")
            log = None
        with serving_pages(settings, log, host, port) as address:
            note(f"open {address}")
            await stop.wait()

    asyncio.run(run())


def _run_role(
    settings: "Settings",
    role: str,
    health_port: int,
    work: "Callable[[Log, Health, asyncio.Event], Awaitable[None]]",
    doing: str,
    run_loop: Callable[[Coroutine[Any, Any, None]], None] = asyncio.run,
) -> None:
    """Runs until SIGTERM or SIGINT, then lets the role end gracefully. A second SIGINT ends it at once, which is safe:
    its successor finds everything in the log. ``doing``: what it reads and where it listens, for its first log line."""
    from millstream.consumers.log.kafka_log import KafkaLog
    from millstream.pipeline.services.role_process import role_process  # slow to import: not for `millstream --help`

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
        logger.info("this is %s", _described(settings, role, doing, health_port))
        async with role_process(log, settings, role, health_port, stop, report=role != "runner") as health:
            await work(log, health, stop)

    if writes_logs():
        write_logs(settings.log_level, settings.log_format, role)
    # Modules live as long as the process. Scanning them takes the collector up to a tenth of a busy role's time.
    gc.freeze()
    gc.set_threshold(20_000, 20, 50)
    run_loop(run())
