"""``make demo-judge``: an agent learns from what a judge says about its answers, in this process.

The judge is scripted (`scripted.py`), the model begins with random weights. Exits 0 only if the agent has learnt.
"""

import asyncio
import shutil
from pathlib import Path
from typing import Annotated

import typer
from rich.console import Console
from rich.table import Table

import millstream as ms
from examples.judge import scripted
from examples.judge.agent import judged
from millstream.pipeline.services.serve_aiohttp import serve
from millstream.pipeline.training.report import StepReport, Summary
from millstream.schemas.config.upstreams import Upstream
from millstream.schemas.folders import own_folder

console = Console(highlight=False, soft_wrap=True)
VERDICTS = """
SELECT output AS answer, count() AS rollouts, round(avg(reward), 2) AS mean_reward
FROM rollouts
WHERE mode = 'val'
GROUP BY answer ORDER BY rollouts DESC LIMIT 5
"""


def main(
    run_dir: Annotated[Path, typer.Option(help="Folder of the run: new, empty, or of an earlier demo.")],
    rubric: Annotated[bool, typer.Option(help="The judge compares the answers of each group, in one call.")] = False,
    lr: Annotated[float, typer.Option(min=0, help="0 is the control: the agent must not learn.")] = 2e-3,
    steps: Annotated[int, typer.Option(min=1)] = 14,
    seed: int = 0,
) -> None:
    """Train an agent on the verdicts of a judge."""
    from transformers.utils.logging import disable_progress_bar

    from examples.calculator import model

    own_folder(run_dir, "--run-dir", "the demo of a judge")
    run_dir = run_dir.resolve()
    for name in ("store", "checkpoints", "best", "last", "model"):
        shutil.rmtree(run_dir / name, ignore_errors=True)
    disable_progress_bar()
    console.print(f"the judge of this demo is scripted; the run goes to {run_dir}")
    model.create(run_dir / "model", seed)
    summary = asyncio.run(train(run_dir, rubric, lr, steps, seed))
    show(run_dir)
    first, last = summary.first_reward or 0.0, summary.validation_reward or 0.0
    learnt = first < 0.4 and last > 0.9
    word = "the agent learnt" if learnt else "the agent did not learn"
    console.print(f"first step {first:.2f} → held-out validation {last:.2f}: {word}")
    raise typer.Exit(0 if learnt else 1)


async def train(run_dir: Path, rubric: bool, lr: float, steps: int, seed: int) -> Summary:
    def say(report: StepReport) -> None:
        console.print(f"step {report.step + 1}: {report.rollouts} rollouts, mean reward {report.reward:.2f}")

    async with serve(scripted.app(), "http://127.0.0.1:0") as url:
        settings = ms.load_settings(
            upstreams={"scripted": Upstream(urls=(url,), kind="openai")}, routes={"judge": "scripted"}
        )
        algorithm = ms.GRPO(run_dir / "model", lr=lr, seed=seed, rubric=ms.Rubric(model="judge") if rubric else None)
        trainer = ms.Trainer(
            algorithm=algorithm,
            runner=judged,
            run="judge",
            run_dir=run_dir,
            max_steps=steps,
            seed=seed,
            settings=settings,
            on_step=say,
        )
        return await trainer.train(scripted.tasks(False, 400, seed), scripted.tasks(True, 64, seed))


def show(run_dir: Path) -> None:
    store = ms.ClickHouseStore(ms.load_settings(clickhouse_dsn=f"chdb://{run_dir}/store"))
    found = store.sql(VERDICTS)
    store.close()
    table = Table(*found.columns, title="What the judge thinks of validation's answers")
    for row in found.rows:
        table.add_row(*map(str, row))
    console.print(table)


if __name__ == "__main__":
    typer.run(main)
