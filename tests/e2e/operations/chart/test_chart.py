"""The Helm chart: rendered with different values, it is valid, and its objects fit each other and the program."""

import copy
import json
import re
import subprocess
import tomllib
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import yaml
from chart_checks import Object, Release, containers, declared, pod_of, problems
from exposition import labels_of, series

from millstream.pipeline.training.config import TrainConfig
from millstream.schemas.config.settings import ENV_PREFIX

ROOT = Path(__file__).parents[4]
CHART = ROOT / "deploy" / "helm" / "millstream"
EXAMPLES = ROOT / "deploy" / "helm" / "examples"
OPS = ROOT / ".venv-ops" / "bin" / "python"
TRAINING = """run = "r"
run_dir = "/data/run"
tasks = "/files/tasks.jsonl"
[algorithm]
type = "grpo"
model = "/data/model"
"""
SECRETS = {
    "kafkaTls": {"ca": {"name": "kafka-cluster-ca-cert"}, "client": {"name": "millstream-user"}},
    "secrets": {"kafkaPassword": {"name": "millstream-user"}},
    "imagePullSecrets": ["registry"],
}
VALUES: dict[str, dict[str, Any]] = {
    "default": {},
    "minimal": {
        "gateway": {"enabled": False},
        "proxy": {"enabled": False},
        "networkPolicy": {"enabled": False},
        "blobs": {"url": "s3://bucket/blobs"},
        "secrets": {"clickhousePassword": {"name": ""}},
        "adapter": {"replicas": 1},
        "runner": {"agent": "my_agent:agent", "image": {"repository": "my/agent", "tag": "1"}},
    },
    "all": SECRETS
    | {
        "settings": {
            "kafka_security_protocol": "SASL_SSL",
            "max_record_bytes": 16777216,
            "upstreams": {"judge": {"urls": ["https://api.example"], "kind": "openai", "key_env": "JUDGE_KEY"}},
            "retention_days": {"spans": 30},
        },
        "serviceAccountName": "millstream",
        "adapter": {"function": "my_adapter:adapter"},
        "proxy": {"env": [{"name": "JUDGE_KEY", "valueFrom": {"secretKeyRef": {"name": "judge", "key": "key"}}}]},
        "runner": {
            "agent": "my_agent:agent",
            "processes": 2,
            "memoryLimitMiB": 512,
            "hooks": ["my_hooks:monitor"],
            "passEnv": ["SEARCH_KEY"],
            "nodeSelector": {"pool": "cpu"},
            "autoscaling": {"enabled": True, "maxReplicas": 64},
        },
        "trainer": {"enabled": True, "config": TRAINING, "files": {"tasks.jsonl": '{"input": 1}\n'}, "gpus": 1},
        "networkPolicy": {"runnerEgress": [{"to": [{"namespaceSelector": {"matchLabels": {"name": "kafka"}}}]}]},
        "monitoring": {"podMonitor": True, "rules": True, "dashboards": True, "labels": {"release": "prometheus"}},
    },
    "vllm": {
        "settings": {"vllm_python": "/opt/vllm/bin/python"},
        "runner": {"agent": "my_agent:agent", "autoscaling": {"enabled": True, "trigger": "prometheus"}},
        "model": {
            "enabled": True,
            "gpus": 2,
            "adapters": 4,
            "args": ["--dtype=bfloat16"],
            "persistence": {"existingClaim": "weights"},
            "tolerations": [{"key": "nvidia.com/gpu", "operator": "Exists"}],
            "initContainers": [
                {"name": "fetch", "image": "fetch:1", "volumeMounts": [{"name": "data", "mountPath": "/data"}]}
            ],
        },
        "monitoring": {"podMonitor": True},
    },
    "examples": yaml.safe_load((EXAMPLES / "values.yaml").read_text()),
    "recorded": {"trainer": {"enabled": True, "config": TRAINING, "servesModel": False, "name": "sft"}},
}
# Values that are refused, and what the error says.
REFUSED: dict[str, tuple[dict[str, Any], str]] = {
    "a misspelt value": ({"runner": {"agnet": "a:b"}}, "agnet"),
    "a secret among the settings": ({"settings": {"proxy_secret": "x"}}, "proxy_secret"),
    "more runners than partitions": ({"runner": {"agent": "a:b", "replicas": 65}}, "runner.replicas is 65, of at most"),
    "more adapters than partitions": ({"adapter": {"replicas": 65}}, "adapter.replicas is 65"),
    "more sinks than partitions": ({"sink": {"replicas": 65}}, "sink.replicas is 65"),
    "scaling beyond the partitions": (
        {"runner": {"agent": "a:b", "autoscaling": {"enabled": True, "maxReplicas": 65}}},
        "runner.autoscaling.maxReplicas is 65",
    ),
    "scaling without the gateway": (
        {"gateway": {"enabled": False}, "runner": {"agent": "a:b", "autoscaling": {"enabled": True}}},
        "set gateway.enabled",
    ),
    "an embedded store": ({"settings": {"clickhouse_dsn": "chdb://store"}}, "embedded store belongs to one process"),
    "two models": (
        {"trainer": {"enabled": True, "config": "x"}, "model": {"enabled": True}},
        "would both serve a model",
    ),
    "a trainer without a file": ({"trainer": {"enabled": True}}, "give the training file"),
}
UNKNOWN_FIELDS: list[Object] = [
    {"apiVersion": "v1", "kind": "Service", "metadata": {"name": "a"}, "spec": {"portz": []}},
    {
        "apiVersion": "keda.sh/v1alpha1",
        "kind": "ScaledObject",
        "metadata": {"name": "a"},
        "spec": {"scaleTargetRef": {"name": "a"}, "maxReplicas": 3, "triggers": [{"type": "cpu", "metadata": {}}]},
    },
    {
        "apiVersion": "monitoring.coreos.com/v1",
        "kind": "PodMonitor",
        "metadata": {"name": "a"},
        "spec": {"selector": {}, "podMetricsEndpoints": [{"port": "a", "intervall": "1s"}]},
    },
    {
        "apiVersion": "monitoring.coreos.com/v1",
        "kind": "PrometheusRule",
        "metadata": {"name": "a"},
        "spec": {"groups": [{"name": "a", "rules": [{"alert": "A", "expr": "up", "four": "1m"}]}]},
    },
]

