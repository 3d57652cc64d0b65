"""Experiments: their curves, steps and versions, what they were started with, and how that differs from another's."""

from typing import Any, Final

from starlette.exceptions import HTTPException
from starlette.requests import Request
from starlette.responses import JSONResponse, Response
from starlette.routing import Route

from millstream.pipeline.store import pages
from millstream.pipeline.store.candidates import candidates_of, changes
from millstream.pipeline.store.queries import EXPERIMENTS, STEPS, TRAINING_RUNS, Ask
from millstream.pipeline.store.recorded import record_of
from millstream.pipeline.training.reporting.record import differences, flat
from millstream.pipeline.ui.render import page
from millstream.pipeline.ui.source import Source
from millstream.pipeline.ui.views.overview import finite
from millstream.schemas.errors import StoreError

RUNS: Final = 200
TABLE_STEPS: Final = 100
CURVE_STEPS: Final = 5000
LINES: Final = ("reward_mean", "validation_reward", "seconds", "idle_share", "staleness_mean", "tokens", "failed")


def experiments(request: Request) -> Response:
    source: Source = request.app.state.source
    ask = source.store.sql
    runs = ask(TRAINING_RUNS).records()[:RUNS]
    trained = {row["experiment_id"] for row in runs}
    published = [row["experiment_id"] for row in ask(EXPERIMENTS).records() if row["experiment_id"] not in trained]
    paused = {row["experiment_id"] for row in ask(pages.PAUSED).records()}
    return page(request, "experiments.html", {"runs": runs, "published": published[:RUNS], "paused": paused})


def experiment(request: Request) -> Response:
    source: Source = request.app.state.source
    ask, wanted = source.store.sql, request.path_params["id"]
    runs = ask(TRAINING_RUNS).records()
    run = next((row for row in runs if row["experiment_id"] == wanted), None)
    if run is None and not any(wanted == row["experiment_id"] for row in ask(EXPERIMENTS).records()):
        raise HTTPException(404, f"The store has no experiment {wanted!r}.")
    steps = ask(STEPS, {"experiment_id": wanted, "limit": TABLE_STEPS}).records()
    metrics = sorted({name for step in steps for name in step["metrics"]})
    plot = request.query_params.get("plot", "reward_mean")
    against = request.query_params.get("against", "")
    record = record_or_nothing(ask, wanted) if run else {}
    values: dict[str, Any] = {
        "id": wanted,
        "run": run,
        "steps": steps,
        "plots": [(name, name.replace("_", " ")) for name in (*LINES, *metrics)],
        "plot": plot,
        "paused": any(row["experiment_id"] == wanted for row in ask(pages.PAUSED).records()),
        "configuration": list(flat(record)) if run else [],
        "against": against,
        "others": [(r["experiment_id"], r["run"] or r["experiment_id"]) for r in runs if r["experiment_id"] != wanted][
            :RUNS
        ],
        "candidates": _candidates(source, wanted),
        "differences": differences(record_or_nothing(ask, against), record) if run and against else None,
    }
    return page(request, "experiment.html", values)


def record_or_nothing(ask: Ask, experiment_id: str) -> dict[str, Any]:
    """What a run was started with; empty if it is not recorded, or can't be read: the page shows everything else."""
    try:
        return record_of(ask, experiment_id) or {}
    except StoreError:
        return {}


def _candidates(source: Source, experiment_id: str) -> list[dict[str, Any]]:
    """Those of a search over prompts, each with its ``changes`` from its parent."""
    rows = candidates_of(source.store.sql, experiment_id)
    texts = {row["number"]: row["templates"] for row in rows}
    for row in rows:
        row["changes"] = list(changes(texts.get(row["parent_number"], {}), row["templates"]))
    return rows


def curve(request: Request) -> Response:
    """A number of each step, as `ui.js` draws it. Abandoned steps are left out."""
    source: Source = request.app.state.source
    plot = request.query_params.get("plot", "reward_mean")
    bound = {"experiment_id": request.query_params.get("experiment", ""), "limit": CURVE_STEPS}
    rows = [row for row in source.store.sql(STEPS, bound).records()[::-1] if not row["abandoned"]]
    values = [finite(row["metrics"].get(plot, row.get(plot))) for row in rows]
    series = [{"name": plot, "kind": "line", "values": values}]
    if plot == "reward_mean":
        validation = [finite(row["validation_reward"]) for row in rows]
        if any(value is not None for value in validation):
            series.append({"name": "validation", "kind": "second", "values": validation})
    return JSONResponse({"x": [f"step {row['step']}" for row in rows], "links": None, "series": series})


ROUTES: Final = [
    Route("/experiments", experiments),
    Route("/data/steps.json", curve),
    Route("/experiments/{id:path}", experiment),
]
