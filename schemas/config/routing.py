"""Which server answers a model's name, and with which version.

Model servers and name patterns are settings. Versions of a model are a `RoutingTable`: an immutable snapshot on the
control topic, which every proxy swaps in whole. Everything here is pure.
"""

import json
from collections.abc import Mapping
from dataclasses import asdict, dataclass, field, replace
from fnmatch import fnmatchcase
from pathlib import Path
from typing import Final, Literal, Self

from pydantic import BaseModel, ConfigDict, Field, SecretStr, field_validator, model_validator

from millstream.schemas.errors import ConfigError
from millstream.schemas.ids import new_id, rank
from millstream.schemas.wire.records import Control

KIND: Final = "routing"  # of the control records
KEPT: Final = 20  # versions of a model that a table holds; the oldest without weight go first


class Limits(BaseModel):
    """What one proxy lets through; what is beyond it waits in a queue."""

    model_config = ConfigDict(extra="forbid", frozen=True)

    max_concurrency: int | None = Field(default=None, ge=1, description="Calls at a time.")
    requests_per_minute: int | None = Field(default=None, ge=1)
    tokens_per_minute: int | None = Field(default=None, ge=1, description="Of prompts and answers.")
    max_queue: int = Field(default=1000, ge=0, description="Calls that wait; more are answered 429.")


class Upstream(BaseModel):
    """A model server, or several replicas of one: a table ``[upstreams.NAME]`` of the settings."""

    model_config = ConfigDict(extra="forbid", frozen=True)

    urls: tuple[str, ...] = Field(min_length=1, description="Roots of the replicas, without /v1.")
    kind: Literal["vllm", "openai", "anthropic"] = Field(
        default="vllm",
        description="vllm: a policy, asked for token ids (the demo engine, too); the others as they are.",
    )
    key_env: str = Field(default="", description="Environment variable of the proxy that holds its API key.")
    key_file: Path | None = Field(default=None, description="File that holds its API key.")
    strip_prefix: str = Field(default="", description="Cut off a model's name, as `local/`.")
    timeout_s: float = Field(default=600.0, gt=0, description="For a whole answer, retries included.")
    max_connections: int = Field(default=512, ge=1, description="Of a proxy to each replica.")
    limits: Limits = Field(default_factory=lambda: Limits())

    @field_validator("urls")
    @classmethod
    def _whole(cls, urls: tuple[str, ...]) -> tuple[str, ...]:
        for url in urls:
            if not url.startswith(("http://", "https://")):
                raise ValueError(f"{url!r} is not an address like http://host:8500")
        return tuple(url.rstrip("/") for url in urls)

    @model_validator(mode="after")
    def _one_key(self) -> Self:
        if self.key_env and self.key_file:
            raise ValueError("key_env and key_file are both given; one of them holds the key")
        return self

    @property
    def trainable(self) -> bool:
        """Its calls can be trained on: it tells token ids."""
        return self.kind == "vllm"

    def key(self, environment: Mapping[str, str]) -> SecretStr:
        """Empty if it needs none. Raises `ConfigError` naming what is missing."""
        if self.key_env:
            if self.key_env not in environment:
                raise ConfigError(f"key_env names {self.key_env}, which is not set in the proxy's environment")
            return SecretStr(environment[self.key_env])
        if self.key_file is None:
            return SecretStr("")
        try:
            return SecretStr(self.key_file.read_text("utf-8").strip())
        except (OSError, UnicodeDecodeError) as error:
            raise ConfigError(f"key_file {self.key_file} can't be read: {error}") from error


def upstream_of(model: str, routes: Mapping[str, str]) -> str | None:
    """Name of the upstream of the first pattern (a glob) that the model's name fits; None if none does."""
    return next((name for pattern, name in routes.items() if fnmatchcase(model, pattern)), None)