pytestmark = pytest.mark.skipif(not OPS.is_file(), reason="no Helm in .venv-ops: `make ops` installs it")


@pytest.fixture(scope="module")
def done() -> dict[str, Any]:
    """What `render_chart` answers for all values: Helm and the schemas take seconds to load."""
    asked = {"render": VALUES | {name: values for name, (values, _) in REFUSED.items()}, "check": UNKNOWN_FIELDS}
    script = Path(__file__).with_name("render_chart.py")
    ran = subprocess.run([OPS, script], input=json.dumps(asked), capture_output=True, text=True, check=False)
    assert ran.returncode == 0, ran.stderr[-3000:]
    answer: dict[str, Any] = json.loads(ran.stdout)
    return answer


@pytest.fixture
def release(done: dict[str, Any]) -> Callable[[str], Release]:
    def of(name: str) -> Release:
        objects = done["rendered"][name]
        assert not isinstance(objects, str), objects
        defaults = yaml.safe_load((CHART / "values.yaml").read_text())
        mine = VALUES[name] | {"secrets": defaults["secrets"] | VALUES[name].get("secrets", {})}
        outside = {*declared(_merged(defaults, mine)), ("Secret", "judge")}
        return Release(copy.deepcopy(objects), frozenset(outside))

    return of


def _merged(defaults: Any, given: Any) -> Any:
    if not (isinstance(defaults, dict) and isinstance(given, dict)):
        return given
    return defaults | {name: _merged(defaults.get(name), value) for name, value in given.items()}


def test_the_chart_is_valid_for_helm_kubernetes_keda_and_the_prometheus_operator(done: dict[str, Any]) -> None:
    assert [message for message in done["lint"] if message["severity"] > 1] == []
    assert done["wrong"] == []


def test_unknown_fields_are_found(done: dict[str, Any]) -> None:
    """The control of the test before."""
    for problem, field in zip(done["problems"], ("portz", "maxReplicas", "intervall", "four"), strict=True):
        assert field in problem


