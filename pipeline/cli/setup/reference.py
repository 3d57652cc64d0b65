"""The reference pages that are written from code: settings, fields of a task, training files, tables of the store."""

import re
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Annotated, Any, Final, Literal, get_args, get_origin

from pydantic import BaseModel, SecretStr
from pydantic.fields import FieldInfo
from pydantic_core import PydanticUndefined

from millstream.schemas.spans.text import json_text

THOUSAND: Final = 1000
PAGES: Final = ("settings", "tasks", "training-files", "tables")
VIEW_COLUMNS: Final = """
SELECT table, name, type FROM system.columns
WHERE database = currentDatabase() AND table IN (
    SELECT name FROM system.tables WHERE database = currentDatabase() AND engine = 'View'
)
ORDER BY table, position
"""
Page = Literal["settings", "tasks", "training-files", "tables"]


def page(name: Page) -> str:
    """Markdown. That of the tables makes a store in memory, which takes a second or two."""
    return f"<!-- Written by `millstream config docs {name}`: edit the code. -->\n\n{_WRITERS[name]()}"


def _settings() -> str:
    from millstream.schemas.config.settings import ENV_PREFIX, Settings
    from millstream.schemas.config.triplet_rules import TripletRules
    from millstream.schemas.config.upstreams import Limits, Upstream

    head = f"""# Settings

Each setting comes from an argument of a command, else from the variable `{ENV_PREFIX}NAME` (upper case), else from
`millstream.toml` in the current folder (or the file that `{ENV_PREFIX}CONFIG` names), else it has its default. A secret
may be given by the name of a file that holds it: `proxy_secret_file`. In a variable, a table is JSON.
`millstream config show` prints the values that hold, and where each comes from.
"""
    parts = [
        head,
        _table(Settings),
        f"## Model servers: `[upstreams.NAME]`\n\n{_table(Upstream)}",
        f"## Limits: `limits` of an upstream, `[key_limits]`, `[route_limits.NAME]`\n\n{_table(Limits)}",
        f"## Triplets: `[triplets]`\n\n[Triplets](triplets.md) explains them.\n\n{_table(TripletRules)}",
    ]
    return "\n".join(parts)


def _tasks() -> str:
    from millstream.producers.tasks import TaskLine

    head = """# Fields of a task

A line of a tasks file (`millstream publish`, `tasks` of a training file) is a JSON object with these fields, as is a
task of the gateway's `POST /tasks`. Only `input` has to be there.
"""
    example = '```json\n{"input": {"question": "Repeat the word add."}, "priority": "high", "max_attempts": 3}\n```\n'
    return f"{head}\n{example}\n{_table(TaskLine)}"


def _training_files() -> str:
    from millstream.pipeline.algorithms.options import (
        PRESETS,
        PROMPTS,
        LearnerOptions,
        Recorded,
        RecordedGroups,
        Rft,
        RubricOptions,
        Supervision,
        Torch,
        VerlTable,
        type_of,
    )
    from millstream.pipeline.prompts.options import PromptConfig
    from millstream.pipeline.training.config import ModelConfig, ReportConfig, TrainConfig

    kinds: tuple[type[BaseModel], ...] = (*get_args(Torch), Rft, *get_args(Supervision), VerlTable, *PROMPTS)
    common = kinds[0]
    types = ", ".join(f"`{type_of(kind)}`" for kind in kinds)
    prompts = " and ".join(f"`{type_of(kind)}`" for kind in PROMPTS)
    parts = [
        "# Training files\n\nWhat a file for `millstream train` may hold; [Training](training.md) explains it. "
        "`millstream train FILE --dry-run` checks a file and prints it with all defaults.\n",
        _table(TrainConfig),
        f"## `[model]`\n\n{_table(ModelConfig)}",
        f"## `[report]`\n\n{_table(ReportConfig)}",
        f"## `[prompts.NAME]`\n\n{_table(PromptConfig)}",
        f"## `[algorithm]`\n\n`type` is one of {types}. All but `verl` and {prompts} take these options, and `rft`, "
        "`sft` and `dpo` some of them:\n\n"
        + _rows({name: field for name, field in common.model_fields.items() if name != "type"}),
    ]
    presets = [
        f"`{name}`: {', '.join(f'{k} = {v}' for k, v in values.items())}" for name, values in PRESETS.items() if values
    ]
    parts.append(f"Defaults of a `preset`: {'; '.join(presets)}.\n")
    parts.append(f"### `[algorithm.data]`\n\n{_table(RecordedGroups)}")
    parts.append(f"### `[algorithm.rubric]`\n\n{_table(RubricOptions)}")
    for kind in kinds:
        shared = common.model_fields if issubclass(kind, LearnerOptions) else {}
        own = {n: f for n, f in kind.model_fields.items() if n != "type" and repr(f) != repr(shared.get(n))}
        about = " ".join((kind.__doc__ or "").split())
        without = [f"`{name}`" for name in common.model_fields if name not in kind.model_fields]
        if kind in (Rft, *get_args(Supervision)):
            about = f"{about} It has no {', '.join(without[:-1])} and {without[-1]}."
        parts.append(f'### `type = "{type_of(kind)}"`\n\n{about}\n' + (f"\n{_rows(own)}" if own else ""))
        parts += [
            f"#### `[algorithm.{name}]`\n\n{_table(field.annotation)}"
            for name, field in own.items()
            if isinstance(field.annotation, type)
            and issubclass(field.annotation, BaseModel)
            and field.annotation is not Recorded  # which is explained once
        ]
    return "\n".join(parts)


