"""``millstream init``, and what ``millstream up`` checks before it starts anything."""

import json
import stat
import tomllib
from pathlib import Path

import pytest
from typer.testing import CliRunner

from millstream.pipeline.cli.main import app
from millstream.pipeline.training.config import load_config
from millstream.producers.tasks import read_tasks
from millstream.schemas.config.settings import load_settings
from millstream.schemas.errors import ConfigError


@pytest.fixture
def project(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    monkeypatch.chdir(tmp_path)
    result = CliRunner().invoke(app, ["init", "my-agent"])
    assert result.exit_code == 0, result.output
    assert "cd my-agent, then `millstream up agent:agent`" in result.output
    monkeypatch.chdir(tmp_path / "my-agent")
    return tmp_path / "my-agent"


def test_a_new_project_is_complete(project: Path) -> None:
    settings = load_settings()
    assert len(settings.proxy_secret.get_secret_value()) == 64
    assert "kafka_bootstrap_servers" not in settings.model_fields_set  # so that `up` starts a broker
    tasks, bad = read_tasks(project / "tasks.jsonl", settings)
    assert (len(tasks), bad) == (4, [])
    assert load_config(project / "train.toml").tasks == Path("tasks.jsonl")
    compile((project / "agent.py").read_text(), "agent.py", "exec")


def test_only_its_owner_may_read_the_secret(project: Path) -> None:
    assert stat.S_IMODE((project / "millstream.toml").stat().st_mode) == 0o600


def test_each_project_has_a_secret_of_its_own(project: Path) -> None:
    CliRunner().invoke(app, ["init", "other"])
    secrets = {tomllib.loads((f / "millstream.toml").read_text())["proxy_secret"] for f in (project, project / "other")}
    assert len(secrets) == 2


@pytest.mark.parametrize("name", ["agent.py", "tasks.jsonl", "train.toml", "millstream.toml"])
def test_nothing_is_overwritten(name: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    Path(name).write_text("mine")
    error = CliRunner().invoke(app, ["init"]).exception
    assert isinstance(error, ConfigError)
    assert f"{name} exists" in str(error)
    assert [(path.name, path.read_text()) for path in tmp_path.iterdir()] == [(name, "mine")]


@pytest.mark.parametrize(
    ("arguments", "said"),
    [
        (["agent"], "'agent' is not of the form module:attribute"),
        (["no_such:agent"], "there is no module no_such in"),
        (["no_such.sub:agent"], "there is no module no_such.sub in"),
        (["agent:agent", "--train", "none.toml"], "none.toml is not a file"),
    ],
    ids=lambda value: str(value)[:30],
)
def test_up_names_what_is_missing_before_it_starts_anything(arguments: list[str], said: str, project: Path) -> None:
    """Entry C10: not after half a minute."""
    error = CliRunner().invoke(app, ["up", *arguments]).exception
    assert isinstance(error, ConfigError)
    assert said in str(error)
    assert not (project / "runs").exists()


def test_settings_are_shown_with_where_they_come_from(project: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Entry B4."""
    monkeypatch.setenv("MILLSTREAM_TIMEOUT_SECONDS", "7")
    monkeypatch.setenv("MILLSTREAM_CLICKHOUSE_DSN", "clickhouse://me@host:8123")
    (project / "token").write_text("a-token-of-the-gateway")
    (project / "token").chmod(0o600)
    monkeypatch.setenv("MILLSTREAM_GATEWAY_TOKEN_FILE", str(project / "token"))
    shown = CliRunner().invoke(app, ["config", "show", "--json"])
    rows = {row["setting"]: row for row in json.loads(shown.output)}
    assert (rows["timeout_s"]["value"], rows["timeout_s"]["from"]) == ("7.0", "MILLSTREAM_TIMEOUT_SECONDS")
    assert rows["clickhouse_dsn"]["from"] == "MILLSTREAM_CLICKHOUSE_DSN"
    assert (rows["proxy_secret"]["value"], rows["proxy_secret"]["from"]) == ("(hidden)", "millstream.toml")
    token = rows["gateway_token"]
    assert (token["value"], token["from"]) == ("(hidden)", "MILLSTREAM_GATEWAY_TOKEN_FILE")
    assert (rows["lease_s"]["value"], rows["lease_s"]["from"]) == ("30.0", "default")
    secret = tomllib.loads((project / "millstream.toml").read_text())["proxy_secret"]
    assert secret not in shown.output
    assert "a-token" not in shown.output
    changed = CliRunner().invoke(app, ["config", "show", "--changed"]).output
    assert "timeout_s" in changed
    assert "lease_s" not in changed
