"""A short storm: weights change under streaming clients, a replica is killed, the proxy is replaced by another."""

from pathlib import Path

import pytest
from proxy_storm import Storm

PYTHON = Path(__file__).parents[2] / ".venv-vllm/bin/python"
pytestmark = [pytest.mark.kafka, pytest.mark.chaos]


@pytest.mark.parametrize(
    ("vllm", "clients", "updates"),
    [
        (False, 8, 12),
        pytest.param(
            *(True, 32, 12),
            marks=[pytest.mark.vllm, pytest.mark.torch, pytest.mark.slow, pytest.mark.timeout(580)],
        ),
    ],
)
async def test_no_call_fails_and_every_span_names_the_weights_that_made_it(tmp_path, vllm, clients, updates):
    if vllm:
        pytest.importorskip("torch")
        if not PYTHON.exists():
            pytest.skip("there is no .venv-vllm; `make vllm` sets it up")
    summary = await Storm(tmp_path, vllm=vllm).run(clients, updates, pause_s=0.5)
    assert (summary["hung"], summary["errors"], summary["failed"], summary["wrong"]) == (0, {}, {}, [])
    assert summary["spans"] == summary["calls"] > 50
    assert summary["versions"] >= updates - 2  # that have made tokens
    assert summary["continued"] >= 1  # else the killed replica had nothing to say
