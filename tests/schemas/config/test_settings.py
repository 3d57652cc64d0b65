"""Settings: which source counts, and that a mistake names itself."""

from collections.abc import Callable
from pathlib import Path

import pytest

from millstream.schemas.config.settings import (
    ACCEPTED_NAMES,
    CONFIG_VARIABLE,
    DEFAULT_CONFIG,
    ENV_PREFIX,
    Settings,
    load_settings,
)
from millstream.schemas.errors import ConfigError

WriteConfig = Callable[[str], Path]


@pytest.fixture(autouse=True)
def clean(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    """No settings of this machine."""
    import os

    for name in list(os.environ):
        if name.startswith(ENV_PREFIX):
            monkeypatch.delenv(name)
    monkeypatch.chdir(tmp_path)


@pytest.fixture
def write_config(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> WriteConfig:
    def write(text: str) -> Path:
        path = tmp_path / "deployment.toml"
        path.write_text(text)
        monkeypatch.setenv(CONFIG_VARIABLE, str(path))
        return path

    return write


def test_arguments_over_environment_over_file_over_default(
    write_config: WriteConfig, monkeypatch: pytest.MonkeyPatch
) -> None:
    assert load_settings().runner_concurrency == Settings.model_fields["runner_concurrency"].default
    write_config("runner_concurrency = 2\nspan_batch_size = 20\ncache_ttl = 1.5\n")
    assert load_settings().runner_concurrency == 2
    monkeypatch.setenv("MILLSTREAM_RUNNER_CONCURRENCY", "3")
    monkeypatch.setenv("MILLSTREAM_SPAN_BATCH_SIZE", "30")
    assert load_settings().runner_concurrency == 3
    found = load_settings(runner_concurrency=4, span_batch_size=None)
    assert (found.runner_concurrency, found.span_batch_size, found.cache_ttl_s) == (4, 30, 1.5)


def test_accepted_names_obey_the_same_order(write_config: WriteConfig, monkeypatch: pytest.MonkeyPatch) -> None:
    write_config("timeout_seconds = 2\n")
    assert load_settings().timeout_s == 2
    monkeypatch.setenv("MILLSTREAM_TIMEOUT_SECONDS", "3")
    assert load_settings().timeout_s == 3
    monkeypatch.setenv("MILLSTREAM_TIMEOUT_S", "4")
    assert load_settings().timeout_s == 4
    assert load_settings(timeout_seconds=5).timeout_s == 5


def test_the_file_beside_us_is_read(tmp_path: Path) -> None:
    (tmp_path / DEFAULT_CONFIG).write_text("topic_prefix = 'mine'\n")
    assert load_settings().topics.events == "mine.events"


def test_an_unknown_environment_variable_is_named_with_what_was_meant(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("MILLSTREAM_RUNNER_CONCURENCY", "3")
    with pytest.raises(ConfigError, match=r"_CONCURENCY; did you mean MILLSTREAM_RUNNER_CONCURRENCY\?"):
        load_settings()


def test_an_unknown_setting_of_the_file_is_named_with_the_file(write_config: WriteConfig) -> None:
    path = write_config("span_batchsize = 3\n")
    with pytest.raises(ConfigError, match=r"span_batchsize; did you mean span_batch_size\?") as caught:
        load_settings()
    assert str(path) in str(caught.value)


def test_an_unknown_argument_is_named() -> None:
    with pytest.raises(ConfigError, match="runner_speed"):
        load_settings(runner_speed=1)


@pytest.mark.parametrize(
    ("name", "value"),
    [
        ("runner_concurrency", "many"),
        ("runner_concurrency", "0"),
        ("span_batch_size", "-1"),
        ("store_connection_pool", "0"),
        ("cache_ttl_s", "-1"),
        ("retry_max_attempts", "0"),
        ("timeout_s", "0"),
        ("compression", "rar"),
        ("kafka_security_protocol", "TLS"),
        ("clickhouse_secure", "perhaps"),
        ("topic_prefix", "with space"),
        ("max_record_bytes", "12"),
    ],
)
def test_a_malformed_setting_names_itself(name: str, value: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv(f"MILLSTREAM_{name.upper()}", value)
    with pytest.raises(ConfigError, match=rf"setting {name} \(MILLSTREAM_{name.upper()}\): "):
        load_settings()


def test_every_mistake_is_told_at_once() -> None:
    with pytest.raises(ConfigError, match="setting runner_concurrency ") as caught:
        load_settings(runner_concurrency=0, compression="rar")
    assert "setting compression " in str(caught.value)


def test_a_file_that_is_not_there_or_not_toml_is_named(
    tmp_path: Path, write_config: WriteConfig, monkeypatch: pytest.MonkeyPatch
) -> None:
    path = write_config("runner_concurrency 3")
    with pytest.raises(ConfigError, match="is not TOML") as caught:
        load_settings()
    assert str(path) in str(caught.value)
    monkeypatch.setenv(CONFIG_VARIABLE, str(tmp_path / "gone.toml"))
    with pytest.raises(ConfigError, match=r"MILLSTREAM_CONFIG names .*gone\.toml"):
        load_settings()


SECRETS = ("kafka_security_password", "clickhouse_password", "proxy_secret")


def test_secrets_show_nowhere(monkeypatch: pytest.MonkeyPatch) -> None:
    for name in SECRETS:
        monkeypatch.setenv(f"MILLSTREAM_{name.upper()}", "hunter2" * 5)
    settings = load_settings()
    assert settings.proxy_secret.get_secret_value() == "hunter2" * 5
    assert "hunter2" not in repr(settings) + str(settings.model_dump()) + settings.model_dump_json()
    with pytest.raises(ConfigError) as caught:
        load_settings(proxy_secret=["hunter2"])
    assert "hunter2" not in str(caught.value)


@pytest.mark.parametrize("secret", ["x", "s" * 31, "ü" * 15])
def test_a_proxy_secret_that_can_be_guessed_is_refused(secret: str) -> None:
    """Entry F4: with the secret the key of any attempt can be made."""
    with pytest.raises(ConfigError, match=r"proxy_secret .*32 bytes or more.*openssl rand") as refused:
        load_settings(proxy_secret=secret)
    assert f"'{secret}'" not in str(refused.value)
    for good in ("s" * 32, "ü" * 16, ""):
        assert load_settings(proxy_secret=good).proxy_secret.get_secret_value() == good


def test_the_names_that_users_tune() -> None:
    """Promised names: a deployment's files hold them."""
    promised = {
        "runner_concurrency",
        "span_batch_size",
        "store_connection_pool",
        "cache_ttl",
        "retry_max_attempts",
        "timeout_seconds",
        "compression",
        "clickhouse_secure",
        "kafka_security_protocol",
        "kafka_security_mechanism",
        "kafka_security_username",
        "kafka_security_password",
        "kafka_security_ca_file",
    }
    assert promised <= Settings.model_fields.keys() | ACCEPTED_NAMES.keys()


def test_settings_do_not_change() -> None:
    with pytest.raises(ValueError, match="frozen"):
        load_settings().runner_concurrency = 9  # type: ignore[misc]
