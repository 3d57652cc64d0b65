"""The bodies of the control topic's records: resources, routing tables, and commands to model servers. Pure."""

import time
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import asdict, dataclass, field, replace
from functools import cache
from string import Formatter
from typing import TYPE_CHECKING, Any, ClassVar, Final, Literal, Self, TypeVar

from pydantic import ConfigDict, TypeAdapter, ValidationError

from millstream.schemas.errors import ConfigError, problems_of
from millstream.schemas.ids import new_id, rank
from millstream.schemas.redaction import without_passwords
from millstream.schemas.spans.text import json_text, parsed
from millstream.schemas.wire.records import Control

if TYPE_CHECKING:  # slow to import, and few templates need it
    from jinja2.sandbox import ImmutableSandboxedEnvironment

KEPT: Final = 20  # of a model in a routing table; the oldest unused ones are dropped first

HEAVIEST: Final = 1e9  # weight of an arm
STRICT: Final = ConfigDict(extra="forbid", strict=True)

T = TypeVar("T")


def typed(form: type[T], value: Any) -> T:
    """The JSON value as ``form``, whose every field has its type: "1" is not a number. Raises ValueError if it is not
    one."""
    if form not in _adapters:
        _adapters[form] = TypeAdapter(form)
    found: T = _adapters[form].validate_json(json_text(value), strict=True)
    return found


_adapters: dict[type[Any], TypeAdapter[Any]] = {}


@dataclass(frozen=True, slots=True, kw_only=True)
class ControlBody:
    """What a control record says. The field ``name_field`` is the record's name."""

    __pydantic_config__: ClassVar = STRICT
    kind: ClassVar[str]
    name_field: ClassVar[str]

    def to_control(self, created_at: int | None = None) -> Control:
        """``created_at``: ns since the epoch; now by default."""
        return Control(
            kind=self.kind,
            name=getattr(self, self.name_field),
            experiment_id=getattr(self, "experiment_id", ""),
            body=self._text(),
            created_at=time.time_ns() if created_at is None else created_at,
        )

    @classmethod
    def from_control(cls, record: Control) -> Self:
        """Raises `ConfigError` naming the record if it can't be read."""
        try:
            return cls._parse(record, parsed(record.body))
        except ValidationError as error:
            raise ConfigError(f"{record.kind} {record.name}: {problems_of(error)}") from error
        except (ValueError, KeyError, TypeError, AttributeError) as error:
            raise ConfigError(f"{record.kind} {record.name}: {type(error).__name__}: {error}") from error

    def _text(self) -> str:
        """JSON that everybody who reads the topic or the store sees."""
        return without_passwords(json_text(self._body()))

    def _body(self) -> Any:
        return asdict(self)

    @classmethod
    def _parse(cls, record: Control, body: Any) -> Self:
        return typed(cls, body)


@dataclass(frozen=True, slots=True, kw_only=True)
class LLM:
    """A model that agents reach through the proxy."""

    __pydantic_config__: ClassVar = STRICT

    model: str  # the name that agents ask for
    model_version: str  # run.epoch.step of its weights
    sampling: Mapping[str, Any] = field(default_factory=dict)  # request fields that apply unless the agent sets them
    endpoints: tuple[str, ...] = ()  # proxies to call it through; empty: those of the runner's settings


@dataclass(frozen=True, slots=True, kw_only=True)
class PromptTemplate:
    """A prompt with placeholders: ``{name}``, as those of `str.format`, or Jinja2's ``{{ name }}`` and ``{% … %}``."""

    __pydantic_config__: ClassVar = STRICT

    template: str
    engine: Literal["f-string", "jinja2"] = "f-string"

    def format(self, **values: object) -> str:
        """The prompt. Jinja2 runs in its sandbox, and refuses names that have no value. Raises KeyError, ValueError for
        a private attribute (``{task.__class__}``), or Jinja2's errors."""
        if self.engine == "jinja2":
            return _jinja().from_string(self.template).render(**values)
        return _FORMATTER.vformat(self.template, (), values)

    def placeholders(self) -> frozenset[str]:
        """Its placeholders as they are written, without spaces at their ends: ``{name!r:>10}`` is another than
        ``{name}``. Raises ValueError if it is no template."""
        return frozenset(_jinja_placeholders(self.template) if self.engine == "jinja2" else _fields(self.template))


class _PublicFields(Formatter):
    """`str.format` for templates from the log: a private attribute would lead to all that the process knows."""

    def get_field(self, field_name: str, args: Any, kwargs: Any) -> Any:
        if "._" in field_name:
            raise ValueError(f"the placeholder {{{field_name}}} reads a private attribute")
        return super().get_field(field_name, args, kwargs)


_FORMATTER: Final = _PublicFields()


@cache
def _jinja() -> "ImmutableSandboxedEnvironment":
    from jinja2 import StrictUndefined
    from jinja2.sandbox import ImmutableSandboxedEnvironment

    return ImmutableSandboxedEnvironment(undefined=StrictUndefined, keep_trailing_newline=True)


