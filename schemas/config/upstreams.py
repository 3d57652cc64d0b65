"""Model servers and their limits, as settings, and which of them serves a model's name."""

from collections.abc import Mapping
from fnmatch import fnmatchcase
from pathlib import Path
from typing import Literal, Self

from pydantic import BaseModel, ConfigDict, Field, SecretStr, field_validator, model_validator

from millstream.schemas.errors import ConfigError
from millstream.schemas.redaction import has_password


class Limits(BaseModel):
    """Limits of one proxy; calls beyond them wait in a queue."""

    model_config = ConfigDict(extra="forbid", frozen=True)

    max_concurrency: int | None = Field(default=None, ge=1, description="Concurrent calls.")
    requests_per_minute: int | None = Field(default=None, ge=1)
    tokens_per_minute: int | None = Field(default=None, ge=1, description="Tokens of prompts and answers.")
    max_queue: int = Field(default=1000, ge=0, description="Calls that may wait; more are answered with 429.")


class Upstream(BaseModel):
    """A model server, or several replicas of one: a table ``[upstreams.NAME]`` of the settings."""

    model_config = ConfigDict(extra="forbid", frozen=True)

    urls: tuple[str, ...] = Field(min_length=1, description="Roots of the replicas, without /v1.")
    kind: Literal["vllm", "openai", "anthropic"] = Field(
        default="vllm",
        description="vllm: a trainable policy that returns token ids (the demo engine, too).",
    )
    key_env: str = Field(default="", description="The proxy's environment variable with its API key.")
    key_file: Path | None = Field(default=None, description="File with its API key.")
    strip_prefix: str = Field(default="", description="Removed from a model's name, such as `local/`.")
    timeout_s: float = Field(default=600.0, gt=0, description="Seconds for a whole answer, including retries.")
    max_connections: int = Field(default=512, ge=1, description="Connections of a proxy to each replica.")
    limits: Limits = Field(default_factory=lambda: Limits())

    @field_validator("urls")
    @classmethod
    def _whole(cls, urls: tuple[str, ...]) -> tuple[str, ...]:
        for url in urls:
            if not url.startswith(("http://", "https://")):
                raise ValueError(f"{url!r} is not an address like http://host:8500")
            if has_password(url):
                raise ValueError("an address must not hold a password: give the key by key_file or key_env")
        return tuple(url.rstrip("/") for url in urls)

    @model_validator(mode="after")
    def _one_key(self) -> Self:
        if self.key_env and self.key_file:
            raise ValueError("key_env and key_file are both set; set one of them")
        return self

    @property
    def trainable(self) -> bool:
        """Whether its calls can be trained on: it returns token ids."""
        return self.kind == "vllm"

    def key(self, environment: Mapping[str, str]) -> SecretStr:
        """Its API key; empty without one. Raises `ConfigError` naming what is missing."""
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
    """The upstream of the first glob pattern that matches the model's name; None if none does."""
    return next((name for pattern, name in routes.items() if fnmatchcase(model, pattern)), None)
