"""Settings of a deployment: arguments over ``MILLSTREAM_…`` environment over a TOML file over the defaults.

A secret may be given by the name of a file that holds it, as ``proxy_secret_file``.
"""

import difflib
import logging
import os
import tomllib
from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import Annotated, Any, Literal

from pydantic import Field, SecretStr, ValidationError, ValidationInfo, field_validator
from pydantic_settings import (
    BaseSettings,
    PydanticBaseSettingsSource,
    SettingsConfigDict,
    SettingsError,
    TomlConfigSettingsSource,
)

from millstream.schemas.config.secret_files import SUFFIX, readable_by_all, with_files_read
from millstream.schemas.config.triplet_rules import TripletRules
from millstream.schemas.config.upstreams import Limits, Upstream
from millstream.schemas.errors import ConfigError
from millstream.schemas.redaction import has_password
from millstream.schemas.spans.blobs import DEFAULT_URL
from millstream.schemas.wire.records import LONGEST_ATTEMPT_S, LONGEST_LEASE_S
from millstream.schemas.wire.topics import Topics

logger = logging.getLogger(__name__)

SECRET_BYTES = 32  # of proxy_secret: with it the key of any attempt can be made
ENV_PREFIX = "MILLSTREAM_"
CONFIG_VARIABLE = "MILLSTREAM_CONFIG"  # path of the TOML file; not a setting itself
DEFAULT_CONFIG = "millstream.toml"
MAX_ATTEMPTS = 1000  # of a task: one that always fails has to end
ACCEPTED_NAMES = {
    "timeout_seconds": "timeout_s",
    "cache_ttl": "cache_ttl_s",
}  # accepted in every source of settings

RetentionTable = Literal[
    "tasks", "attempts", "rollout_ends", "spans", "token_ids", "triplets", "training_steps", "workers", "dead_letters"
]