def _jinja_placeholders(text: str) -> Iterator[str]:
    """Expressions and statements, in their order."""
    from jinja2 import TemplateSyntaxError

    try:
        _jinja().parse(text)
        words: list[str] = []
        for _, kind, value in _jinja().lex(text):
            if kind in ("variable_begin", "block_begin", "raw_begin"):
                words = []
            if kind != "whitespace":
                words.append(value.strip("-+ \n\t") if kind.endswith(("_begin", "_end")) else value)
            if kind in ("variable_end", "block_end", "raw_end"):
                yield " ".join(words)
    except TemplateSyntaxError as error:
        raise ValueError(f"line {error.lineno}: {error.message}") from None


def _fields(text: str) -> Iterator[str]:
    for _, name, form, conversion in Formatter().parse(text):
        if name is not None:
            yield f"{{{name}{f'!{conversion}' if conversion else ''}{f':{form}' if form else ''}}}"


Resource = LLM | PromptTemplate | dict[str, Any]
_TYPES: dict[str, type[LLM] | type[PromptTemplate]] = {"llm": LLM, "prompt_template": PromptTemplate}


@dataclass(frozen=True, slots=True, kw_only=True)
class Resources(ControlBody):
    """One version of what rollouts work with: LLMs, prompt templates and objects of the user's own by name.
    ``resources_id`` is a UUIDv7: later versions sort after earlier ones."""

    kind = "resources"
    name_field = "resources_id"
    resources_id: str
    experiment_id: str
    items: Mapping[str, Resource]

    def _text(self) -> str:
        return json_text(self._body())  # agents need the user's own objects and templates as they are

    def _body(self) -> Any:
        return {
            name: _described(item) | {"type": "llm" if isinstance(item, LLM) else "prompt_template"}
            if isinstance(item, LLM | PromptTemplate)
            else {"type": "object", "value": item}
            for name, item in self.items.items()
        }

    @classmethod
    def _parse(cls, record: Control, body: Any) -> Self:
        items: dict[str, Resource] = {}
        for name, value in body.items():
            kind = value.pop("type")
            items[name] = value["value"] if kind == "object" else typed(_TYPES[kind], value)
        return cls(resources_id=record.name, experiment_id=record.experiment_id, items=items)


def _described(item: LLM | PromptTemplate) -> dict[str, Any]:
    if isinstance(item, LLM):
        item = replace(item, endpoints=tuple(map(without_passwords, item.endpoints)))
    return asdict(item)


@dataclass(frozen=True, slots=True, kw_only=True)
class PromptVersion(ControlBody):
    """A candidate of a search over prompts: a resources version, where it comes from, and what it has earned so far.
    Scores are mean rewards."""

    kind = "prompt"
    name_field = "resources_id"
    resources_id: str  # the version's, also of one that was refused before it was published
    experiment_id: str
    number: int  # 0: the one that the search began with
    round: int
    parent: str = ""  # resources_id; empty for number 0
    edited: str = ""  # name of the template that differs from the parent's
    templates: Mapping[str, PromptTemplate]
    critique: str = ""  # of the parent, that it answers
    rollout_id: str = ""  # that critique and edit were recorded as
    stage: Literal["propose", "screen", "validate", "done"] = "done"
    refused: str = ""  # why it was not run, or not validated
    parent_score: float | None = None  # on the candidate's minibatch
    batch_score: float | None = None
    score: float | None = None  # on the validation batch


@dataclass(frozen=True, slots=True, kw_only=True)
class Arm:
    """One version of a model, and the upstream that serves it."""

    __pydantic_config__: ClassVar = STRICT

    version: str  # run.epoch.step
    upstream: str  # its name in the proxies' settings
    served_as: str  # the model's name at that server; each LoRA adapter has its own
    weights: str = ""  # folder with the safetensors, for a rollback
    weight: float = 0.0  # share of the rollouts; 0: kept but unused

    def __post_init__(self) -> None:
        if not 0 <= self.weight < HEAVIEST:
            raise ValueError(f"the weight {self.weight} is not a number from 0 to {HEAVIEST:g}")


