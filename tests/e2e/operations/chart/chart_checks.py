"""What the objects of a rendered chart mean together, which no schema knows: names find each other, and every process
starts. Each check yields what is wrong, in words."""

import re
from collections.abc import Iterable, Iterator, Mapping
from dataclasses import dataclass
from itertools import chain
from typing import Any
from urllib.parse import urlsplit

import typer
from typer.core import TyperGroup
from typer.main import get_command

from millstream.pipeline.cli.main import app
from millstream.schemas.config.settings import ENV_PREFIX, load_settings
from millstream.schemas.errors import ConfigError

Object = dict[str, Any]
COMMAND = get_command(app)
UsageError: type[Exception] = typer.BadParameter.__mro__[1]  # of the click that typer has in it
SECRET = "x" * 64  # in place of a secret's value


@dataclass(frozen=True)
class Release:
    """``outside``: (kind, name) of what is declared to exist already."""

    objects: list[Object]
    outside: frozenset[tuple[str, str]] = frozenset()

    def of(self, *kinds: str) -> list[Object]:
        return [made for made in self.objects if made["kind"] in kinds]

    def find(self, kind: str, name: str) -> Object | None:
        return next((made for made in self.of(kind) if made["metadata"]["name"] == name), None)

    @property
    def workloads(self) -> list[Object]:
        return self.of("Deployment", "StatefulSet", "Job")

    def selected(self, labels: Mapping[str, str]) -> list[Object]:
        """Workloads whose pods have the labels."""
        return [each for each in self.workloads if labels.items() <= labels_of(each).items()]


def problems(release: Release) -> list[str]:
    checks = (names, selectors, references, ports, addresses, arguments, settings, probes, graces, scaling, hardened)
    return [text for check in checks for text in check(release)]


def title(made: Object) -> str:
    return f"{made['kind']} {made['metadata']['name']}"


def labels_of(workload: Object) -> dict[str, str]:
    labels: dict[str, str] = workload["spec"]["template"]["metadata"]["labels"]
    return labels


def pod_of(workload: Object) -> Object:
    pod: Object = workload["spec"]["template"]["spec"]
    return pod


def containers(workload: Object) -> list[Object]:
    pod = pod_of(workload)
    return [*pod["containers"], *(each for each in pod.get("initContainers", ()) if "envFrom" in each)]


def every_container(release: Release) -> Iterator[tuple[str, Object, Object]]:
    for workload in release.workloads:
        for container in containers(workload):
            yield f"{title(workload)}, container {container['name']}", workload, container


def within(value: Any, key: str) -> Iterator[Any]:
    """The values of a key, at any depth."""
    if isinstance(value, dict):
        for name, inner in value.items():
            if name == key:
                yield inner
            yield from within(inner, key)
    elif isinstance(value, list):
        for inner in value:
            yield from within(inner, key)


def names(release: Release) -> Iterator[str]:
    seen = set()
    for made in release.objects:
        name = made["metadata"]["name"]
        if (key := (made["kind"], name)) in seen:
            yield f"{title(made)} is there twice"
        seen.add(key)
        if not re.fullmatch(r"[a-z0-9]([-a-z0-9]{0,61}[a-z0-9])?", name):
            yield f"{title(made)}: the name is no DNS label"


def selectors(release: Release) -> Iterator[str]:
    for workload in release.of("Deployment", "StatefulSet"):
        if not workload["spec"]["selector"]["matchLabels"].items() <= labels_of(workload).items():
            yield f"{title(workload)} does not select its own pods"
        if len(release.selected(workload["spec"]["selector"]["matchLabels"])) > 1:
            yield f"{title(workload)} selects the pods of others, too"
    for made in release.objects:
        spec = made.get("spec", {})
        asked = list(within(spec.get("ingress"), "podSelector")) if made["kind"] == "NetworkPolicy" else []
        if made["kind"] == "Service":
            asked = [{"matchLabels": spec["selector"]}]
        elif made["kind"] in ("PodDisruptionBudget", "PodMonitor"):
            asked = [spec["selector"]]
        elif made["kind"] == "NetworkPolicy":
            asked.append(spec["podSelector"])
        for each in asked:
            if not release.selected(each.get("matchLabels", {})):
                yield f"{title(made)} selects no pods by {each}"


