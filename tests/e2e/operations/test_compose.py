"""The deployment in containers: its files, and a run of it with Podman."""

import json
import os
import shutil
import subprocess
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from secrets import token_hex
from typing import Any
from urllib.parse import quote, urlsplit
from urllib.request import Request, urlopen

import pytest
import yaml
from chart_checks import parsed

from millstream.deploy.kafka.local import resolve_jars
from millstream.pipeline.addresses import LOOPBACK, free_port
from millstream.schemas.config.settings import Settings

ROOT = Path(__file__).parents[3]
DOCKER = ROOT / "deploy" / "docker"
TOOLS = ROOT / ".venv-ops" / "bin"
CERTIFICATES = Path("/etc/ssl/certs/ca-certificates.crt")
BASE = "localhost/millstream-base:bookworm"
PROJECT = "millstream-test"
WAIT_S = 180.0  # for one stage, on a busy machine
ROLLOUTS = 40
PROGRAMS = ("podman", "runc", "mmdebstrap", "iptables")

needs_tools = pytest.mark.skipif(not TOOLS.is_dir(), reason="needs linters and schemas: make ops")
needs_podman = pytest.mark.skipif(
    bool(missing := [name for name in PROGRAMS if shutil.which(name) is None]) or os.geteuid() != 0,
    reason=f"needs root and {', '.join(missing) or 'podman'}: apt-get install podman runc mmdebstrap netavark "
    "aardvark-dns iptables",
)


def run(*command: str | Path, timeout_s: float = 600.0, **options: object) -> subprocess.CompletedProcess[str]:
    environment = os.environ | {"CONTAINERS_CONF": str(DOCKER / "standins" / "containers.conf")}
    environment["PATH"] = f"{TOOLS}:{environment['PATH']}"
    return subprocess.run(
        [*map(str, command)], env=environment, capture_output=True, text=True, timeout=timeout_s, check=False, **options
    )


def succeed(*command: str | Path, **options: object) -> str:
    done = run(*command, **options)
    assert done.returncode == 0, f"{command}\n{done.stdout[-4000:]}\n{done.stderr[-4000:]}"
    return done.stdout


@needs_tools
@pytest.mark.parametrize("file", ["Dockerfile", "standins/Dockerfile"])
def test_hadolint_finds_nothing(file: str) -> None:
    succeed(TOOLS / "hadolint", DOCKER / file)


@needs_tools
def test_the_compose_file_fits_its_specification(tmp_path: Path) -> None:
    check = (TOOLS / "check-jsonschema", "--builtin-schema", "vendor.compose-spec")
    succeed(*check, DOCKER / "compose.yaml")
    wrong = tmp_path / "wrong.yaml"
    wrong.write_text((DOCKER / "compose.yaml").read_text().replace("healthcheck:", "healthchek:"))
    assert run(*check, wrong).returncode == 1


def compose() -> dict[str, dict[str, Any]]:
    return yaml.safe_load((DOCKER / "compose.yaml").read_text())["services"]


def test_each_variable_of_the_roles_is_a_setting() -> None:
    roles = {name: service for name, service in compose().items() if "build" in service}
    assert roles.keys() == {"topics", "adapter", "sink", "proxy", "runner", "gateway", "trainer", "trainer-proxy"}
    for service in roles.values():
        for variable in service["environment"]:
            assert variable.removeprefix("MILLSTREAM_").lower() in Settings.model_fields


@pytest.mark.parametrize("name", [name for name, service in compose().items() if "build" in service])
def test_each_role_has_arguments_of_a_command_and_a_probe_of_its_port(name: str) -> None:
    service = compose()[name]
    arguments = [str(argument) for argument in service["command"]]
    command, options = parsed(arguments)
    assert command == " ".join(arguments)[: len(command)]
    if (port := options.get("health_port") or options.get("port")) is not None:
        assert f":{port}/livez" in service["healthcheck"]["test"][-1]
    else:
        assert service["healthcheck"] == {"disable": True}


def test_runners_reach_the_trainers_model_by_a_proxy_that_shares_its_network() -> None:
    trainer, proxy = compose()["trainer"], compose()["trainer-proxy"]
    assert proxy["network_mode"] == "service:trainer"
    assert trainer["environment"] == proxy["environment"]
    assert urlsplit(trainer["environment"]["MILLSTREAM_MODEL_URL"]).hostname == LOOPBACK
    announced, listening = trainer["environment"]["MILLSTREAM_PROXY_URL"], parsed(proxy["command"])[1]["listen"]
    assert (urlsplit(announced).hostname, urlsplit(announced).port) == ("trainer", urlsplit(listening).port)


