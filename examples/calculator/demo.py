"""The demo: a calculator agent learns to choose its tools, in this process or (``--kafka``) with processes over Kafka.

Ends with what SQL says about the run, and ``summary.json`` in the run's folder. Exits 0 only if the agent learnt.
"""

import asyncio
import json
import logging
import os
import re
import shutil
import signal
import sys
import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from secrets import token_hex
from typing import Annotated, Any
from urllib.request import urlopen

import typer
from rich.console import Console
from rich.markup import escape
from rich.table import Table

from examples.calculator.processes import STOP_S, Processes
from examples.calculator.reward import LEDGER
from examples.calculator.tasks import make_tasks
from millstream.consumers.log.kafka_log import KafkaLog
from millstream.deploy.kafka.local import LocalKafka
from millstream.pipeline.addresses import LOOPBACK, free_port
from millstream.pipeline.services.serve_asgi import listen
from millstream.pipeline.store.clickhouse import ClickHouseStore
from millstream.schemas.config.settings import Settings, load_settings
from millstream.schemas.errors import ConfigError, MillstreamError
from millstream.schemas.folders import own_folder

TRAIN_TASKS = 2000
FIRST_REWARD_BELOW, VALIDATION_ABOVE = 0.4, 0.9
INTERRUPTED_S = 3.0  # for each role to end after Ctrl-C, when its work is not needed
LEASE_S = 5.0  # a killed runner delays the run by this long
# Shown at the end, by title; each can be pasted into `millstream sql`.
CLOSING_QUERIES = {
    "Reward by policy version": """
SELECT model_version, count() AS rollouts, round(avg(reward), 3) AS mean_reward, sum(turns) AS turns
FROM rollouts
WHERE mode = 'train' AND status = 'succeeded'
GROUP BY model_version
ORDER BY min(created_at)
""",
    "Slowest rollouts": """
SELECT rollout_id, mode, status, round(queued_s, 3) AS queued_s, round(duration_s, 3) AS duration_s, turns, reward
FROM rollouts
ORDER BY duration_s DESC NULLS LAST
LIMIT 5
""",
    "Tool calls by name and success": """
SELECT name, succeeded, count() AS calls, uniqExact(rollout_id) AS rollouts
FROM tool_calls
GROUP BY name, succeeded
ORDER BY calls DESC
LIMIT 8
""",
}

CONFIG = """\
run = "calculator"
run_dir = "{run_dir}"
{where}
tasks = "{run_dir}/train.jsonl"
val_tasks = "{run_dir}/val.jsonl"
max_steps = {max_steps}
stop_reward = 0.92
patience = 1
seed = {seed}

{model}
{algorithm}
"""
GRPO = """\
[algorithm]
type = "grpo"
model = "{run_dir}/model"
groups_per_step = {groups}
max_staleness = {max_staleness}
lr = {lr}
seed = {seed}
"""
# One rank on this CPU.
VERL = """\
[algorithm]
type = "verl"
model = "{run_dir}/model"
groups_per_step = {groups}
minibatch = {minibatch}
epochs = 2
lr = {lr}
entropy = 0.1
device = "cpu"
dtype = "float32"
gpus_per_node = 1
micro_batch = {rows}
max_prompt = 64
max_response = 64
flash_attention = false
overrides = ["ray_kwargs.ray_init.num_gpus=1", "ray_kwargs.ray_init.num_cpus=8"]
"""
VLLM = """\
[model]
server = "vllm"
names = ["calculator"]
args = [
    "--tokenizer", "{run_dir}/tokenizer",
    "--dtype", "float32", "--max-model-len", "256", "--enforce-eager",
    "--kv-cache-memory-bytes", "134217728", "--gpu-memory-utilization", "0.2",
]
"""
AGENT = "examples.calculator.agent:agent"

console = Console(record=True)