@dataclass(frozen=True, slots=True, kw_only=True)
class Arm:
    """One version of a model, and who serves it."""

    version: str  # run.epoch.step
    upstream: str  # its name in the proxies' settings
    served_as: str  # the model's name at that server; each LoRA adapter has its own
    weights: str = ""  # folder with the safetensors, for going back to it
    weight: float = 0.0  # share of the rollouts; 0: kept, and not used


@dataclass(frozen=True, slots=True, kw_only=True)
class RoutingTable:
    """A snapshot. ``table_id`` is a UUIDv7: later ones sort after earlier ones."""

    table_id: str = ""
    models: Mapping[str, tuple[Arm, ...]] = field(default_factory=dict)
    reason: str = ""  # what it came from, for people

    def choose(self, model: str, rollout_id: str, version: str = "") -> Arm | None:
        """The arm for a rollout: the one of ``version`` if the table has it (a pinned rollout); else by its share,
        the same for all calls of the rollout. None if the table says nothing of the model."""
        arms = self.models.get(model, ())
        for arm in arms:
            if version and arm.version == version:
                return arm
        used = [arm for arm in arms if arm.weight > 0]
        if not used:
            return None
        place = _share(model, rollout_id) * sum(arm.weight for arm in used)
        for arm in used:
            place -= arm.weight
            if place < 0:
                return arm
        return used[-1]

    def deploy(self, model: str, arm: Arm) -> "RoutingTable":
        """From now on all rollouts use this version; the others are kept."""
        kept = [replace(other, weight=0.0) for other in self.models.get(model, ()) if other.version != arm.version]
        return self._with(model, [*kept[-(KEPT - 1) :], replace(arm, weight=1.0)], f"deploy {model} {arm.version}")

    def rollback(self, model: str, version: str = "") -> "RoutingTable":
        """Back to a kept version; without one, to that before the one in use. Raises `ConfigError` if there is none."""
        arms = self._arms(model)
        if version:
            self._arm(model, version)
        else:
            used = [i for i, arm in enumerate(arms) if arm.weight > 0]
            if not used or used[0] == 0:
                raise ConfigError(f"model {model}: no version before the one in use is kept")
            version = arms[used[0] - 1].version
        back = [replace(arm, weight=float(arm.version == version)) for arm in arms]
        return self._with(model, back, f"rollback {model} to {version}")

    def split(self, model: str, shares: Mapping[str, float]) -> "RoutingTable":
        """Rollouts are shared among kept versions. Raises `ConfigError` naming a version that is not kept."""
        if not any(share > 0 for share in shares.values()) or any(not 0 <= share < 1e9 for share in shares.values()):
            raise ConfigError(f"model {model}: shares are numbers from 0 on, and one of them is above it: {shares}")
        for version in shares:
            self._arm(model, version)
        arms = [replace(arm, weight=shares.get(arm.version, 0.0)) for arm in self._arms(model)]
        said = ", ".join(f"{version}={share:g}" for version, share in shares.items())
        return self._with(model, arms, f"split {model} {said}")

    def to_control(self, created_at: int) -> Control:
        body = {
            "reason": self.reason,
            "models": {name: [asdict(a) for a in arms] for name, arms in self.models.items()},
        }
        return Control(kind=KIND, name=self.table_id, body=json.dumps(body), created_at=created_at)

    @classmethod
    def from_control(cls, record: Control) -> "RoutingTable":
        """Raises `ConfigError` naming the table that can't be read."""
        try:
            body = json.loads(record.body)
            models = {name: tuple(Arm(**arm) for arm in arms) for name, arms in body["models"].items()}
        except (ValueError, KeyError, TypeError, AttributeError) as error:
            raise ConfigError(f"routing table {record.name}: {type(error).__name__}: {error}") from error
        return cls(table_id=record.name, models=models, reason=body.get("reason", ""))

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


def _share(model: str, rollout_id: str) -> float:
    """A number in [0, 1) that a rollout always has for a model."""
    return rank(model, rollout_id) / (1 << 64)
