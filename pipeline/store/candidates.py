"""The candidates of a search over prompts, as the store holds them."""

from collections.abc import Iterator, Mapping
from difflib import ndiff
from typing import Any, Final

from millstream.pipeline.store.queries import Ask, read_latest_resources
from millstream.schemas.control import PromptTemplate
from millstream.schemas.errors import ConfigError
from millstream.schemas.spans.text import parsed

CANDIDATES: Final = """
SELECT * REPLACE (toUnixTimestamp64Nano(created_at) AS created_at)
FROM prompts
WHERE experiment_id = {id:String}
ORDER BY number
"""


def candidates_of(ask: Ask, experiment_id: str) -> list[dict[str, Any]]:
    """The rows of the view ``prompts``, by number, each with its ``templates`` (texts by name), its ``parent_number``
    (None for the first), and whether it is ``current``. Empty without any."""
    rows = ask(CANDIDATES, {"id": experiment_id}).records()
    if not rows:
        return []
    current = read_latest_resources(ask, experiment_id)  # what rollouts without a version of their own get now
    items = {} if current is None else current.items
    now = {name: item.template for name, item in items.items() if isinstance(item, PromptTemplate)}
    numbers = {row["resources_id"]: row["number"] for row in rows}
    for row in rows:
        full = parsed(row["templates"])
        row["engines"] = {name: each["engine"] for name, each in full.items()}
        row["templates"] = {name: each["template"] for name, each in full.items()}
        row["parent_number"] = numbers.get(row["parent"])
        row["current"] = row["templates"] == now and row["stage"] != "propose" and not row["refused"]
    return rows


def candidate(rows: list[dict[str, Any]], wanted: str, experiment_id: str) -> dict[str, Any]:
    """One of them, by its number or its resources version. Raises `ConfigError`."""
    for row in rows:
        if wanted in (str(row["number"]), row["resources_id"]):
            return row
    if not rows:
        raise ConfigError(f"experiment {experiment_id} has no candidates: it was no search for prompts")
    numbers = ", ".join(str(row["number"]) for row in rows)
    raise ConfigError(f"experiment {experiment_id} has no candidate {wanted}; there are: {numbers}")


def templates_of(row: Mapping[str, Any]) -> dict[str, PromptTemplate]:
    return {name: PromptTemplate(template=text, engine=row["engines"][name]) for name, text in row["templates"].items()}


def changes(old: Mapping[str, str], new: Mapping[str, str]) -> Iterator[tuple[str, str, str]]:
    """The lines of the templates that differ: the template's name, "-", "+" or " ", and the line."""
    for name in sorted({*old, *new}):
        before, after = old.get(name, "").splitlines(), new.get(name, "").splitlines()
        if before == after:
            continue
        for line in ndiff(before, after):
            if line[0] in "-+ ":
                yield name, line[0], line[2:]