def main(
    run_dir: Annotated[
        Path, typer.Option(help="Folder of the run: new, empty, or of an earlier demo, which is replaced.")
    ],
    kafka: Annotated[bool, typer.Option(help="Over Kafka, with one process per role.")] = False,
    vllm: Annotated[bool, typer.Option(help="Serve the model with vLLM; `make vllm` installs it.")] = False,
    verl: Annotated[bool, typer.Option(help="Train by a verl job on this CPU, over Kafka: `make demo-verl`.")] = False,
    max_steps: Annotated[int, typer.Option(min=1)] = 60,
    groups: Annotated[int, typer.Option(min=1, help="Questions per step, with eight rollouts each.")] = 16,
    lr: Annotated[float, typer.Option(min=0, help="0 is the control: the agent must not learn.")] = 1e-3,
    max_staleness: Annotated[
        int, typer.Option(min=0, help="Versions between sampling and training; above 0 the two overlap.")
    ] = 0,
    adapter: Annotated[str, typer.Option(help="module:attribute in place of the adapter's, for another control.")] = "",
    agent: Annotated[str, typer.Option(help="module:attribute; see also langgraph_agent and autogen_team.")] = AGENT,
    ui_port: Annotated[
        int, typer.Option(min=0, help="Of the pages for a browser; any free one if it is taken, or 0.")
    ] = 8700,
    seed: int = 0,
    svg: Annotated[
        Path | None, typer.Option(help="File to write what is printed to, as a picture. Needs a pipe, not a terminal.")
    ] = None,
) -> None:
    """Train the calculator agent and show what happened."""
    signal.signal(signal.SIGTERM, signal.default_int_handler)  # as Ctrl-C does
    if svg is not None and console.is_terminal:
        raise typer.BadParameter("the live view would fill the picture: pipe the output, such as to `| cat`")
    began = time.monotonic()
    run_dir = run_dir.resolve()
    wait = f"; vLLM takes most of a minute to start, and logs in {run_dir}/vllm/log" if vllm else ""
    console.print(f"the run goes to {_from_here(run_dir)}{wait}", highlight=False, soft_wrap=True)
    try:
        kafka = kafka or verl
        prepare(run_dir, "" if kafka else agent, vllm, verl, max_steps, groups, max_staleness, lr, seed)
        settings = over_kafka(run_dir, agent, adapter, ui_port) if kafka else in_process(run_dir, adapter, ui_port)
        summary = close(run_dir, settings, time.monotonic() - began)
    except MillstreamError as error:
        console.print("[red]error:[/red]", escape(str(error)), highlight=False)
        raise typer.Exit(1) from None
    except KeyboardInterrupt:
        console.print("interrupted")
        raise typer.Exit(130) from None
    console.print(f"ask more: {_question(settings.clickhouse_dsn)}", highlight=False, soft_wrap=True)
    console.print(f"look at it again: {_command(settings.clickhouse_dsn, 'ui')}", highlight=False, soft_wrap=True)
    learnt = summary["first_reward"] < FIRST_REWARD_BELOW and summary["validation_reward"] > VALIDATION_ABOVE
    console.print(
        f"first step {summary['first_reward']:.2f} → held-out validation {summary['validation_reward']:.2f}: "
        + ("[green]the agent learnt[/green]" if learnt else "[red]the agent did not learn[/red]")
    )
    if svg is not None:
        picture = console.export_svg(title="make demo")
        svg.write_text(re.sub(r"@font-face \{.*?\}", "", picture, flags=re.DOTALL))  # which loads fonts from elsewhere
    raise typer.Exit(0 if learnt else 1)


