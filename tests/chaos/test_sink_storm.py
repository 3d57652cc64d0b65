"""A short storm: sinks and their store are killed while spans flow; the views equal the log."""

import pytest
from sink_storm import Storm

pytestmark = [pytest.mark.kafka, pytest.mark.chaos, pytest.mark.slow]


def test_killed_sinks_and_stores_keep_every_span_once(tmp_path):
    summary = Storm(tmp_path / "run", seed=2).run(kills=6, spans=20_000)
    assert summary["kills"]["sink-0"] + summary["kills"]["sink-1"] == 6
    assert summary["wrong"] == {}
    assert summary["equal"]
    assert summary["spans"] == 20_000