class Settings(BaseSettings):
    """The settings of all roles. Use `load_settings`, which reports all problems in one clear error."""

    model_config = SettingsConfigDict(env_prefix=ENV_PREFIX, extra="forbid", frozen=True)

    # The log
    kafka_bootstrap_servers: str = Field("127.0.0.1:9092", description="Brokers, host:port, comma-separated.")
    kafka_security_protocol: Literal["PLAINTEXT", "SSL", "SASL_PLAINTEXT", "SASL_SSL"] = Field(
        "PLAINTEXT", description="How clients connect to the brokers."
    )
    kafka_security_mechanism: Literal["PLAIN", "SCRAM-SHA-256", "SCRAM-SHA-512"] = Field(
        "SCRAM-SHA-512", description="How clients log in, with SASL."
    )
    kafka_security_username: str = Field("", description="User, with SASL.")
    kafka_security_password: SecretStr = Field(SecretStr(""), description="Password, with SASL.")
    kafka_security_ca_file: Path | None = Field(None, description="PEM file of the brokers' authority.")
    kafka_security_cert_file: Path | None = Field(None, description="PEM file of this client's certificate.")
    kafka_security_key_file: Path | None = Field(None, description="PEM file of this client's key.")
    topic_prefix: str = Field(
        "millstream", pattern=r"^[a-zA-Z0-9._-]{1,200}$", description="First part of the names of topics and groups."
    )
    kafka_partitions: int = Field(8, ge=1, description="Partitions of tasks, events and triplets; fixed for good.")
    kafka_replication_factor: int = Field(1, ge=1, description="Copies of each partition that the brokers keep.")
    compression: Literal["none", "lz4", "zstd", "gzip", "snappy"] = Field("lz4", description="Of records in the log.")
    max_record_bytes: int = Field(16 << 20, ge=1 << 16, description="Limit of topics, producers and fetchers alike.")

    # The store
    clickhouse_dsn: str = Field(
        "chdb://runs/store",
        description="clickhouse://user@host:8123, or chdb://folder (embedded; one process a folder).",
    )
    clickhouse_database: str = Field(
        "millstream", pattern=r"^[A-Za-z_][A-Za-z0-9_]*$", description="Database of tables and views."
    )
    clickhouse_cluster: str = Field(
        "",
        pattern=r"^[A-Za-z0-9_.-]*$",
        description="Cluster (of system.clusters) over whose hosts the tables are spread; empty: one server.",
    )
    clickhouse_password: SecretStr = Field(SecretStr(""), description="Password of the store's user.")
    clickhouse_secure: bool = Field(False, description="TLS to the ClickHouse server.")
    store_connection_pool: int = Field(8, ge=1, description="HTTP connections a process keeps to ClickHouse.")
    span_batch_size: int = Field(10_000, ge=1, description="Records that the sink stores at once, at most.")
    retention_days: dict[RetentionTable, Annotated[int, Field(ge=1, le=10_000)]] = Field(
        {}, description='Days that a table keeps its rows, as JSON: {"spans": 30}; for ever if it isn\'t named.'
    )
    blob_url: str = Field(
        DEFAULT_URL,
        description="Where contents of more than 256 KB are kept: a folder that all roles see, s3://bucket/folder …",
    )

    # Rollouts
    runner_concurrency: int = Field(8, ge=1, le=10_000, description="Attempts at a time in one agent process.")
    runner_processes: int = Field(
        1, ge=0, le=1000, description="Agent processes of a runner; 0: threads of the runner itself."
    )
    retry_max_attempts: int = Field(
        1, ge=1, le=MAX_ATTEMPTS, description="Attempts that a task gets unless it says otherwise."
    )
    # Generous: losing a machine is not the task's fault. Finite: a task that kills its runners has to end.
    retry_max_lost_attempts: int = Field(
        10, ge=0, le=MAX_ATTEMPTS, description="Lost attempts of a task that are forgiven."
    )
    timeout_s: float = Field(
        600.0, gt=0, le=LONGEST_ATTEMPT_S, description="Seconds an attempt may run, unless its task says."
    )
    lease_s: float = Field(
        30.0, gt=0, le=LONGEST_LEASE_S, description="Seconds without a heartbeat until an attempt is lost."
    )

    triplets: TripletRules = Field(TripletRules(), description="Which calls train and what they earn.")

    # The model
    proxy_url: str = Field(
        "http://127.0.0.1:8400",
        description="Where runners reach the LLM proxy; several, comma-separated, share the work.",
    )
    proxy_secret: SecretStr = Field(SecretStr(""), description="Signs attempt keys; runners and proxies share it.")
    model_url: str = Field("http://127.0.0.1:8500", description="The policy's server, unless `upstreams` are given.")
    upstreams: dict[str, Upstream] = Field({}, description="Model servers by name: `[upstreams.NAME]`.")
    routes: dict[str, str] = Field({}, description="Model name, or glob, → upstream; the first that fits counts.")
    key_limits: Limits = Field(Limits(), description="What a proxy lets each attempt do.")
    route_limits: dict[str, Limits] = Field({}, description="Model name, or glob of `routes` → what is let through.")
    proxy_shared_key: SecretStr = Field(SecretStr(""), description="A key that fits every attempt, for laptops.")
    vllm_python: Path = Field(Path(".venv-vllm/bin/python"), description="Interpreter that has vLLM: `make vllm`.")
    verl_python: Path = Field(Path(".venv-verl/bin/python"), description="Interpreter that has verl: `make verl`.")
    weights_root: Path = Field(Path("runs"), description="Folder that weights have to lie below.")
    cache_ttl_s: float = Field(0.0, ge=0, description="Seconds the proxy repeats answers of temperature 0; 0: never.")

    # Processes
    log_level: Literal["debug", "info", "warning", "error"] = Field("info", description="Least level of log lines.")
    log_format: Literal["text", "json"] = Field("text", description="Form of log lines; one for each event.")
    health_host: str = Field(
        "127.0.0.1", description="Where --health-port listens; 0.0.0.0 for probes from other machines."
    )

    # The gateway
    gateway_token: SecretStr = Field(SecretStr(""), description="Bearer token that the gateway asks for.")
    gateway_url: str = Field("", description="Where agents' own processes send spans by OTLP; empty: nowhere.")

    @field_validator("proxy_secret")
    @classmethod
    def _strong(cls, secret: SecretStr) -> SecretStr:
        if 0 < len(secret.get_secret_value().encode()) < SECRET_BYTES:
            raise ValueError(f"give it {SECRET_BYTES} bytes or more, for example from `openssl rand -hex 32`")
        return secret

    @field_validator("clickhouse_cluster")
    @classmethod
    def _of_a_server(cls, cluster: str, info: ValidationInfo) -> str:
        if cluster and str(info.data.get("clickhouse_dsn", "")).startswith("chdb://"):
            raise ValueError(
                "an embedded store has no cluster: set clickhouse_dsn to a server, clickhouse://user@host:8123"
            )
        return cluster

    @field_validator("proxy_url", "model_url", "gateway_url")
    @classmethod
    def _without_password(cls, url: str) -> str:
        if has_password(url):
            raise ValueError("a URL must not hold a password: it is recorded, and calls carry keys of their own")
        return url

    @property
    def proxy_urls(self) -> tuple[str, ...]:
        return tuple(url.strip().rstrip("/") for url in self.proxy_url.split(",") if url.strip())

    @property
    def topics(self) -> Topics:
        return Topics(self.topic_prefix, self.kafka_partitions, 1 if self.kafka_partitions <= 8 else 8)

    @classmethod
    def settings_customise_sources(
        cls,
        settings_cls: type[BaseSettings],
        init_settings: PydanticBaseSettingsSource,
        env_settings: PydanticBaseSettingsSource,
        dotenv_settings: PydanticBaseSettingsSource,
        file_secret_settings: PydanticBaseSettingsSource,
    ) -> tuple[PydanticBaseSettingsSource, ...]:
        variables = {new: ENV_PREFIX + old.upper() for old, new in ACCEPTED_NAMES.items()}
        accepted = {new: os.environ[variable] for new, variable in variables.items() if variable in os.environ}
        secrets = {name: ENV_PREFIX + name.upper() for name in (*SECRETS, *(name + SUFFIX for name in SECRETS))}
        accepted |= {name: os.environ[variable] for name, variable in secrets.items() if variable in os.environ}
        file = TomlConfigSettingsSource(settings_cls, config_file())
        sources: list[Any] = [init_settings, env_settings, lambda: _read(accepted), lambda: _read(file())]
        return tuple(sources)


