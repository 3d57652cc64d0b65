"""Secrets from files."""

from pathlib import Path

import pytest

from millstream.schemas.config.settings import CONFIG_VARIABLE, SECRETS, load_settings
from millstream.schemas.errors import ConfigError


@pytest.fixture
def secret(tmp_path: Path) -> Path:
    file = tmp_path / "secret"
    file.write_text("hunter2hunter2hunter2hunter2hunter2\n")
    file.chmod(0o600)
    return file


@pytest.mark.parametrize("name", sorted(SECRETS))
def test_every_secret_may_be_given_by_a_file(name: str, secret: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Section F1."""
    monkeypatch.setenv(f"MILLSTREAM_{name.upper()}_FILE", str(secret))
    assert getattr(load_settings(), name).get_secret_value() == "hunter2hunter2hunter2hunter2hunter2"
    monkeypatch.delenv(f"MILLSTREAM_{name.upper()}_FILE")
    assert (
        getattr(load_settings(**{f"{name}_file": secret}), name).get_secret_value()
        == "hunter2hunter2hunter2hunter2hunter2"
    )
    toml = secret.with_name("millstream.toml")
    toml.write_text(f'{name}_file = "{secret}"\n')
    monkeypatch.setenv(CONFIG_VARIABLE, str(toml))
    assert getattr(load_settings(), name).get_secret_value() == "hunter2hunter2hunter2hunter2hunter2"


def test_all_secrets_are_known() -> None:
    assert {"kafka_security_password", "clickhouse_password", "proxy_secret", "gateway_token"} <= SECRETS


@pytest.mark.parametrize(
    ("prepare", "why"),
    [
        (lambda file: file.chmod(0o644), "every user of this machine can read: chmod 600"),
        (lambda file: file.unlink(), "can't be read"),
        (lambda file: file.write_bytes(b"\xff"), "can't be read"),
        (lambda file: file.write_bytes(b"\n"), "is empty"),
    ],
    ids=["readable", "gone", "binary", "empty"],
)
def test_a_file_that_is_no_secret_is_refused(prepare: object, why: str, secret: Path) -> None:
    prepare(secret)  # type: ignore[operator]
    with pytest.raises(ConfigError, match=why) as caught:
        load_settings(proxy_secret_file=secret)
    assert "proxy_secret_file" in str(caught.value)
    assert str(secret) in str(caught.value)


def test_a_group_may_share_a_secret(secret: Path) -> None:
    secret.chmod(0o640)
    assert (
        load_settings(proxy_secret_file=secret).proxy_secret.get_secret_value() == "hunter2hunter2hunter2hunter2hunter2"
    )


def test_a_secret_and_its_file_are_one_too_many(secret: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("MILLSTREAM_PROXY_SECRET", "x" * 32)
    monkeypatch.setenv("MILLSTREAM_PROXY_SECRET_FILE", str(secret))
    with pytest.raises(ConfigError, match="proxy_secret and proxy_secret_file are both set"):
        load_settings()


def test_only_secrets_have_files(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("MILLSTREAM_PROXY_URL_FILE", "x")
    with pytest.raises(ConfigError, match="unknown environment variable MILLSTREAM_PROXY_URL_FILE"):
        load_settings()


def test_a_configuration_with_secrets_that_all_can_read_is_warned_about(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    file = tmp_path / "m.toml"
    file.write_text('gateway_token = "x"\ntopic_prefix = "t"\n')
    monkeypatch.setenv(CONFIG_VARIABLE, str(file))
    file.chmod(0o600)
    load_settings()
    assert caplog.text == ""
    file.chmod(0o644)
    load_settings()
    assert "holds gateway_token and every user of this machine can read it: chmod 600" in caplog.text


@pytest.mark.parametrize("name", ["proxy_url", "model_url", "gateway_url"])
def test_a_url_with_a_password_is_refused_without_showing_it(name: str) -> None:
    """Section F6: the trainer would announce it on the control topic."""
    with pytest.raises(ConfigError, match=f"setting {name}.*must not hold a password") as caught:
        load_settings(**{name: "http://me:hunter2hunter2hunter2hunter2hunter2@host:8400"})
    assert "hunter2hunter2hunter2hunter2hunter2" not in str(caught.value)
    with pytest.raises(ConfigError) as caught:
        load_settings(upstreams={"m": {"urls": ["http://me:hunter2hunter2hunter2hunter2hunter2@host"]}})
    assert "hunter2hunter2hunter2hunter2hunter2" not in str(caught.value)
