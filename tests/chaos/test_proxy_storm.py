"""A short storm: weights change under streaming clients, a replica is killed, the proxy is succeeded by another."""

import pytest
from proxy_storm import Storm

pytestmark = [pytest.mark.kafka, pytest.mark.chaos]


async def test_clients_notice_nothing_and_every_span_says_which_weights_made_it(tmp_path):
    summary = await Storm(tmp_path).run(clients=8, updates=12, pause_s=0.5)
    assert (summary["hung"], summary["errors"], summary["wrong"]) == (0, {}, [])
    assert summary["spans"] >= summary["calls"] > 50
    assert summary["versions"] >= 10
    assert sum(summary["broken"].values()) <= 8  # streams that the killed replica had begun