def prepare(
    run_dir: Path,
    agent: str,
    vllm: bool,
    verl: bool,
    max_steps: int,
    groups: int,
    max_staleness: int,
    lr: float,
    seed: int,
) -> None:
    """Writes model, tasks and ``train.toml``, and removes what an earlier run left. Without an agent: for Kafka. A
    validation has as many rollouts as a step."""
    from transformers.utils.logging import disable_progress_bar  # slow: it imports torch

    from examples.calculator import model

    own_folder(run_dir, "--run-dir", "the calculator demo")
    for name in ("store", "checkpoints", "best", "last", "model", "tokenizer", "vllm", "verl", "kafka", "log"):
        shutil.rmtree(run_dir / name, ignore_errors=True)
    for name in ("train.json", "summary.json"):
        (run_dir / name).unlink(missing_ok=True)
    disable_progress_bar()  # there is a live view
    model.create(run_dir / "model", seed)
    if vllm:
        model.create_tokenizer(run_dir / "tokenizer")
        os.environ["MILLSTREAM_WEIGHTS_ROOT"] = str(run_dir)
        os.environ.setdefault("MILLSTREAM_RUNNER_CONCURRENCY", "32")  # vLLM is fast when it is asked for much at once
    for mode, count in (("train", TRAIN_TASKS), ("val", 8 * groups)):
        lines = [json.dumps({"input": task}) for task in make_tasks(count, mode, seed)]  # type: ignore[arg-type]
        (run_dir / f"{mode}.jsonl").write_text("\n".join(lines) + "\n")
    minibatch = groups // 2 if groups % 2 == 0 else groups
    where = f'strategy = "memory"\nagent = "{agent}"' if agent else 'strategy = "kafka"'
    (run_dir / "train.toml").write_text(
        CONFIG.format(
            run_dir=run_dir,
            where=where,
            max_steps=max_steps,
            seed=seed,
            algorithm=(VERL if verl else GRPO).format(
                run_dir=run_dir,
                groups=groups,
                max_staleness=max_staleness,
                minibatch=minibatch,
                rows=8 * minibatch,
                lr=lr,
                seed=seed,
            ),
            model=VLLM.format(run_dir=run_dir) if vllm else "",
        )
    )


def in_process(run_dir: Path, adapter: str, ui_port: int) -> Settings:
    """Runs all roles in this process. The store is closed when this returns."""
    from millstream.pipeline.training.config import train_from

    (run_dir / "log").mkdir()
    logging.basicConfig(filename=run_dir / "log" / "demo.log", format="%(asctime)s %(name)s %(levelname)s %(message)s")
    train_from(run_dir / "train.toml", console, adapter=adapter, ui_port=_free(ui_port))
    return load_settings(clickhouse_dsn=f"chdb://{run_dir / 'store'}")


def over_kafka(run_dir: Path, agent: str, adapter: str, ui_port: int) -> Settings:
    """Runs a broker and seven processes; all have ended when this returns or raises."""
    proxy, model, queries = free_port(), free_port(), free_port()
    folder = run_dir / "store"
    with _broker(run_dir / "kafka") as bootstrap:
        variables = {
            "MILLSTREAM_KAFKA_BOOTSTRAP_SERVERS": bootstrap,
            "MILLSTREAM_PROXY_URL": f"http://127.0.0.1:{proxy}",
            "MILLSTREAM_PROXY_SECRET": token_hex(32),
            "MILLSTREAM_MODEL_URL": f"http://127.0.0.1:{model}",
            "MILLSTREAM_CLICKHOUSE_DSN": f"chdb://{folder}",
            "MILLSTREAM_LEASE_S": str(LEASE_S),
        }
        settings = load_settings(**{key.removeprefix("MILLSTREAM_").lower(): value for key, value in variables.items()})
        processes = Processes(run_dir / "log", os.environ | variables, say=console.print)
        patience_s = INTERRUPTED_S
        try:
            asyncio.run(KafkaLog(settings).create_topics())
            processes.start("sink", "sink", "--query-port", str(queries))
            _wait_until_up(f"http://127.0.0.1:{queries}/ping", processes)
            meanwhile = _question(f"clickhouse://127.0.0.1:{queries}")
            console.print(f"ask meanwhile: {meanwhile}", highlight=False, soft_wrap=True)
            processes.start("adapter", "adapter", *(["--adapter", adapter] if adapter else []))
            processes.start("proxy", "proxy")
            _wait_until_up(f"{settings.proxy_url}/livez", processes)
            ledger = ["--env", LEDGER] if LEDGER in os.environ else []
            for number in (1, 2):
                # Attempts are left to drain only after Ctrl-C, when nothing needs them.
                processes.start(f"runner-{number}", "runner", agent, "--drain-s", "0", *ledger)
            shown = {"MILLSTREAM_CLICKHOUSE_DSN": f"clickhouse://127.0.0.1:{queries}"}  # by the sink, which holds it
            ui_port = _free(ui_port)
            processes.start("ui", "ui", "--port", str(ui_port), more=shown)
            console.print(f"watch it in a browser: http://127.0.0.1:{ui_port}/", highlight=False, soft_wrap=True)
            processes.start("trainer", "train", str(run_dir / "train.toml"), inherit_output=True)
            while (code := processes.check(job="trainer")) is None:
                time.sleep(0.2)
            if code != 0:
                raise MillstreamError(f"the trainer ended with exit code {code}")
            patience_s = STOP_S
        finally:
            processes.stop_all(patience_s)
        return settings


