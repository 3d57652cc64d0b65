"""Renders the Helm chart and checks objects against the schemas of Kubernetes, KEDA and the Prometheus operator.

Runs in `.venv-ops` (`make ops`). Reads JSON from standard input, and writes JSON:
``{"render": {name: values}, "check": [objects]}`` → ``{"rendered": {name: [objects] or "error"}, "lint": [messages],
"wrong": [about rendered objects], "problems": [about each of the objects; empty if it is right]}``.
"""

import json
import sys
from pathlib import Path
from typing import Any

import helm_python as helm
import kubernetes_validate
import yaml
from cloudcoil.models.keda import v1alpha1 as keda
from cloudcoil.models.prometheus_operator import v1 as prometheus_operator

CHART = Path(__file__).parents[4] / "deploy" / "helm" / "millstream"
NEWEST = "1.37"
OLDEST = "1.29"  # as kubeVersion of Chart.yaml says
MODELS = {"keda.sh/v1alpha1": keda, "monitoring.coreos.com/v1": prometheus_operator}


def rendered(values: dict[str, Any]) -> list[dict[str, Any]] | str:
    try:
        with helm.Chart.load(str(CHART)) as chart:
            files = chart.render(values=values, name="rel", namespace="ns")
    except helm.HelmError as error:
        return str(error)
    texts = (text for name, text in files.items() if name.endswith(".yaml"))
    return [made for text in texts for made in yaml.safe_load_all(text) if made]


def problem(made: dict[str, Any], version: str = NEWEST) -> str:
    """What the object's schema refuses; empty if nothing."""
    try:
        if (models := MODELS.get(made["apiVersion"])) is None:
            kubernetes_validate.validate(made, version, strict=True)
            return ""
        dumped = getattr(models, made["kind"]).model_validate(made).model_dump(by_alias=True, exclude_unset=True)
    except Exception as error:
        return f"{made['kind']} {made['metadata']['name']}: {str(error).splitlines()[0]}"
    unknown = missing(made, json.loads(json.dumps(dumped, default=str)))
    return f"{made['kind']} {made['metadata']['name']}: {'; '.join(unknown)}" if unknown else ""


def missing(given: Any, kept: Any, path: str = "") -> list[str]:
    """Fields that a model has not kept, because it does not know them."""
    if isinstance(given, dict) and isinstance(kept, dict):
        unknown = [f"unknown field {path}.{name}" for name in given if name not in kept]
        return unknown + [
            text for name in given if name in kept for text in missing(given[name], kept[name], f"{path}.{name}")
        ]
    if isinstance(given, list) and isinstance(kept, list):
        return [
            text for i, (a, b) in enumerate(zip(given, kept, strict=True)) for text in missing(a, b, f"{path}[{i}]")
        ]
    return []


def shape(value: Any) -> Any:
    """Fields and types: what schemas look at. Of objects with one shape one is checked."""
    if isinstance(value, dict):
        return {name: inner if name in ("apiVersion", "kind") else shape(inner) for name, inner in value.items()}
    return [shape(inner) for inner in value] if isinstance(value, list) else type(value).__name__


def main() -> None:
    asked = json.load(sys.stdin)
    helm.disable_logging()
    results = {name: rendered(values) for name, values in asked["render"].items()}
    objects = [made for found in results.values() if not isinstance(found, str) for made in found]
    distinct = {json.dumps(shape(made), sort_keys=True): made for made in objects}
    problems = [found for made in distinct.values() if (found := problem(made))]
    pods = {made["kind"]: made for made in distinct.values() if "template" in made.get("spec", {})}
    problems += [found for made in pods.values() if (found := problem(made, OLDEST))]
    lint = helm.lint(str(CHART), strict=True, quiet=True)
    json.dump(
        {
            "rendered": results,
            "lint": lint["messages"],
            "wrong": problems,
            "problems": [problem(made) for made in asked["check"]],
        },
        sys.stdout,
    )


main()
