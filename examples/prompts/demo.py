"""``make demo-apo``: a prompt is searched for, in this process; a page in the browser shows how.

The models are scripted (`scripted.py`): the demo shows the search, its records and its page, not what a real critic
would say. Exits 0 only if the prompt got better.
"""

import asyncio
import shutil
from pathlib import Path
from typing import Annotated

import typer
from rich.console import Console

import millstream as ms
from examples.prompts import scripted
from examples.prompts.agent import agent
from millstream.pipeline.prompts.apo import Apo
from millstream.pipeline.prompts.search import Beam
from millstream.pipeline.services.serve_aiohttp import serve
from millstream.pipeline.store.candidates import candidates_of
from millstream.pipeline.training.config import with_pages
from millstream.pipeline.training.deployment import in_memory
from millstream.pipeline.training.report import StepReport, Summary
from millstream.schemas.config.upstreams import Upstream
from millstream.schemas.folders import own_folder

console = Console(highlight=False, soft_wrap=True)
BEAM = Beam(beam_width=2, branch_factor=2, rounds=4, batch=4, validation_batch=9)


def main(
    run_dir: Annotated[Path, typer.Option(help="Folder of the run: new, empty, or of an earlier demo.")],
    ui_port: Annotated[int, typer.Option(min=0, help="Of the pages for a browser; 0: any free one.")] = 0,
    control: Annotated[
        bool, typer.Option(help="A critic that says nothing useful: the prompt must not get better.")
    ] = False,
    answer_s: Annotated[float, typer.Option(min=0, help="Seconds that a scripted model takes.")] = 0.2,
) -> None:
    """Search for a better prompt, and show what was tried."""
    own_folder(run_dir, "--run-dir", "the demo of prompts")
    for name in ("store", "checkpoints"):
        shutil.rmtree(run_dir / name, ignore_errors=True)
    console.print(f"the models of this demo are scripted; the run goes to {run_dir}")
    summary = asyncio.run(search(run_dir.resolve(), ui_port, control, answer_s))
    first = show(run_dir.resolve(), summary)
    best = summary.validation_reward or 0.0
    better = first < 0.4 and best > 0.9
    word = "the prompt got better" if better else "the prompt did not get better"
    console.print(f"validation {first:.2f} → {best:.2f}: {word}")
    raise typer.Exit(0 if better else 1)


async def search(run_dir: Path, ui_port: int, control: bool, answer_s: float) -> Summary:
    def say(report: StepReport) -> None:
        made, refused = report.metrics["candidates"], report.metrics["refused"]
        best = report.validation_reward
        console.print(
            f"round {report.step + 1}: {made:.0f} candidates, {refused:.0f} of them refused or dropped; "
            f"{report.rollouts} rollouts, mean reward {report.reward:.2f}; best on validation {best:.2f}"
        )

    async with serve(scripted.app(answer_s, control), "http://127.0.0.1:0") as url:
        settings = ms.load_settings(
            upstreams={"scripted": Upstream(urls=(url,), kind="openai")},
            routes={"student": "scripted", "critic": "scripted"},
        )
        trainer = ms.Trainer(
            algorithm=Apo(critic="critic", beam=BEAM),
            agent=agent,
            prompts={"system": ms.PromptTemplate(template=scripted.FIRST)},
            strategy=with_pages(in_memory, ui_port, lambda address: console.print(f"watch it in a browser: {address}")),
            run="prompts",
            run_dir=run_dir,
            settings=settings,
            on_step=say,
        )
        return await trainer.train(scripted.tasks(0, 60), scripted.tasks(1000, 9))


def show(run_dir: Path, summary: Summary) -> float:
    """Prints the best prompt's line of descent; returns what the first prompt earned."""
    store = ms.ClickHouseStore(ms.load_settings(clickhouse_dsn=f"chdb://{run_dir}/store"))
    rows = {row["number"]: row for row in candidates_of(store.sql, summary.experiment_id)}
    store.close()
    number, line = next((n for n, row in rows.items() if row["current"]), 0), []
    while number is not None:
        line.append(rows[number])
        number = rows[number]["parent_number"]
    for row in reversed(line):
        if row["critique"]:
            console.print(f"    critic: {row['critique']}", markup=False)
        console.print(f"  candidate {row['number']} ({row['score']:.2f}): {row['templates']['system']}", markup=False)
    return float(rows[0]["score"])


if __name__ == "__main__":
    typer.run(main)