def references(release: Release) -> Iterator[str]:
    def exists(kind: str, name: str, key: str | None, who: str) -> Iterator[str]:
        if (kind, name) in release.outside:
            return
        if (made := release.find(kind, name)) is None:
            yield f"{who}: there is no {kind} {name}"
        elif key is not None and key not in made.get("data", {}):
            yield f"{who}: {kind} {name} has no {key}"

    fields = {
        "configMapRef": ("ConfigMap", "name"),
        "secretRef": ("Secret", "name"),
        "secretKeyRef": ("Secret", "name"),
        "configMapKeyRef": ("ConfigMap", "name"),
        "configMap": ("ConfigMap", "name"),
        "secret": ("Secret", "secretName"),
        "credentials": ("Secret", "name"),
        "persistentVolumeClaim": ("PersistentVolumeClaim", "claimName"),
        "scaleTargetRef": ("Deployment", "name"),
        "authenticationRef": ("TriggerAuthentication", "name"),
    }
    for made in release.objects:
        for field, (kind, key) in fields.items():
            for found in within(made.get("spec"), field):
                yield from exists(kind, found[key], found.get("key") if kind == "ConfigMap" else None, title(made))
        for listed, kind in (("imagePullSecrets", "Secret"), ("secretTargetRef", "Secret")):
            for found in chain.from_iterable(within(made.get("spec"), listed)):
                yield from exists(kind, found["name"], None, title(made))
    for workload in release.of("StatefulSet"):
        service = release.find("Service", workload["spec"]["serviceName"])
        if service is None or service["spec"].get("clusterIP") != "None":
            yield f"{title(workload)}: there is no headless service {workload['spec']['serviceName']}"
    for who, workload, container in every_container(release):
        mounts = container.get("volumeMounts", [])
        volumes = {volume["name"] for volume in pod_of(workload).get("volumes", [])}
        for mount in mounts:
            if mount["name"] not in volumes:
                yield f"{who} mounts {mount['name']}, which is no volume of its pod"
        if len({mount["mountPath"] for mount in mounts}) < len(mounts):
            yield f"{who} mounts two volumes at one path"


def ports(release: Release) -> Iterator[str]:
    for workload in release.workloads:
        open_ports = [port for each in containers(workload) for port in each.get("ports", [])]
        for key in ("name", "containerPort"):
            if len({port[key] for port in open_ports}) < len(open_ports):
                yield f"{title(workload)}: two containers of a pod have one port"
    for service in release.of("Service"):
        for port in service["spec"]["ports"]:
            for workload in release.selected(service["spec"]["selector"]):
                if port["targetPort"] not in port_names(workload):
                    yield f"{title(service)}: the pods of {title(workload)} have no port {port['targetPort']}"
    for monitor in release.of("PodMonitor"):
        found = release.selected(monitor["spec"]["selector"]["matchLabels"])
        for endpoint in monitor["spec"]["podMetricsEndpoints"]:
            if not any(endpoint["port"] in port_names(workload) for workload in found):
                yield f"{title(monitor)}: no pod has a port {endpoint['port']}"
            # What the rules and dashboards know a process by.
            labelled = {each["targetLabel"]: each for each in endpoint["relabelings"]}
            if not re.fullmatch("millstream.*", labelled.get("job", {}).get("replacement", "")):
                yield f"{title(monitor)}: the label job begins with millstream, as the alerts expect"
            if "role" not in labelled:
                yield f"{title(monitor)}: it sets no label role"
    numbers = {
        port["containerPort"] for _, _, container in every_container(release) for port in container.get("ports", [])
    }
    for policy in release.of("NetworkPolicy"):
        allowed = {port["port"] for rule in policy["spec"].get("ingress", []) for port in rule.get("ports", [])}
        selected = release.selected(policy["spec"]["podSelector"]["matchLabels"])
        theirs = {port["containerPort"] for each in selected for c in containers(each) for port in c.get("ports", [])}
        if allowed and not allowed & theirs:
            yield f"{title(policy)} lets nothing through to any open port"
        if not allowed <= numbers | {9101}:  # of a proxy beside a model
            yield f"{title(policy)} allows ports {allowed - numbers} that no pod has"


