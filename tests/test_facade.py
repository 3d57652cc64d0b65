"""What `import millstream` promises."""

import ast
import subprocess
import sys
from pathlib import Path

import pytest

import millstream as ms


def for_type_checkers() -> dict[str, str]:
    """The names of the facade's ``if TYPE_CHECKING`` block, with the modules they come from."""
    tree = ast.parse(Path(ms.__file__).read_text("utf-8"))
    (block,) = (node for node in tree.body if isinstance(node, ast.If))
    imports = [node for node in block.body if isinstance(node, ast.ImportFrom)]
    assert len(imports) == len(block.body)
    return {alias.asname: node.module for node in imports for alias in node.names}


def test_type_checkers_see_what_is_loaded():
    assert for_type_checkers() == {**ms._HOMES, "integrations": "millstream"}
    assert set(ms.__all__) == {*ms._HOMES, "integrations"}
    assert dir(ms) == sorted(ms.__all__)


@pytest.mark.torch
@pytest.mark.parametrize("name", ms.__all__)
def test_every_public_name_loads(name):
    value = getattr(ms, name)
    assert value.__name__ == ("millstream.integrations" if name == "integrations" else name)


def test_an_unknown_name_is_an_attribute_error():
    with pytest.raises(AttributeError, match="no attribute 'train'"):
        _ = ms.train


def test_what_does_not_train_does_not_import_torch():
    code = (
        "import sys, millstream as ms; ms.Trainer; ms.emit_reward; ms.Store; import millstream.pipeline.cli.main, "
        "millstream.pipeline.training.deployment, millstream.consumers.runner.runner, millstream.pipeline.proxy; "
        "print('torch' in sys.modules or 'transformers' in sys.modules)"
    )
    answer = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert answer.stdout.strip() == "False"