@dataclass(frozen=True, slots=True, kw_only=True)
class RoutingTable(ControlBody):
    """The versions of all models: an immutable snapshot, which every proxy swaps in as a whole. ``table_id`` is a
    UUIDv7: later tables sort after earlier ones."""

    kind = "routing"
    name_field = "table_id"
    table_id: str = ""
    models: Mapping[str, tuple[Arm, ...]] = field(default_factory=dict)
    reason: str = ""  # what changed, for people

    def choose(self, model: str, rollout_id: str, version: str = "") -> Arm | None:
        """The arm for a rollout: the one of ``version`` if the table has it (a pinned rollout); else by its share,
        the same for all calls of the rollout. None if the table does not list the model."""
        arms = self.models.get(model, ())
        for arm in arms:
            if version and arm.version == version:
                return arm
        found = _drawn([arm.weight for arm in arms], model, rollout_id)
        return None if found is None else arms[found]

    def deploy(self, model: str, arm: Arm) -> "RoutingTable":
        """All rollouts use this version from now on; the others are kept."""
        kept = [replace(other, weight=0.0) for other in self.models.get(model, ()) if other.version != arm.version]
        return self._with(model, [*kept[-(KEPT - 1) :], replace(arm, weight=1.0)], f"deploy {model} {arm.version}")

    def rollback(self, model: str, version: str = "") -> "RoutingTable":
        """Back to a kept version; by default to the one before the current one. Raises `ConfigError` without one."""
        arms = self._arms(model)
        if version:
            self._arm(model, version)
        else:
            used = [i for i, arm in enumerate(arms) if arm.weight > 0]
            if not used or used[0] == 0:
                raise ConfigError(f"model {model}: no version before the current one is kept")
            version = arms[used[0] - 1].version
        back = [replace(arm, weight=float(arm.version == version)) for arm in arms]
        return self._with(model, back, f"rollback {model} to {version}")

    def split(self, model: str, shares: Mapping[str, float]) -> "RoutingTable":
        """Shares the rollouts among kept versions. Raises `ConfigError` naming a version that is not kept."""
        if problem := _wrong(shares):
            raise ConfigError(f"model {model}: {problem}")
        for version in shares:
            self._arm(model, version)
        arms = [replace(arm, weight=shares.get(arm.version, 0.0)) for arm in self._arms(model)]
        listed = ", ".join(f"{version}={share:g}" for version, share in shares.items())
        return self._with(model, arms, f"split {model} {listed}")

    @classmethod
    def _parse(cls, record: Control, body: Any) -> Self:
        return typed(cls, {**body, "table_id": record.name})

    def _arms(self, model: str) -> tuple[Arm, ...]:
        if model not in self.models:
            known = ", ".join(self.models) or "none"
            raise ConfigError(f"model {model} has not been deployed; known are: {known}")
        return self.models[model]

    def _arm(self, model: str, version: str) -> Arm:
        arms = self._arms(model)
        found = next((arm for arm in arms if arm.version == version), None)
        if found is None:
            raise ConfigError(f"model {model} has no version {version}; kept are {', '.join(a.version for a in arms)}")
        return found

    def _with(self, model: str, arms: list[Arm], reason: str) -> "RoutingTable":
        return RoutingTable(table_id=new_id(), models={**self.models, model: tuple(arms)}, reason=reason)


@dataclass(frozen=True, slots=True, kw_only=True)
class Split(ControlBody):
    """Shares the rollouts of an experiment that name no version among some of its resources versions. It holds while
    ``latest`` is the latest version: one that is published later applies to all, and so ends it."""

    kind = "split"
    name_field = "experiment_id"
    experiment_id: str
    latest: str  # resources_id
    shares: Mapping[str, float]  # resources_id → share

    def __post_init__(self) -> None:
        if problem := _wrong(self.shares):
            raise ValueError(problem)

    def choose(self, rollout_id: str) -> str:
        """The version for a rollout, always the same one."""
        found = _drawn([*self.shares.values()], self.experiment_id, rollout_id)
        assert found is not None  # not all shares are 0
        return [*self.shares][found]


def _wrong(shares: Mapping[str, float]) -> str:
    """Why nothing can be shared so; empty if it can."""
    given = shares.values()
    if any(share > 0 for share in given) and all(0 <= share < HEAVIEST for share in given):
        return ""
    return f"shares must be numbers from 0 on, at least one above 0: {dict(shares)}"


def _drawn(weights: Sequence[float], name: str, rollout_id: str) -> int | None:
    """The place of one of these weights, by its share: always the same for a name and a rollout. None if all are 0."""
    used = [(number, weight) for number, weight in enumerate(weights) if weight > 0]
    if not used:
        return None
    place = rank(name, rollout_id) / (1 << 64) * sum(weight for _, weight in used)
    for number, weight in used:
        place -= weight
        if place < 0:
            return number
    return used[-1][0]


@dataclass(frozen=True, slots=True, kw_only=True)
class ModelCommand(ControlBody):
    """A request to change a model's versions. ``command_id`` is a UUIDv7."""

    kind = "model-command"
    name_field = "command_id"
    command_id: str
    action: Literal["deploy", "rollback", "split"]
    model: str
    version: str = ""  # to deploy or to roll back to; empty: the one before
    folder: str = ""  # of the weights to deploy
    lora: bool = False
    shares: Mapping[str, float] = field(default_factory=dict)  # version → share, of a split

    def __post_init__(self) -> None:
        if self.action not in ("deploy", "rollback", "split"):
            raise ValueError(f"unknown action {self.action!r}")


@dataclass(frozen=True, slots=True, kw_only=True)
class ModelAnswer(ControlBody):
    """The result of a command: a routing table, or an error."""

    kind = "model-answer"
    name_field = "command_id"
    command_id: str
    table_id: str = ""
    error: str = ""


@dataclass(frozen=True, slots=True, kw_only=True)
class ServerState(ControlBody):
    """What the replicas of an upstream serve now."""

    kind = "model-server"
    name_field = "upstream"
    upstream: str
    model: str
    version: str  # of the whole model
    adapters: tuple[str, ...] = ()  # names of the LoRA adapters beside it
    replicas: tuple[Mapping[str, Any], ...] = ()  # url, alive, restarts of each
