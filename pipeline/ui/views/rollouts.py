"""The list of rollouts, with its filters in the address."""

from typing import Any, Final

from starlette.exceptions import HTTPException
from starlette.requests import Request
from starlette.responses import Response
from starlette.routing import Route

from millstream.pipeline.store.queries import EXPERIMENTS, OPEN
from millstream.pipeline.store.search import RolloutSearch, find_rollouts, orders
from millstream.pipeline.ui.render import is_part, number_of, page
from millstream.pipeline.ui.source import Source

ROWS: Final = 50
STATUSES: Final = (*OPEN, "succeeded", "failed", "cancelled")
MODES: Final = ("train", "val", "test")
PERIODS: Final = {"900": "15 minutes", "3600": "1 hour", "86400": "1 day", "604800": "7 days"}
COLUMNS: Final = (  # title, and what it is sorted by
    ("rollout", "created_at"),
    ("status", ""),
    ("task", ""),
    ("reward", "reward"),
    ("turns", "turns"),
    ("tokens", ""),
    ("version", "model_version"),
    ("queued", "queued_s"),
    ("ran", "duration_s"),
    ("attempts", "attempts"),
    ("group", ""),
)


def rollouts(request: Request) -> Response:
    source: Source = request.app.state.source
    query = {name: value.strip() for name, value in request.query_params.items() if value.strip()}
    at = number_of(request, "at", 0)
    search = RolloutSearch(
        status=query.get("status", ""),
        experiment_id=query.get("experiment", ""),
        group_id=query.get("group", ""),
        mode=query.get("mode", ""),
        model_version=query.get("version", ""),
        resources_id=query.get("resources", ""),
        text=query.get("q", ""),
        before=query.get("before", ""),
        since_s=number_of(request, "since", 0, most=10**9),
        sort_by=query.get("sort", "created_at"),
        descending="asc" not in query,
    )
    try:
        found = find_rollouts(source.store.sql, search, ROWS + 1, at)
    except ValueError as error:
        raise HTTPException(422, str(error)) from None
    values: dict[str, Any] = {
        "rows": found.rows[:ROWS],
        "more": len(found.rows) > ROWS,
        "looked": found.looked,
        "at": at,
        "size": ROWS,
        "query": {name: value for name, value in query.items() if name != "at"},
        "columns": COLUMNS,
        "search": search,
    }
    if is_part(request):
        return page(request, "rollouts_rows.html", values)
    experiments = source.store.sql(EXPERIMENTS).records()[:100]
    values["choices"] = {
        "status": [(name, name) for name in STATUSES],
        "mode": [(name, name) for name in MODES],
        "experiment": [(row["experiment_id"], row["run"] or row["experiment_id"]) for row in experiments],
        "since": list(PERIODS.items()),
        "sort": [(name, name.replace("_", " ")) for name in orders()],
    }
    return page(request, "rollouts.html", values)


ROUTES: Final = [Route("/rollouts", rollouts)]