def _tables() -> str:
    from millstream.consumers.sink.clickhouse_writer import ClickHouseWriter
    from millstream.consumers.sink.migrations import packaged_migrations
    from millstream.schemas.config.settings import load_settings

    writer = ClickHouseWriter(load_settings(clickhouse_dsn="chdb://:memory:", clickhouse_database="reference"))
    try:
        writer.migrate()
        found = writer.client.query(VIEW_COLUMNS).result_rows
    finally:
        writer.close()
    about = _comments("\n".join(migration.sql for migration in packaged_migrations()))
    parts = [
        "# Tables of the store\n\nThe views to query; [the store](store.md) has examples. Times are UTC. The tables "
        "behind them (`…_raw`) are the sink's, and may change.\n"
    ]
    for view in dict.fromkeys(view for view, _, _ in found):
        rows = "\n".join(f"| `{name}` | {_cell(kind)} |" for of, name, kind in found if of == view)
        said = f"{about[view]}\n\n" if about.get(view) else ""
        parts.append(f"## `{view}`\n\n{said}| column | type |\n|---|---|\n{rows}\n")
    return "\n".join(parts)


def _comments(sql: str) -> dict[str, str]:
    """What stands before the last definition of each view."""
    found: dict[str, str] = {}
    for match in re.finditer(r"((?:^--[^\n]*\n)*)^CREATE OR REPLACE VIEW (\w+)", sql, re.MULTILINE):
        text = " ".join(line.removeprefix("--").strip() for line in match[1].splitlines())
        found[match[2]] = text or found.get(match[2], "")
    return found


def _table(model: type[BaseModel]) -> str:
    return _rows(model.model_fields)


def _rows(fields: Mapping[str, FieldInfo]) -> str:
    rows = [
        f"| `{name}` | {_cell(_kind(field.annotation))} | {_cell(_default(field))} | {_cell(_meaning(field))} |"
        for name, field in fields.items()
    ]
    return "\n".join(["| name | type | default | meaning |", "|---|---|---|---|", *rows, ""])


def _meaning(field: FieldInfo) -> str:
    text = field.description or ""
    bounds = {type(each).__name__: each for each in field.metadata}
    words = [
        f"{sign} {_number(getattr(bounds[kind], kind.lower()))}"
        for kind, sign in (("Ge", "≥"), ("Gt", ">"), ("Le", "≤"), ("Lt", "<"))
        if kind in bounds
    ]
    return f"{text} ({', '.join(words)})".strip() if words else text


def _number(value: float) -> str:
    return f"{value:,.0f}" if abs(value) >= THOUSAND else f"{value:g}"


def _kind(annotation: Any) -> str:
    origin, arguments = get_origin(annotation), get_args(annotation)
    if annotation is None or annotation is type(None):
        return "nothing"
    if origin is Literal:
        return ", ".join(f"`{value}`" for value in arguments)
    if origin is Annotated:
        return _kind(arguments[0])
    if origin in (list, tuple):
        return f"list of {_kind(arguments[0])}"
    if origin is dict:
        return f"table of {_kind(arguments[1])}"
    if arguments and origin is not None:
        return " or ".join(dict.fromkeys(_kind(each) for each in arguments if each is not type(None)))
    if isinstance(annotation, type) and annotation is not Any:
        if issubclass(annotation, BaseModel):
            return "table"
        return next((word for kind, word in _KINDS.items() if issubclass(annotation, kind)), annotation.__name__)
    return "any JSON value"


def _default(field: FieldInfo) -> str:
    if field.is_required():
        return "required"
    value = field.default if field.default is not PydanticUndefined else field.get_default(call_default_factory=True)
    if isinstance(value, SecretStr) or value is None or value in ("", (), [], {}):
        return ""
    if isinstance(value, BaseModel):
        return ""
    return f"`{value if isinstance(value, str | Path) else json_text(value, str)}`"


def _cell(text: str) -> str:
    return text.replace("|", "\\|").replace("\n", " ")


_KINDS: Final[dict[type, str]] = {
    bool: "true, false",  # before int, which it is
    int: "integer",
    float: "number",
    str: "text",
    Path: "path",
    SecretStr: "secret",
}
_WRITERS: Final[dict[str, Callable[[], str]]] = {
    "settings": _settings,
    "tasks": _tasks,
    "training-files": _training_files,
    "tables": _tables,
}
