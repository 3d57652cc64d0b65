"""What `import millstream` promises."""

import subprocess
import sys

import pytest

import millstream as ms


@pytest.mark.torch
def test_every_public_name_is_there():
    assert set(ms.__all__) == {*ms._HOMES, "integrations"}
    assert ms.integrations.__name__ == "millstream.integrations"
    for name in ms._HOMES:
        assert getattr(ms, name).__name__ == name
    with pytest.raises(AttributeError, match="no attribute 'train'"):
        _ = ms.train


def test_what_does_not_train_is_free_of_torch():
    code = (
        "import sys, millstream as ms; ms.Trainer; ms.emit_reward; ms.Store; import millstream.pipeline.cli.main, "
        "millstream.pipeline.deployment, millstream.consumers.runner.runner, millstream.pipeline.proxy; "
        "print('torch' in sys.modules or 'transformers' in sys.modules)"
    )
    answer = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert answer.stdout.strip() == "False"