def port_names(workload: Object) -> set[str]:
    return {port["name"] for container in containers(workload) for port in container.get("ports", [])}


def addresses(release: Release) -> Iterator[str]:
    """Addresses of the release's own services."""
    texts = [
        (title(made), text)
        for made in release.objects
        for text in (*made.get("data", {}).values(), *within(made.get("spec"), "url"))
        if made["kind"] != "ConfigMap" or made["metadata"]["name"].endswith("-settings")
    ]
    prefix = {made["metadata"]["labels"]["app.kubernetes.io/instance"] for made in release.objects}
    for who, text in texts:
        for url in re.findall(r"http://[^,\"\s]+", text):
            host, port = urlsplit(url).hostname or "", urlsplit(url).port
            parts = host.split(".")
            if not host.startswith(tuple(prefix)):
                continue
            pod = parts.pop(0) if len(parts) > 1 and release.find("Service", parts[0]) is None else None
            service = release.find("Service", parts[0])
            if service is None:
                yield f"{who}: {url} names no service of this release"
                continue
            if port not in {each["port"] for each in service["spec"]["ports"]}:
                yield f"{who}: {url} names a port that {title(service)} has not"
            if pod is not None:
                for workload in release.selected(service["spec"]["selector"]):
                    pods = {f"{workload['metadata']['name']}-{i}" for i in range(workload["spec"]["replicas"])}
                    if pod not in pods:
                        yield f"{who}: {url} names a pod that {title(workload)} has not"


def environment(release: Release, container: Object) -> dict[str, str]:
    """As the container sees it; a stand-in for each secret."""
    found: dict[str, str] = {}
    for source in container["envFrom"]:
        made = release.find("ConfigMap", source["configMapRef"]["name"])
        found |= made["data"] if made is not None else {}
    return found | {each["name"]: each.get("value", SECRET) for each in container["env"]}


def parsed(arguments: list[str]) -> tuple[str, dict[str, Any]]:
    """The command's name and its parameters. Raises `UsageError`."""
    command: Any = COMMAND
    path: list[str] = []
    while isinstance(command, TyperGroup):
        found = command.get_command(None, arguments[0]) if arguments else None  # type: ignore[arg-type]
        if found is None:
            raise UsageError(f"there is no command {' '.join([*path, *arguments[:1]])}")
        path, arguments, command = [*path, arguments[0]], arguments[1:], found
    with command.make_context(" ".join(path), list(arguments)) as context:
        return " ".join(path), context.params


def arguments(release: Release) -> Iterator[str]:
    for who, _, container in every_container(release):
        variables = environment(release, container)
        for name in re.findall(r"\$\(([^)]*)\)", " ".join(container["args"])):
            if name not in variables:
                yield f"{who}: $({name}) is no variable of it"
        if any("$" in re.sub(r"\$\(\w+\)", "", argument) for argument in container["args"]):
            yield f"{who}: no shell expands {container['args']}"
        try:
            parsed(container["args"])
        except (UsageError, typer.Exit) as error:
            yield f"{who}: {container['args']}: {error}"


def settings(release: Release) -> Iterator[str]:
    """Needs an environment without `MILLSTREAM_` variables of its own."""
    import os
    from unittest.mock import patch

    for who, workload, container in every_container(release):
        variables = environment(release, container)
        with patch.dict(os.environ, {name: text for name, text in variables.items() if name.startswith(ENV_PREFIX)}):
            try:
                load_settings()
            except ConfigError as error:
                yield f"{who}: {error}"
        if pod_of(workload).get("enableServiceLinks", True):
            yield f"{who}: variables of services would be taken for settings (enableServiceLinks)"


