"""``millstream up``: every role that an agent needs, in processes that are kept running."""

import os
import signal
import sys
import time
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from importlib.util import find_spec
from pathlib import Path
from secrets import token_hex
from typing import TYPE_CHECKING, Annotated

import typer

from millstream.pipeline.cli.open import open_settings
from millstream.pipeline.cli.output import MAX_PORT, say
from millstream.schemas.errors import ConfigError, MillstreamError

if TYPE_CHECKING:
    from millstream.pipeline.services.child_roles import ChildRole
    from millstream.schemas.config.settings import Settings

app = typer.Typer()

EXIT_INTERRUPTED = 130
EMBEDDED_STORE = "chdb://"


@app.command(epilog="Example: millstream up agent:agent --train train.toml")
def up(
    agent: Annotated[str, typer.Argument(help="module:attribute of the agent, relative to the current folder.")],
    train: Annotated[Path | None, typer.Option(help="Also train with this file, and end when that has ended.")] = None,
    runners: Annotated[int, typer.Option(min=1, max=64, help="Runner processes.")] = 1,
    data_dir: Annotated[
        Path, typer.Option(help="Folder of the local broker, which is started unless kafka_bootstrap_servers is set.")
    ] = Path("runs/kafka"),
    kafka_port: Annotated[int, typer.Option(min=0, max=MAX_PORT, help="Its port; 0: any free one.")] = 9092,
    query_port: Annotated[
        int,
        typer.Option(min=0, max=MAX_PORT, help="Where the sink answers queries of an embedded store; 0: any."),
    ] = 0,
    drain_s: Annotated[float, typer.Option(min=0, help="Seconds for attempts to end after Ctrl-C.")] = 30.0,
) -> None:
    """Run an agent with all that it needs: broker, topics, adapter, sink, proxy, runners, and a trainer if you like.

    What dies is started again. Ctrl-C lets running attempts end, then stops everything; a second one stops at once."""
    import asyncio

    from millstream.pipeline.addresses import free_port
    from millstream.schemas.config.settings import ENV_PREFIX

    settings = open_settings()
    _check_agent(agent)
    if train is not None and not train.is_file():
        raise ConfigError(f"{train} is not a file: --train takes a file such as `millstream init` writes")
    started = time.monotonic()
    with _kafka(settings, data_dir, kafka_port) as bootstrap:
        given = {"kafka_bootstrap_servers": bootstrap}
        if not settings.proxy_secret.get_secret_value():
            given["proxy_secret"] = token_hex(32)
        settings = open_settings(**given)
        environment = os.environ | {ENV_PREFIX + name.upper(): value for name, value in given.items()}
        embedded = settings.clickhouse_dsn.startswith(EMBEDDED_STORE)
        queries = ["--query-port", str(query_port or free_port())] if embedded else []
        roles = {"adapter": ["adapter"], "sink": ["sink", *queries]}
        if settings.proxy_urls:
            roles["proxy"] = ["proxy", "--drain-s", str(drain_s)]
        for number in range(1, runners + 1):
            name = "runner" if runners == 1 else f"runner-{number}"
            roles[name] = ["runner", agent, "--drain-s", str(drain_s)]
        if train is not None:
            roles["trainer"] = ["train", str(train)]
        children = {name: _child(name, arguments, environment) for name, arguments in roles.items()}
        with asyncio.Runner() as loop:
            loop.run(_create_topics(settings))
            say(f"agent {agent}: {', '.join(roles)}; Kafka at {bootstrap}, {time.monotonic() - started:.0f} s")
            say("publish tasks with `millstream publish`, watch with `millstream top`; Ctrl-C stops all")
            code = loop.run(_run(children))
    if code:
        raise typer.Exit(code)


async def _run(children: "Mapping[str, ChildRole]") -> int:
    """Runs them until a signal, until the trainer has ended, or until one ends that is not started again. Stops them
    in the order in which work flows. Returns the exit code of the whole."""
    import asyncio

    from millstream.pipeline.services.child_roles import how_ended

    interrupted, loop = asyncio.Event(), asyncio.get_running_loop()

    def interrupt() -> None:
        if interrupted.is_set():
            for child in children.values():
                child.kill()
            os._exit(EXIT_INTERRUPTED)
        interrupted.set()

    for sign in (signal.SIGINT, signal.SIGTERM):
        loop.add_signal_handler(sign, interrupt)
    running = {asyncio.create_task(child.run()): name for name, child in children.items()}
    waiting = asyncio.create_task(interrupted.wait())
    try:
        done, _ = await asyncio.wait([*running, waiting], return_when=asyncio.FIRST_COMPLETED)
        ended = next((task for task in done if task is not waiting), None)
        if ended is None:
            say("stopping: running attempts may end")
        for name in sorted(children, key=_stops):
            await children[name].stop()
        if ended is None:
            return 0
        name, code = running[ended], ended.result()
        if name == "trainer" and code == 0:
            return 0
        if code not in (0, ConfigError.exit_code) and name != "trainer":
            raise MillstreamError(f"the {name} {how_ended(code)}")
        say(f"the {name} {how_ended(code)}: all others are stopped")
        return code or 1
    finally:
        for task in (*running, waiting):
            task.cancel()
        await asyncio.wait([*running, waiting])


def _stops(name: str) -> int:
    """The order in which roles stop: what asks for work, what does it, what records it."""
    return ("trainer", "runner", "proxy", "adapter", "sink").index(name.partition("-")[0])


def _child(name: str, arguments: list[str], environment: Mapping[str, str]) -> "ChildRole":
    from millstream.pipeline.services.child_roles import ChildRole

    command = [sys.executable, "-m", "millstream.pipeline", *arguments]
    if name == "trainer":  # an error of its own, as a run in which everything fails, would come again
        return ChildRole(name, command, environment, restarts=lambda code: code < 0 or code in (3, 4))
    return ChildRole(name, command, environment)


def _check_agent(agent: str) -> None:
    """Before anything is started. What its import raises is the runner's to report."""
    module, colon, attribute = agent.partition(":")
    if not module or not colon or not attribute:
        raise ConfigError(f"agent {agent!r} is not of the form module:attribute, like agent:agent")
    sys.path.insert(0, str(Path.cwd()))
    try:
        found = find_spec(module)
    except (ImportError, ValueError):
        found = None
    finally:
        del sys.path[0]
    if found is None:
        raise ConfigError(f"agent {agent!r}: there is no module {module} in {Path.cwd()}, and none is installed")


async def _create_topics(settings: "Settings") -> None:
    from millstream.consumers.log.kafka_log import KafkaLog  # slow to import

    await KafkaLog(settings).create_topics()


@contextmanager
def _kafka(settings: "Settings", data_dir: Path, port: int) -> Iterator[str]:
    """The addresses of the brokers: those that are set, or of a local one, which is stopped unless it ran before."""
    if "kafka_bootstrap_servers" in settings.model_fields_set:
        yield settings.kafka_bootstrap_servers
        return
    from millstream.deploy.kafka.local import LocalKafka  # slow to import

    kafka = LocalKafka(data_dir, port=port)
    stop: Callable[[], object] = kafka.down if kafka.status() is None else lambda: None
    say(f"starting Kafka in {data_dir}; the first time it is downloaded, which takes a minute or two")
    kafka.up()
    try:
        yield kafka.bootstrap_servers
    finally:
        stop()