@needs_tools
@pytest.mark.skipif(shutil.which("podman") is None, reason="needs podman, which podman-compose asks for its version")
def test_the_trainer_is_started_by_its_profile_alone(tmp_path: Path) -> None:
    lines = [line for line in (DOCKER / "example.env").read_text().splitlines() if line and not line.startswith("#")]
    env = tmp_path / ".env"
    env.write_text("".join(f"{line}/x\n" for line in [*lines, "TRAIN_FOLDER=/my"]))
    config = (TOOLS / "podman-compose", "--env-file", env, "-f", DOCKER / "compose.yaml")
    assert "trainer" not in yaml.safe_load(succeed(*config, "config"))["services"]
    shown = yaml.safe_load(succeed(*config, "--profile", "train", "config"))["services"]
    assert "/my/x:/train:ro" in shown["trainer"]["volumes"]
    assert shown["trainer-proxy"]["network_mode"] == "service:trainer"


def test_secrets_and_what_has_no_default_are_in_the_example_and_required() -> None:
    lines = (DOCKER / "example.env").read_text().splitlines()
    example = {line.partition("=")[0] for line in lines if line and not line.startswith("#")}
    text = (DOCKER / "compose.yaml").read_text()
    required = {part.partition(":?")[0] for part in text.split("${")[1:] if ":?" in part.partition("}")[0]}
    assert required == example
    assert {"PROXY_SECRET", "GATEWAY_TOKEN", "CLICKHOUSE_PASSWORD", "GRAFANA_PASSWORD"} <= required


def test_each_mounted_file_exists() -> None:
    mounts = [str(volume) for service in compose().values() for volume in service.get("volumes", ())]
    files = [mount.partition(":")[0] for mount in mounts if mount.startswith(".")]
    assert len(files) >= 6
    for file in files:
        assert (DOCKER / file).exists(), file


class Deployment:
    """The services of both compose files, under a project name of the test's own."""

    def __init__(self, folder: Path) -> None:
        self.token = token_hex(32)
        self.ports = {name: free_port() for name in ("GATEWAY", "PROMETHEUS", "ALERTMANAGER")}
        agent = folder / "agent"
        succeed(ROOT / ".venv" / "bin" / "millstream", "init", agent, cwd=folder)
        (agent / "millstream.toml").unlink()  # as docs/deployment.md says
        agent.chmod(0o755)
        values = {
            "PROXY_SECRET": token_hex(32),
            "GATEWAY_TOKEN": self.token,
            "CLICKHOUSE_PASSWORD": token_hex(16),
            "CLICKHOUSE_READER_PASSWORD": token_hex(16),
            "GRAFANA_PASSWORD": token_hex(16),
            "MODEL_URL": "http://model:8500",
            "AGENT": "agent:agent",
            "AGENT_FOLDER": agent,
            "KAFKA_JARS": resolve_jars(),
            **{f"{name}_PORT": port for name, port in self.ports.items()},
        }
        self._env = folder / ".env"
        self._env.write_text("".join(f"{name}={value}\n" for name, value in values.items()))

    def compose(self, *arguments: str) -> str:
        files = ("-f", DOCKER / "compose.yaml", "-f", DOCKER / "compose.test.yaml")
        return succeed(TOOLS / "podman-compose", "-p", PROJECT, "--env-file", self._env, *files, *arguments)

    def up(self, *services: str, scale: int | None = None) -> None:
        scaled = () if scale is None else ("--scale", f"runner={scale}")
        self.compose("up", "-d", "--no-build", "--no-recreate", *scaled, *services)

    def down(self) -> None:
        if runners := self.left("runner"):  # podman-compose removes as many as its file says
            succeed("podman", "rm", "-f", "-t", "20", *runners)
        self.compose("down", "-v", "-t", "20")

    def left(self, service: str = "") -> list[str]:
        """Container ids."""
        return succeed("podman", "ps", "-aq", "--filter", f"name={PROJECT}_{service}").split()

    def healthy(self, *containers: str) -> None:
        """Waits until each container's own health check passes: without systemd, Podman does not run them by itself."""
        for container in containers:
            name = f"{PROJECT}_{container}"
            until(
                lambda name=name: run("podman", "healthcheck", "run", name).returncode == 0,
                lambda name=name: f"{name}: {run('podman', 'logs', '--tail', '20', name)}",
            )

    def millstream(self, *arguments: str, container: str = "gateway_1") -> str:
        return succeed("podman", "exec", f"{PROJECT}_{container}", "millstream", *arguments)

    def count(self, sql: str) -> int:
        (row,) = json.loads(self.millstream("sql", f"{sql}", "--json"))
        return int(next(iter(row.values())))

    def answer(self, service: str, path: str) -> dict[str, object]:
        url = f"http://127.0.0.1:{self.ports[service]}{path}"
        with urlopen(Request(url, headers={"Authorization": f"Bearer {self.token}"}), timeout=20) as answer:
            return json.load(answer)

    def prometheus(self, query: str) -> float:
        found = self.answer("PROMETHEUS", f"/api/v1/query?query={quote(query)}")["data"]["result"]
        return float(found[0]["value"][1]) if found else 0.0