SECRETS = frozenset(name for name, field in Settings.model_fields.items() if field.annotation is SecretStr)


def _read(values: Mapping[str, Any]) -> dict[str, Any]:
    return with_files_read(_canonical(values), SECRETS)


def _canonical(values: Mapping[str, Any]) -> dict[str, Any]:
    return {ACCEPTED_NAMES.get(name, name): value for name, value in values.items()}


def config_file() -> Path:
    return Path(os.environ.get(CONFIG_VARIABLE, DEFAULT_CONFIG))


def load_settings(**overrides: Any) -> Settings:
    """Settings from everywhere; ``overrides`` (None means "not given") come first.

    Raises `ConfigError` naming each unknown or malformed setting and where it was set.
    """
    known = Settings.model_fields.keys() | ACCEPTED_NAMES.keys() | {name + SUFFIX for name in SECRETS}
    if CONFIG_VARIABLE in os.environ and not config_file().is_file():
        raise ConfigError(f"{CONFIG_VARIABLE} names {config_file()}, which is not a file")
    _refuse_unknown(
        (key for key in os.environ if key.upper().startswith(ENV_PREFIX) and key != CONFIG_VARIABLE),
        {ENV_PREFIX + name.upper() for name in known},
        "environment variable",
    )
    if config_file().is_file():
        try:
            names = tomllib.loads(config_file().read_text("utf-8"))
        except OSError as error:
            raise ConfigError(f"{config_file()} can't be read: {error.strerror}") from error
        except (tomllib.TOMLDecodeError, UnicodeDecodeError) as error:
            raise ConfigError(f"{config_file()} is not TOML: {error}") from error
        _refuse_unknown(names, known, f"setting in {config_file()}:")
        if (given := sorted(SECRETS & names.keys())) and readable_by_all(config_file()):
            logger.warning(
                "%s holds %s and every user of this machine can read it: chmod 600, or set %s%s to a file of its own",
                *(config_file(), " and ".join(given), given[0], SUFFIX),
            )
    try:
        return Settings(**_read({key: value for key, value in overrides.items() if value is not None}))
    except SettingsError as error:  # a variable that should hold JSON
        raise ConfigError(f"{error}: {error.__cause__}") from error
    except ValidationError as error:
        raise ConfigError(
            "; ".join(
                f"setting {'.'.join(map(str, e['loc']))} ({ENV_PREFIX}{str(e['loc'][0]).upper()}): {e['msg']}"
                for e in error.errors(include_url=False, include_input=False)
            )
        ) from None


def _refuse_unknown(names: Iterable[str], known: set[str], what: str) -> None:
    for name in names:
        if name not in known:
            close = difflib.get_close_matches(name, known, 1)
            hint = f"; did you mean {close[0]}?" if close else ""
            raise ConfigError(f"unknown {what} {name}{hint}")