@pytest.mark.parametrize("name", VALUES)
def test_what_is_rendered_fits_together_and_starts(
    release: Callable[[str], Release], name: str, monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    monkeypatch.chdir(tmp_path)
    assert problems(release(name)) == []


@pytest.mark.parametrize("name", REFUSED)
def test_wrong_values_are_refused_with_what_to_do(done: dict[str, Any], name: str) -> None:
    said = done["rendered"][name]
    assert isinstance(said, str)
    assert REFUSED[name][1] in said


def _part(release: Release, kind: str, role: str) -> Object:
    found = release.find(kind, f"rel-millstream-{role}")
    assert found is not None
    return found


def _container(release: Release, kind: str, role: str) -> Object:
    return containers(_part(release, kind, role))[0]


def _data(release: Release) -> dict[str, str]:
    data: dict[str, str] = _part(release, "ConfigMap", "settings")["data"]
    return data


def _pods(release: Release) -> Object:
    return pod_of(_part(release, "StatefulSet", "adapter"))


# What each check has to find: how a rendered chart is broken, and what is said of it.
BROKEN: dict[str, tuple[Callable[[Release], Any], str]] = {
    "one name twice": (lambda r: r.objects.append(r.objects[0]), "is there twice"),
    "an unstable label": (
        lambda r: _part(r, "StatefulSet", "adapter")["spec"]["template"]["metadata"]["labels"].pop(
            "app.kubernetes.io/component"
        ),
        "does not select its own pods",
    ),
    "a service of nothing": (
        lambda r: _part(r, "Service", "gateway")["spec"]["selector"].update({"app.kubernetes.io/component": "monitor"}),
        "Service rel-millstream-gateway selects no pods",
    ),
    "a budget of nothing": (
        lambda r: _part(r, "PodDisruptionBudget", "sink")["spec"]["selector"]["matchLabels"].update(a="b"),
        "PodDisruptionBudget rel-millstream-sink selects no pods",
    ),
    "a policy of nothing": (
        lambda r: _part(r, "NetworkPolicy", "gateway")["spec"]["podSelector"]["matchLabels"].update(a="b"),
        "NetworkPolicy rel-millstream-gateway selects no pods",
    ),
    "a missing secret": (
        lambda r: _container(r, "Deployment", "gateway")["env"].append(
            {"name": "A", "valueFrom": {"secretKeyRef": {"name": "forgotten", "key": "a"}}}
        ),
        "there is no Secret forgotten",
    ),
    "missing settings": (
        lambda r: r.objects.remove(_part(r, "ConfigMap", "settings")),
        "there is no ConfigMap rel-millstream-settings",
    ),
    "a missing claim": (
        lambda r: r.objects.remove(_part(r, "PersistentVolumeClaim", "trainer")),
        "there is no PersistentVolumeClaim rel-millstream-trainer",
    ),
    "a missing authentication": (
        lambda r: r.objects.remove(_part(r, "TriggerAuthentication", "gateway")),
        "there is no TriggerAuthentication rel-millstream-gateway",
    ),
    "no headless service": (
        lambda r: _part(r, "Service", "adapter")["spec"].pop("clusterIP"),
        "there is no headless service rel-millstream-adapter",
    ),
    "a mount of nothing": (lambda r: _pods(r)["volumes"].pop(0), "mounts tmp, which is no volume"),
    "a service's port that no pod has": (
        lambda r: _part(r, "Service", "gateway")["spec"]["ports"][0].update(targetPort="web"),
        "have no port web",
    ),
    "a monitor's port that no pod has": (
        lambda r: _part(r, "PodMonitor", "gateway")["spec"]["podMetricsEndpoints"][0].update(port="web"),
        "no pod has a port web",
    ),
    "a job that no alert knows": (
        lambda r: [e["relabelings"].pop(0) for e in r.of("PodMonitor")[0]["spec"]["podMetricsEndpoints"]],
        "as the alerts expect",
    ),
    "an address of no service": (
        lambda r: _data(r).update(MILLSTREAM_GATEWAY_URL="http://rel-millstream-monitor:8600"),
        "names no service",
    ),
    "an address with another port": (
        lambda r: _data(r).update(MILLSTREAM_PROXY_URL="http://rel-millstream-trainer:8401"),
        "names a port that",
    ),
    "a misspelt option": (
        lambda r: _container(r, "StatefulSet", "adapter")["args"].append("--replicas=2"),
        "No such option: --replicas",
    ),
    "an option without its value": (
        lambda r: _container(r, "Deployment", "runner")["args"].append("--hook"),
        "requires an argument",
    ),
    "a command that there is not": (
        lambda r: _container(r, "Deployment", "gateway")["args"].__setitem__(0, "monitor"),
        "there is no command monitor",
    ),
    "an argument of no variable": (
        lambda r: _container(r, "StatefulSet", "adapter")["args"].__setitem__(2, "$(POD)"),
        "$(POD) is no variable",
    ),
    "a setting that there is not": (
        lambda r: _data(r).update(MILLSTREAM_KAFKA_SERVERS="a:1"),
        "unknown environment variable MILLSTREAM_KAFKA_SERVERS",
    ),
    "a setting with a wrong value": (
        lambda r: _data(r).update(MILLSTREAM_MAX_RECORD_BYTES="1.6777216e+07"),
        "setting max_record_bytes",
    ),
    "variables of services": (lambda r: _pods(r).pop("enableServiceLinks"), "enableServiceLinks"),
    "probes of a port that is not served": (
        lambda r: _container(r, "Deployment", "sink")["livenessProbe"]["httpGet"].update(port=9101),
        "probes ask port 9101",
    ),
    "probes of loopback": (lambda r: _data(r).pop("MILLSTREAM_HEALTH_HOST"), "health_host is loopback"),
    "two containers with one port": (
        lambda r: containers(_part(r, "Job", "trainer"))[1]["ports"][1].update(containerPort=9100),
        "two containers of a pod have one port",
    ),
    "too short a grace": (
        lambda r: pod_of(_part(r, "Deployment", "runner")).update(terminationGracePeriodSeconds=600),
        "it is killed after 600 s, and runner drains for 600 s",
    ),
    "replicas beside an autoscaler": (
        lambda r: _part(r, "Deployment", "runner")["spec"].update(replicas=3),
        "each upgrade would undo",
    ),
    "more runners than partitions": (
        lambda r: _part(r, "ScaledObject", "runner")["spec"].update(maxReplicaCount=65),
        "65 replicas, and 64 partitions",
    ),
    "a target that is not a runner's slots": (
        lambda r: _part(r, "ScaledObject", "runner")["spec"]["triggers"][0]["metadata"].update(targetValue="8"),
        "8 are not the slots",
    ),
    "a root file system that can be written": (
        lambda r: _container(r, "Deployment", "sink")["securityContext"].update(readOnlyRootFilesystem=False),
        "may do more than it needs",
    ),
}


@pytest.mark.parametrize("name", BROKEN)
def test_a_broken_chart_is_found(
    release: Callable[[str], Release], name: str, monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    """The controls of what is checked in meaning."""
    monkeypatch.chdir(tmp_path)
    broken = release("all")
    breaks, said = BROKEN[name]
    breaks(broken)
    assert said in "\n".join(problems(broken))


def test_a_proxy_that_is_not_there_is_found(release: Callable[[str], Release]) -> None:
    broken = release("default")
    _part(broken, "StatefulSet", "proxy")["spec"]["replicas"] = 1
    assert "names a pod that" in "\n".join(problems(broken))


def test_each_role_gets_only_the_secrets_that_it_needs(release: Callable[[str], Release]) -> None:
    made = release("all")
    held = {
        container["name"]: {
            each["name"].removeprefix(ENV_PREFIX) for each in container["env"] if "MILLSTREAM_" in each["name"]
        }
        for workload in made.workloads
        for container in containers(workload)
    }
    kafka = "KAFKA_SECURITY_PASSWORD"
    assert held == {
        "topics": {kafka},
        "adapter": {kafka},
        "sink": {kafka, "CLICKHOUSE_PASSWORD"},
        "runner": {kafka, "PROXY_SECRET"},
        "proxy": {kafka, "PROXY_SECRET"},
        "gateway": {kafka, "PROXY_SECRET", "GATEWAY_TOKEN", "CLICKHOUSE_PASSWORD"},
        "trainer": {kafka, "CLICKHOUSE_PASSWORD"},
    }


def test_tables_and_large_numbers_reach_the_settings_as_they_are(release: Callable[[str], Release]) -> None:
    data = _data(release("all"))
    assert data["MILLSTREAM_MAX_RECORD_BYTES"] == "16777216"
    assert json.loads(data["MILLSTREAM_RETENTION_DAYS"]) == {"spans": 30}
    assert json.loads(data["MILLSTREAM_UPSTREAMS"])["judge"]["key_env"] == "JUDGE_KEY"


def test_a_training_file_arrives_as_it_was_written(release: Callable[[str], Release]) -> None:
    files = _part(release("all"), "ConfigMap", "trainer")["data"]
    assert files == {"train.toml": TRAINING, "tasks.jsonl": '{"input": 1}\n'}
    assert TrainConfig(**tomllib.loads(files["train.toml"])).run_dir == Path("/data/run")


def test_rules_and_dashboards_are_those_of_the_repository(release: Callable[[str], Release]) -> None:
    made = release("all")
    rules = yaml.safe_load((ROOT / "deploy" / "prometheus" / "rules.yml").read_text())
    assert _part_named(made, "PrometheusRule", "rel-millstream")["spec"] == rules
    folder = ROOT / "deploy" / "grafana" / "dashboards"
    shown = _part(made, "ConfigMap", "dashboards")["data"]
    assert shown == {path.name: path.read_text() for path in folder.glob("*.json")}


def test_pods_run_the_image_as_it_is_built(release: Callable[[str], Release]) -> None:
    dockerfile = (ROOT / "deploy" / "docker" / "Dockerfile").read_text()
    user = re.search(r"^USER (\d+)$", dockerfile, re.MULTILINE)
    assert user is not None
    assert 'ENTRYPOINT ["millstream"]' in dockerfile  # a container has arguments alone
    users = {pod_of(workload)["securityContext"]["runAsUser"] for workload in release("all").workloads}
    assert users == {int(user[1])}


def test_the_chart_links_to_files_only() -> None:
    """A built distribution would leave out a folder that is there twice."""
    assert not [path for path in CHART.rglob("*") if path.is_symlink() and path.is_dir()]


def _part_named(release: Release, kind: str, name: str) -> Object:
    found = release.find(kind, name)
    assert found is not None
    return found


def test_an_autoscaler_asks_for_metrics_that_there_are(release: Callable[[str], Release]) -> None:
    (trigger,) = _part(release("vllm"), "ScaledObject", "runner")["spec"]["triggers"]
    query = trigger["metadata"]["query"]
    labels_of(query.replace('{namespace="ns"}', ""), series([]))
    assert set(re.findall(r"millstream_\w+", query)) == {"millstream_unclaimed_tasks", "millstream_runner_running"}


def test_the_examples_of_kafka_and_clickhouse_go_with_their_values() -> None:
    made = {
        each["kind"]: each
        for name in ("kafka.yaml", "clickhouse.yaml")
        for each in yaml.safe_load_all((EXAMPLES / name).read_text())
    }
    values = VALUES["examples"]
    settings, user = values["settings"], made["KafkaUser"]["metadata"]["name"]
    kafka = made["Kafka"]["metadata"]["name"]
    (listener,) = made["Kafka"]["spec"]["kafka"]["listeners"]
    # Names as the operators make them.
    assert settings["kafka_bootstrap_servers"] == f"{kafka}-kafka-bootstrap:{listener['port']}"
    assert (settings["kafka_security_username"], values["secrets"]["kafkaPassword"]["name"]) == (user, user)
    assert values["kafkaTls"]["ca"]["name"] == f"{kafka}-cluster-ca-cert"
    for each in (made["KafkaNodePool"], made["KafkaUser"]):
        assert each["metadata"]["labels"]["strimzi.io/cluster"] == kafka
    assert made["KafkaNodePool"]["spec"]["replicas"] >= settings["kafka_replication_factor"]
    clickhouse, keeper = made["ClickHouseInstallation"], made["ClickHouseKeeperInstallation"]
    assert settings["clickhouse_dsn"] == f"clickhouse://millstream@clickhouse-{clickhouse['metadata']['name']}:8123"
    configuration = clickhouse["spec"]["configuration"]
    assert [cluster["name"] for cluster in configuration["clusters"]] == [settings["clickhouse_cluster"]]
    assert [node["host"] for node in configuration["zookeeper"]["nodes"]] == [f"keeper-{keeper['metadata']['name']}"]
    defaults = yaml.safe_load((CHART / "values.yaml").read_text())["secrets"]["clickhousePassword"]
    assert configuration["users"]["millstream/k8s_secret_password"] == f"{defaults['name']}/{defaults['key']}"