def close(run_dir: Path, settings: Settings, seconds: float) -> dict[str, Any]:
    """Shows the closing queries with their results; writes and returns ``summary.json``."""
    trained = json.loads((run_dir / "train.json").read_text())
    store = ClickHouseStore(settings)
    try:
        for title, query in CLOSING_QUERIES.items():
            result = store.sql(query)
            table = Table(*result.columns, title=title)
            for row in result.rows:
                table.add_row(*(f"{value:.3f}" if isinstance(value, float) else str(value) for value in row))
            console.print(f"[dim]{query.strip()}[/dim]", highlight=False)
            console.print(table)
        by_version = store.sql(next(iter(CLOSING_QUERIES.values())))
        ((spans,),) = store.sql("SELECT count() FROM spans").rows
        ((rollouts,),) = store.sql("SELECT count() FROM rollouts").rows
    finally:
        store.close()
    summary = {
        "first_reward": trained["steps"][0]["reward"],
        "validation_reward": trained["validation_reward"],
        "seconds": round(seconds, 1),
        "rollouts": rollouts,
        "rollouts_per_second": round(trained["rollouts"] / trained["seconds"], 1),
        "spans": spans,
        "by_version": [dict(zip(by_version.columns, row, strict=True)) for row in by_version.rows],
    }
    (run_dir / "summary.json").write_text(json.dumps(summary, indent=2, default=str) + "\n")
    return summary


@contextmanager
def _broker(folder: Path) -> Iterator[str]:
    broker = LocalKafka(folder, port=0)
    broker.up()
    try:
        yield broker.bootstrap_servers
    finally:
        broker.down()


def _question(clickhouse_dsn: str) -> str:
    return _command(clickhouse_dsn, 'sql "SELECT …"')


def _command(clickhouse_dsn: str, command: str) -> str:
    millstream = Path(sys.executable).with_name("millstream")
    return _from_here(f"MILLSTREAM_CLICKHOUSE_DSN={clickhouse_dsn} {millstream} {command}")


def _free(port: int) -> int:
    """The port, or another one if it is taken."""
    try:
        listen(LOOPBACK, port).close()
    except ConfigError:
        return free_port()
    return port


def _from_here(text: object) -> str:
    """Paths below the working directory, shown relative to it."""
    return str(text).replace(f"{Path.cwd()}/", "")


def _wait_until_up(url: str, processes: Processes, seconds: float = 30.0) -> None:
    deadline = time.monotonic() + seconds
    while time.monotonic() < deadline:
        processes.check()
        try:
            with urlopen(url, timeout=1):  # noqa: S310 - an address of our own
                return
        except OSError:
            time.sleep(0.05)
    raise MillstreamError(f"{url} did not come up within {seconds:g} s")


if __name__ == "__main__":
    typer.run(main)
