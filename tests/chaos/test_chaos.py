"""A short chaos run: whatever is killed, refused or poisoned, every rollout ends exactly once. `make chaos` is the long
one."""

import pytest
from faults import KINDS
from harness import run

pytestmark = [pytest.mark.kafka, pytest.mark.chaos, pytest.mark.slow, pytest.mark.timeout(580)]


def test_twenty_faults_lose_nothing_and_double_nothing(tmp_path):
    summary = run(kills=20, seed=7, folder=tmp_path / "run")
    assert summary["problems"] == {}
    assert summary["kills"] == 20
    assert all(summary["kills_by_kind"][kind] >= 1 for kind in KINDS if kind not in summary["skipped"])
    assert summary["published"] == summary["ended"] > 100
    assert summary["poison"] > 20
    assert summary["lost"] == summary["duplicate_ends"] == summary["duplicate_triplets"] == 0
