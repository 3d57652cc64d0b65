"""The overview: what the deployment does now, and how the reward goes."""

from collections.abc import Mapping
from typing import Any, Final
from urllib.parse import urlencode

from starlette.concurrency import run_in_threadpool
from starlette.requests import Request
from starlette.responses import JSONResponse, Response
from starlette.routing import Route

from millstream.consumers.workers import GONE_S
from millstream.pipeline.store import pages
from millstream.pipeline.store.queries import REWARDS_BY_VERSION, TRAINING_RUNS
from millstream.pipeline.ui.render import is_part, page
from millstream.pipeline.ui.source import Source
from millstream.schemas.errors import MillstreamError

WINDOW_S: Final = 60
FAILING: Final = 0.8  # share of successes below which it is said
WAITING_S: Final = 60.0  # age of the oldest task, while slots are free
VERSIONS: Final = 1000  # of a curve, the last ones
PHASES: Final = (
    ("wait_s", "waits for rollouts"),
    ("update_s", "updates weights"),
    ("save_s", "saves"),
    ("publish_s", "publishes"),
    ("other_s", "other"),
)


async def overview(request: Request) -> Response:
    source: Source = request.app.state.source
    problems: list[str] = []
    load: Mapping[str, Any] | None = None
    try:
        load = await source.load()
    except MillstreamError as error:
        problems.append(str(error))
    try:
        stored = await run_in_threadpool(_stored, source, not is_part(request))
    except MillstreamError as error:
        stored = None
        problems.append(str(error))
    if stored is not None:
        problems += _notices(load, stored)
    values = {"load": load, "stored": stored, "problems": problems, "window": WINDOW_S, "phases": PHASES}
    return page(request, "overview_live.html" if is_part(request) else "overview.html", values)


def _stored(source: Source, whole: bool) -> dict[str, Any]:
    ask = source.store.sql
    recent = {"seconds": WINDOW_S}
    return {
        "ends": pages.record(ask, pages.RECENT_ENDS, recent),
        "tokens": pages.record(ask, pages.RECENT_TOKENS, recent),
        "by_status": ask(pages.ENDS_BY_STATUS).records(),
        "workers": ask(pages.WORKERS, {"seconds": int(GONE_S)}).records(),
        "dead": ask(pages.RECENT_DEAD, {"seconds": 600}).rows[0][0],
        "paused": ask(pages.PAUSED).records(),
        "training": next(iter(ask(pages.LATEST_STEPS).records()), None),
        "runs": ask(TRAINING_RUNS).records()[:8] if whole else [],
    }


def _notices(load: Mapping[str, Any] | None, stored: Mapping[str, Any]) -> list[str]:
    """What somebody should look at."""
    found = []
    ends = stored["ends"]
    if load is not None:
        if load["work"] and not load["slots"]:
            found.append("Tasks wait, and no runner is alive: start one with `millstream runner AGENT`.")
        elif load["oldest_unclaimed_s"] > WAITING_S and load["running"] < load["slots"]:
            found.append("Tasks wait although slots are free: is their experiment paused, or for another agent?")
    if ends["ended"] >= 10 and ends["succeeded"] < FAILING * ends["ended"]:
        found.append(f"{ends['ended'] - ends['succeeded']} of the last {ends['ended']} rollouts did not succeed.")
    if stored["dead"]:
        found.append(f"{stored['dead']} new dead letters in the last ten minutes.")
    found += [f"Experiment {row['experiment_id']} is paused." for row in stored["paused"]]
    return found


def rewards(request: Request) -> Response:
    """The curve of rewards by model version, as `ui.js` draws it."""
    source: Source = request.app.state.source
    asked = {name: request.query_params.get(name, "") for name in ("experiment", "mode")}
    bound = {"experiment_id": asked["experiment"], "mode": asked["mode"]}
    rows = source.store.sql(REWARDS_BY_VERSION, bound).records()[-VERSIONS:]
    base = request.scope.get("root_path", "")

    def link(version: str | None) -> str | None:
        return version and f"{base}/rollouts?" + urlencode({k: v for k, v in asked.items() if v} | {"version": version})

    return JSONResponse(
        {
            "x": [row["model_version"] or "unknown" for row in rows],
            "links": [link(row["model_version"]) for row in rows],
            "series": [
                {"name": "10 %", "kind": "band-low", "values": [finite(row["p10"]) for row in rows]},
                {"name": "90 %", "kind": "band-high", "values": [finite(row["p90"]) for row in rows]},
                {"name": "median", "kind": "second", "values": [finite(row["p50"]) for row in rows]},
                {"name": "mean", "kind": "line", "values": [finite(row["mean"]) for row in rows]},
                {"name": "rollouts", "kind": "count", "values": [row["rollouts"] for row in rows]},
            ],
        }
    )


def finite(value: Any) -> float | None:
    """A number that JSON has; None for any other."""
    return float(value) if isinstance(value, int | float) and abs(value) < float("inf") else None


ROUTES: Final = [Route("/", overview), Route("/data/rewards.json", rewards)]