def probes(release: Release) -> Iterator[str]:
    for who, _, container in every_container(release):
        try:
            command, options = parsed(container["args"])
        except (UsageError, typer.Exit):
            continue  # reported by `arguments`
        served = options.get("port" if command == "gateway" else "health_port")
        numbers = {port["name"]: port["containerPort"] for port in container.get("ports", [])}
        asked = [
            container[kind]["httpGet"]
            for kind in ("startupProbe", "livenessProbe", "readinessProbe")
            if kind in container
        ]
        if served and len(asked) < 3:
            yield f"{who} has probes that nothing asks"
        for each in asked:
            if each["path"] not in ("/livez", "/readyz"):
                yield f"{who}: {each['path']} is not served"
            if numbers.get(each["port"], each["port"]) != served:
                yield f"{who}: probes ask port {each['port']}, and {command} serves {served}"
        if (
            asked
            and environment(release, container).get("MILLSTREAM_HEALTH_HOST") != "0.0.0.0"
            and command != "gateway"
        ):
            yield f"{who}: probes come from outside, and health_host is loopback"
        if command == "proxy" and numbers.get("http") != urlsplit(options["listen"]).port:
            yield f"{who}: it listens at {options['listen']}, which is not its port http"


def graces(release: Release) -> Iterator[str]:
    for who, workload, container in every_container(release):
        try:
            command, options = parsed(container["args"])
        except (UsageError, typer.Exit):
            continue
        grace = pod_of(workload).get("terminationGracePeriodSeconds", 30)
        if (drain := options.get("drain_s")) is not None and grace < drain + 10:
            yield f"{who}: it is killed after {grace} s, and {command} drains for {drain:g} s"


def scaling(release: Release) -> Iterator[str]:
    found = release.of("ConfigMap")
    partitions = next(
        (
            int(each["data"]["MILLSTREAM_KAFKA_PARTITIONS"])
            for each in found
            if "MILLSTREAM_KAFKA_PARTITIONS" in each["data"]
        ),
        8,
    )
    scaled = {each["spec"]["scaleTargetRef"]["name"]: each for each in release.of("ScaledObject")}
    for workload in release.of("Deployment", "StatefulSet"):
        role = labels_of(workload).get("app.kubernetes.io/component")
        replicas = workload["spec"].get("replicas")
        if (scaler := scaled.get(workload["metadata"]["name"])) is not None:
            if replicas is not None:
                yield f"{title(workload)}: each upgrade would undo what {title(scaler)} has decided"
            replicas = scaler["spec"]["maxReplicaCount"]
            (trigger,) = scaler["spec"]["triggers"]
            target = trigger["metadata"].get("targetValue", trigger["metadata"].get("threshold"))
            (container,) = pod_of(workload)["containers"]
            variables = environment(release, container)
            processes = max(1, int(variables.get("MILLSTREAM_RUNNER_PROCESSES", 1)))
            if int(target) != processes * int(variables.get("MILLSTREAM_RUNNER_CONCURRENCY", 8)):
                yield f"{title(scaler)}: {target} are not the slots of a runner"
        if role in ("runner", "adapter", "sink") and (replicas or 1) > partitions:
            yield f"{title(workload)}: {replicas} replicas, and {partitions} partitions"


def hardened(release: Release) -> Iterator[str]:
    for who, workload, container in every_container(release):
        pod, own = pod_of(workload)["securityContext"], container["securityContext"]
        if not pod["runAsNonRoot"] or own["allowPrivilegeEscalation"] or not own["readOnlyRootFilesystem"]:
            yield f"{who} may do more than it needs"
        if pod_of(workload)["automountServiceAccountToken"]:
            yield f"{who} gets a token of Kubernetes"
        if "memory" not in container["resources"]["limits"] or not container["resources"]["requests"].keys() >= {
            "cpu",
            "memory",
        }:
            yield f"{who} has no limit of memory, or asks for nothing"


def declared(values: Any) -> Iterable[tuple[str, str]]:
    """What values say exists already: secrets by name and key, claims, and secrets to pull images with."""
    if isinstance(values, dict):
        if values.get("name") and {"key", "cert"} & values.keys():
            yield "Secret", values["name"]
        if values.get("existingClaim"):
            yield "PersistentVolumeClaim", values["existingClaim"]
        for name, inner in values.items():
            yield from (("Secret", each) for each in inner) if name == "imagePullSecrets" else declared(inner)
