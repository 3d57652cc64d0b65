"""What the dashboards ask of vLLM is what a real one exports."""

import pytest
from exposition import VLLM, labels_by_name

pytest.importorskip("torch")

pytestmark = [
    pytest.mark.vllm,
    pytest.mark.torch,
    pytest.mark.slow,
    pytest.mark.timeout(600),
    pytest.mark.asyncio(loop_scope="session"),
]


async def test_a_vllm_exports_what_was_recorded(server, client):
    """Names and labels. Record it again, with the families that deploy/grafana/make.py names, if this fails."""
    assert (await client.ask(5, stream=True)).status == 200
    async with client.session.get(f"{client.url}/metrics") as answer:
        exported = labels_by_name(await answer.text())
    recorded = labels_by_name(VLLM.read_text())
    assert len(recorded) >= 11
    assert {name: exported.get(name) for name in recorded} == recorded
