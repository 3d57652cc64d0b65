"""SQL of the user's own: one statement that reads, within limits."""

import time
from typing import Any, Final

from starlette.requests import Request
from starlette.responses import Response
from starlette.routing import Route

from millstream.pipeline.ui.gate import asked_here
from millstream.pipeline.ui.render import page
from millstream.pipeline.ui.source import SQL_ROWS, Source
from millstream.schemas.errors import StoreError

LONGEST: Final = 100_000  # characters of a statement
EXAMPLES: Final = {
    "Rollouts by status": """
SELECT status, count() AS rollouts, round(avg(reward), 3) AS reward
FROM rollouts
GROUP BY status
ORDER BY rollouts DESC""",
    "Reward by model version": """
SELECT model_version, count() AS rollouts, round(avg(reward), 3) AS mean,
    quantileExact(0.1)(reward) AS p10, quantileExact(0.9)(reward) AS p90
FROM ended_rollouts
WHERE reward IS NOT NULL AND mode = 'train'
GROUP BY model_version
ORDER BY min(ended_at)""",
    "Groups without signal, by version": """
SELECT version, count() AS groups, countIf(smallest = largest) AS without_signal
FROM (
    SELECT group_id, any(model_version) AS version, min(reward) AS smallest, max(reward) AS largest
    FROM ended_rollouts
    WHERE group_size > 1 AND reward IS NOT NULL
    GROUP BY group_id
)
GROUP BY version
ORDER BY version""",
    "Slowest rollouts": """
SELECT rollout_id, status, round(duration_s, 2) AS seconds, turns, reward
FROM rollouts
ORDER BY duration_s DESC NULLS LAST
LIMIT 20""",
    "Tools: calls, failures, median": """
SELECT name, count() AS calls, countIf(NOT succeeded) AS failures,
    round(quantile(0.5)(duration_s) * 1000, 2) AS median_ms
FROM tool_calls
GROUP BY name
ORDER BY calls DESC""",
    "Why calls are not trained on": """
SELECT reason, count() AS calls
FROM triplets
WHERE NOT trainable
GROUP BY reason
ORDER BY calls DESC
LIMIT 20""",
    "Tokens by minute": """
SELECT minute, source, sum(prompt_tokens) AS prompt, sum(response_tokens) AS response
FROM tokens_per_minute
WHERE minute >= now() - INTERVAL 1 HOUR
GROUP BY minute, source
ORDER BY minute""",
    "Tables and views": "SHOW TABLES",
}


def sql(request: Request) -> Response:
    """A link of another site fills in the statement, but does not run it."""
    source: Source = request.app.state.source
    query = request.query_params.get("q", "").strip()
    values: dict[str, Any] = {
        "q": query,
        "examples": [(title, example.strip()) for title, example in EXAMPLES.items()],
        "held": bool(query) and not asked_here(request),
        "result": None,
        "problem": "",
        "most": SQL_ROWS,
        "took": 0.0,
    }
    if query and not values["held"]:
        began = time.monotonic()
        try:
            if len(query) > LONGEST:
                raise StoreError(f"the statement has more than {LONGEST:,} characters: use `millstream sql`")
            values["result"] = source.sql_store.sql(query)
        except StoreError as error:
            values["problem"] = str(error)
        values["took"] = time.monotonic() - began
    return page(request, "sql.html", values)


ROUTES: Final = [Route("/sql", sql)]