def until(holds: Callable[[], bool], what: Callable[[], str]) -> None:
    deadline = time.monotonic() + WAIT_S
    while not holds():
        assert time.monotonic() < deadline, what()
        time.sleep(0.3)


@pytest.fixture(scope="module")
def images(tmp_path_factory: pytest.TempPathFactory) -> None:
    """Built from Debian's packages alone; what Podman has of an earlier run is used again."""
    if run("podman", "image", "exists", BASE).returncode:
        tar = tmp_path_factory.mktemp("base") / "base.tar"
        packages = "--include=python3,python3-venv,ca-certificates"
        succeed("mmdebstrap", "--variant=minbase", packages, "bookworm", tar)
        succeed("podman", "import", tar, BASE)
    trusted = ()
    if CERTIFICATES.exists():  # an authority that this machine adds to the public ones
        trusted = ("--volume", f"{CERTIFICATES}:{CERTIFICATES}:ro")
        trusted += tuple(f"--build-arg={name}={CERTIFICATES}" for name in ("PIP_CERT", "SSL_CERT_FILE"))
    build = ("podman", "build", "--network", "host", *trusted, f"--build-arg=BASE={BASE}")
    roles = ("-f", DOCKER / "Dockerfile", ROOT)
    succeed(*build, "-t", "localhost/millstream:dev", *roles, timeout_s=1800)
    succeed(*build, "--build-arg=EXTRAS=openai,embedded", "-t", "localhost/millstream:embedded", *roles, timeout_s=1800)
    succeed(*build, "-t", "localhost/millstream-standins", DOCKER / "standins", timeout_s=1800)


@pytest.fixture
def deployment(images: None, tmp_path: Path) -> Iterator[Deployment]:
    deployment = Deployment(tmp_path)
    try:
        yield deployment
    finally:
        deployment.down()


@needs_tools
@needs_podman
def test_compose_does_not_start_without_its_secrets(tmp_path: Path) -> None:
    refused = run(TOOLS / "podman-compose", "-f", DOCKER / "compose.yaml", "config", cwd=tmp_path)
    assert refused.returncode != 0
    assert "set it in .env" in refused.stderr


@needs_tools
@needs_podman
@pytest.mark.slow
@pytest.mark.kafka
@pytest.mark.timeout(3600)  # the first time, three images are built
def test_rollouts_in_containers_survive_a_killed_runner(deployment: Deployment) -> None:
    deployment.up("kafka", "clickhouse", "model")
    deployment.healthy("kafka_1", "clickhouse_1")
    deployment.compose("run", "--rm", "-T", "--no-deps", "topics", "topics", "create", "--wait-s", "120")
    deployment.up("adapter", "sink", "proxy", "gateway", "prometheus", "alertmanager", "runner", scale=2)
    deployment.healthy("adapter_1", "sink_1", "proxy_1", "gateway_1", "runner_1", "runner_2")

    deployment.millstream("publish", "tasks.jsonl", "--group-size", str(ROLLOUTS // 4), container="runner_2")
    until(lambda: deployment.answer("GATEWAY", "/load")["running"] >= 10, lambda: "both runners never worked at once")
    succeed("podman", "kill", f"{PROJECT}_runner_1")
    ended = "SELECT count() AS n FROM rollouts WHERE status IN ('succeeded', 'failed', 'cancelled')"
    until(lambda: deployment.count(ended) == ROLLOUTS, lambda: deployment.millstream("rollouts"))
    assert deployment.count("SELECT count() AS n FROM rollouts WHERE status = 'succeeded' AND reward = 1") == ROLLOUTS
    assert deployment.count("SELECT count() AS n FROM attempts WHERE status = 'lost'") > 0

    deployment.up("runner", scale=4)
    deployment.healthy("runner_3", "runner_4")
    until(lambda: deployment.prometheus('count(up{role="runner"} == 1)') == 3, lambda: "Prometheus sees no 3 runners")
    assert deployment.prometheus('count(up{role=~"adapter|sink|proxy|gateway"} == 1)') == 4

    deployment.down()
    assert deployment.left() == []
