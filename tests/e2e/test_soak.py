"""An hour of simulated traffic through all roles: nothing that they hold grows. `SOAK_ROLLOUTS=100000` is all of it,
which takes half an hour."""

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest

ROLLOUTS = int(os.environ.get("SOAK_ROLLOUTS", "2000"))


@pytest.mark.slow
@pytest.mark.timeout(3600)
def test_no_role_grows_within_an_hour():
    command = [sys.executable, str(Path(__file__).with_name("soak.py")), "--rollouts", str(ROLLOUTS)]
    found = json.loads(subprocess.run(command, check=True, stdout=subprocess.PIPE).stdout)
    print(json.dumps(found))
    assert found["growing"] == {}
    assert found["ends"] == {"succeeded": ROLLOUTS * 0.9, "cancelled": ROLLOUTS * 0.1}
    assert found["records"]["DeadLetter"] == ROLLOUTS / 100
