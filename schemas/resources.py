"""What rollouts work with: a resources version names LLMs, prompt templates, and objects of the user's own."""

import json
from collections.abc import Mapping
from dataclasses import asdict, dataclass, field
from typing import Any

from millstream.schemas.errors import ConfigError
from millstream.schemas.wire.records import Control


@dataclass(frozen=True, slots=True, kw_only=True)
class LLM:
    """A model that agents reach through the proxy."""

    model: str  # the name that agents ask for
    model_version: str  # run.epoch.step of its weights
    sampling: Mapping[str, Any] = field(default_factory=dict)  # request fields that hold unless the agent sets them
    endpoints: tuple[str, ...] = ()  # the proxies to call it through; none: those of the runner's settings


@dataclass(frozen=True, slots=True, kw_only=True)
class PromptTemplate:
    """A prompt with ``{named}`` gaps."""

    template: str

    def format(self, **values: object) -> str:
        return self.template.format(**values)


Resource = LLM | PromptTemplate | dict[str, Any]
_TYPES: dict[str, type[LLM] | type[PromptTemplate]] = {"llm": LLM, "prompt_template": PromptTemplate}


@dataclass(frozen=True, slots=True, kw_only=True)
class Resources:
    """One version. ``resources_id`` is a UUIDv7: later versions sort after earlier ones."""

    resources_id: str
    experiment_id: str
    items: Mapping[str, Resource]

    def to_control(self, created_at: int) -> Control:
        body = {
            name: asdict(item) | {"type": "llm" if isinstance(item, LLM) else "prompt_template"}
            if isinstance(item, LLM | PromptTemplate)
            else {"type": "object", "value": item}
            for name, item in self.items.items()
        }
        return Control(
            kind="resources",
            name=self.resources_id,
            experiment_id=self.experiment_id,
            body=json.dumps(body),
            created_at=created_at,
        )

    @classmethod
    def from_control(cls, record: Control) -> "Resources":
        """Raises `ConfigError` naming the version and item that can't be read."""
        items: dict[str, Resource] = {}
        try:
            for name, value in json.loads(record.body).items():
                kind = value.pop("type")
                if kind == "llm":
                    value["endpoints"] = tuple(value.get("endpoints", ()))
                items[name] = value["value"] if kind == "object" else _TYPES[kind](**value)
        except (ValueError, KeyError, TypeError, AttributeError) as error:
            raise ConfigError(f"resources {record.name}: {type(error).__name__}: {error}") from error
        return cls(resources_id=record.name, experiment_id=record.experiment_id, items=items)
