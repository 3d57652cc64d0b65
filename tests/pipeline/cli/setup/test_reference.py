"""The reference pages are those that the code writes."""

import os
import subprocess
import sys
from pathlib import Path

import pytest

from millstream.pipeline.cli.setup.reference import PAGES
from millstream.producers.tasks import TaskLine
from millstream.schemas.config.settings import Settings

ROOT = Path(__file__).parents[4]


@pytest.mark.parametrize("name", PAGES)
def test_a_page_is_as_the_code_writes_it(name: str, tmp_path: Path) -> None:
    """Entries B4 and B5. In a process of its own: a store in memory may be the only one of a process."""
    clean = {key: value for key, value in os.environ.items() if not key.startswith("MILLSTREAM_")}
    command = [sys.executable, "-m", "millstream.pipeline", "config", "docs", name]
    written = subprocess.run(command, cwd=tmp_path, env=clean, capture_output=True, text=True, check=True).stdout
    page = ROOT / "docs" / f"{name}.md"
    assert page.read_text() == written, f"run `millstream config docs {name} > docs/{name}.md`"
    assert written.count("\n| `") > 10


@pytest.mark.parametrize("model", [Settings, TaskLine])
def test_each_setting_and_field_says_what_it_means(model: type[Settings] | type[TaskLine]) -> None:
    assert [name for name, field in model.model_fields.items() if not field.description] == []


def test_each_option_of_a_training_file_says_what_it_means() -> None:
    text = (ROOT / "docs" / "training-files.md").read_text()
    assert [line for line in text.splitlines() if line.endswith("|  |")] == []
    assert all(f'### `type = "{kind}"`' in text for kind in ("grpo", "rft", "sft", "dpo", "verl"))


def test_no_page_shows_a_secret_or_this_machine() -> None:
    for name in PAGES:
        text = (ROOT / "docs" / f"{name}.md").read_text()
        assert str(Path.home()) not in text
        assert str(ROOT) not in text
