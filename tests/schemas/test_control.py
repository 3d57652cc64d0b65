"""Templates that come from the log."""

import os
from pathlib import Path
from typing import Any

import pytest
from jinja2 import TemplateError

from millstream.schemas.control import PromptTemplate, Resources


class Task:
    """A value as an agent may give it."""

    def __init__(self) -> None:
        self.word, self.tags, self._secret = "one", ["a"], "hidden"

    def shout(self) -> str:
        return self.word.upper()


def from_the_log(template: str, engine: Any) -> PromptTemplate:
    items = {"system": PromptTemplate(template=template, engine=engine)}
    found = Resources.from_control(Resources(resources_id="r", experiment_id="e", items=items).to_control()).items
    assert isinstance(found["system"], PromptTemplate)
    return found["system"]


@pytest.mark.parametrize(
    ("engine", "template"),
    [
        ("jinja2", "{{ cycler.__init__.__globals__.os.mkdir(path) }}"),
        ("jinja2", "{{ lipsum.__globals__['os'].mkdir(path) }}"),
        ("jinja2", "{{ ''.__class__.__mro__[1].__subclasses__() }}"),
        ("jinja2", "{{ (task|attr('__init__'))|attr('__globals__') }}"),
        ("jinja2", "{{ task.shout.__globals__ }}"),
        ("jinja2", "{{ task._secret }}"),
        ("jinja2", "{{ '{0._secret}'.format(task) }}"),
        ("jinja2", "{% set _ = task.tags.append('b') %}"),
        ("jinja2", "{% import 'os' as os %}{{ os.mkdir(path) }}"),
        ("jinja2", "{% include path %}"),
        ("jinja2", "{% for x in range(1000000000) %}{{ x }}{% endfor %}"),
        ("f-string", "{task._secret}"),
        ("f-string", "{task.shout.__globals__}"),
        ("f-string", "{task.__init__.__globals__[os].environ}"),
        ("f-string", "{path:{task._secret}}"),
    ],
)
def test_a_template_can_neither_run_code_nor_read_what_is_private(engine: Any, template: str, tmp_path: Path) -> None:
    task, made = Task(), tmp_path / "made"
    with pytest.raises((TemplateError, ValueError, OverflowError, TypeError)) as refused:
        from_the_log(template, engine).format(task=task, path=str(made))
    assert "hidden" not in str(refused.value)
    assert not made.exists()
    assert task.tags == ["a"]


@pytest.mark.parametrize(
    ("engine", "template"),
    [
        ("jinja2", "{{ task.word }}, {{ task.tags|join('-') }}, {{ task.shout() }}"),
        ("f-string", "{task.word}, {task.tags[0]}, {loud:>3}"),
    ],
)
def test_what_is_public_can_be_read(engine: Any, template: str) -> None:
    assert from_the_log(template, engine).format(task=Task(), loud="ONE") == "one, a, ONE"


def test_os_is_reachable_from_a_private_attribute() -> None:
    """The control: without the rule the template above would print it."""
    assert f"{Task().__init__.__globals__['os'].name}" == os.name
