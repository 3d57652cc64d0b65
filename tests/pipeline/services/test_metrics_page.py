"""The page of metrics."""

from pathlib import Path

from millstream.pipeline.services.metrics_page import PAGE, page
from millstream.schemas.metrics import CATALOGUE


def test_the_page_of_metrics_is_current() -> None:
    written = (Path(__file__).parents[3] / PAGE).read_text("utf-8")
    assert written == page(), "run `python -m millstream.pipeline.services.metrics_page`"


def test_each_metric_has_a_row_with_its_type_labels_unit_and_meaning() -> None:
    rows = [line for line in page().splitlines() if line.startswith("| `millstream_")]
    assert len(rows) == sum(map(len, CATALOGUE.values()))
    ends = "| `millstream_rollouts_ended_total` | counter | `mode`, `status` |  | Rollouts that have ended. |"
    seconds = "| `millstream_runner_slots` | gauge |  |  | Attempts that this runner can run at once. |"
    assert {ends, seconds} <= set(rows)
