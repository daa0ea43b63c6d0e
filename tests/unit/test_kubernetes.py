"""The manifests of deploy/kubernetes: kubectl builds them, Kubernetes takes them, and they are true to the code."""

from __future__ import annotations

import runpy
import shutil
import subprocess
import sys
from functools import cache
from pathlib import Path
from typing import Any

import kubernetes_validate
import pytest
import yaml

from proxy.settings import Settings
from tests.documents import ROOT
from tests.test_docs import served_routes

DEPLOYED = ROOT / "deploy" / "kubernetes"
OVERLAYS = ["cpu", "gpu", "gpu-keda", "multi-node"]
# Kinds that are not Kubernetes' own, so that it has no schema of them: what they must have at least.
OTHERS: dict[str, set[str]] = {
    "ServiceMonitor": {"selector", "endpoints"},
    "PrometheusRule": {"groups"},
    "ScaledObject": {"scaleTargetRef", "triggers"},
    "LeaderWorkerSet": {"leaderWorkerTemplate", "replicas"},
}
Json = dict[str, Any]


@cache
def built(overlay: str) -> list[Json]:
    kubectl = shutil.which("kubectl", path=str(Path(sys.executable).parent)) or "kubectl"
    command = [kubectl, "kustomize", str(DEPLOYED / "overlays" / overlay)]
    done = subprocess.run(command, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr
    return list(yaml.safe_load_all(done.stdout))


def kinds(overlay: str, *wanted: str) -> list[Json]:
    return [each for each in built(overlay) if each["kind"] in wanted]


def pod_templates(overlay: str) -> list[tuple[Json, Json]]:
    """(labels, pod spec) of all that makes pods."""
    found = []
    for each in built(overlay):
        spec = each.get("spec", {})
        group = spec.get("leaderWorkerTemplate", {})
        templates = (spec.get("template"), group.get("leaderTemplate"), group.get("workerTemplate"))
        found += [(each["metadata"]["labels"], each["spec"]) for each in templates if each]
    return found


def containers(spec: Json) -> list[Json]:
    return [*spec.get("initContainers", []), *spec["containers"]]


def selected(selector: Json, labels: Json) -> bool:
    return all(labels.get(key) == value for key, value in selector.get("matchLabels", {}).items()) and all(
        labels.get(each["key"]) in each["values"] for each in selector.get("matchExpressions", [])
    )


def settings_of(overlay: str) -> dict[str, str]:
    [found] = [each["data"] for each in kinds(overlay, "ConfigMap") if each["metadata"]["name"].startswith("proxy-")]
    return found


@pytest.fixture(params=OVERLAYS)
def overlay(request: pytest.FixtureRequest) -> str:
    name: str = request.param
    return name


def test_kubernetes_takes_it(overlay: str) -> None:
    assert len(built(overlay)) > 10
    for each in built(overlay):
        if each["kind"] in OTHERS:
            assert OTHERS[each["kind"]] <= each["spec"].keys()
        else:
            kubernetes_validate.validate(each, "1.37", strict=True)


def test_nothing_is_there_twice(overlay: str) -> None:
    names = [(each["kind"], each["metadata"]["name"]) for each in built(overlay)]
    assert len(set(names)) == len(names)


def test_each_selector_finds_pods(overlay: str) -> None:
    labels = [labels for labels, _ in pod_templates(overlay)]
    for each in kinds(overlay, "Deployment", "StatefulSet", "PodDisruptionBudget"):
        assert any(selected(each["spec"]["selector"], one) for one in labels), each["metadata"]
    for each in kinds(overlay, "Service"):
        assert any(selected({"matchLabels": each["spec"]["selector"]}, one) for one in labels), each["metadata"]
    for each in kinds(overlay, "NetworkPolicy"):
        assert any(selected(each["spec"]["podSelector"], one) for one in labels), each["metadata"]


def test_each_service_points_at_a_port_that_is_there(overlay: str) -> None:
    for service in kinds(overlay, "Service"):
        for labels, spec in pod_templates(overlay):
            if selected({"matchLabels": service["spec"]["selector"]}, labels):
                names = {port["name"] for each in spec["containers"] for port in each["ports"]}
                assert {port["targetPort"] for port in service["spec"]["ports"]} <= names


def test_config_maps_and_claims_that_are_used_exist(overlay: str) -> None:
    there = {each["metadata"]["name"] for each in kinds(overlay, "ConfigMap")}
    for _, spec in pod_templates(overlay):
        for container in containers(spec):
            used = [each["configMapRef"]["name"] for each in container.get("envFrom", [])]
            assert set(used) <= there


def test_the_proxys_settings_are_settings(overlay: str, monkeypatch: pytest.MonkeyPatch) -> None:
    for name, value in settings_of(overlay).items():
        monkeypatch.setenv(name, value)
    settings = Settings()
    assert settings.backends["llama_cpp"].dialect == "llama-server"
    assert ("vllm" in settings.backends) == (overlay != "cpu")


def test_names_that_the_proxy_asks_for_are_headless_services(overlay: str) -> None:
    headless = {
        each["metadata"]["name"] for each in kinds(overlay, "Service") if each["spec"].get("clusterIP") == "None"
    }
    urls = [value for name, value in settings_of(overlay).items() if name.endswith("__URLS")]
    assert {url.removeprefix("dns://").partition(":")[0] for url in urls} == headless


def test_both_paths_have_the_model_under_one_name(overlay: str) -> None:
    names = {each["data"]["MODEL_NAME"] for each in kinds(overlay, "ConfigMap") if "MODEL_NAME" in each["data"]}
    assert len(names) == 1


def test_slots_are_what_vllm_runs(overlay: str) -> None:
    data = {key: value for each in kinds(overlay, "ConfigMap") for key, value in each["data"].items()}
    assert data.get("XGEN_BACKENDS__VLLM__SLOTS") == data.get("VLLM_MAX_NUM_SEQS")


def test_the_proxys_probes_are_routes(overlay: str) -> None:
    routes = {path for _, path in served_routes()}
    [spec] = [spec for labels, spec in pod_templates(overlay) if labels["app.kubernetes.io/name"] == "proxy"]
    [proxy] = spec["containers"]
    paths = {proxy[probe]["httpGet"]["path"] for probe in ("readinessProbe", "livenessProbe", "startupProbe")}
    assert paths == {"/ready", "/health"}
    assert paths <= routes


def test_there_is_time_to_drain(overlay: str) -> None:
    drain = float(settings_of(overlay)["XGEN_DRAIN_S"])
    for labels, spec in pod_templates(overlay):
        sleeps = [
            each["lifecycle"]["preStop"]["sleep"]["seconds"] for each in spec["containers"] if "lifecycle" in each
        ]
        work = drain if labels["app.kubernetes.io/name"] == "proxy" else 0
        assert spec["terminationGracePeriodSeconds"] > sum(sleeps) + work


def test_each_container_is_limited_and_sealed(overlay: str) -> None:
    for labels, spec in pod_templates(overlay):
        assert spec["automountServiceAccountToken"] is False
        assert spec["securityContext"]["seccompProfile"] == {"type": "RuntimeDefault"}
        for container in containers(spec):
            assert container["resources"]["requests"].keys() == container["resources"]["limits"].keys()
            assert {"cpu", "memory"} <= container["resources"]["limits"].keys()
            assert container["securityContext"]["allowPrivilegeEscalation"] is False
            assert container["securityContext"]["capabilities"] == {"drop": ["ALL"]}
            image, _, tag = container["image"].rpartition(":")
            assert image, container["image"]
            assert tag not in ("", "latest")
            if labels["app.kubernetes.io/name"] != "vllm":  # its image runs as root and writes where it likes
                assert spec["securityContext"]["runAsNonRoot"] is True
                assert container["securityContext"]["readOnlyRootFilesystem"] is True


FLOWS = {
    "cpu": {("anybody", "proxy"), ("proxy", "llama-cpp"), ("monitoring", "proxy"), ("monitoring", "llama-cpp")},
}
FLOWS["gpu"] = FLOWS["gpu-keda"] = FLOWS["cpu"] | {("proxy", "vllm"), ("monitoring", "vllm")}
FLOWS["multi-node"] = FLOWS["gpu"] | {("vllm", "vllm")}


def test_only_these_may_talk(overlay: str) -> None:
    """Who may come in, by the network policies; and all else is denied."""
    names = {labels["app.kubernetes.io/name"] for labels, _ in pod_templates(overlay)}
    assert any(
        each["spec"]["podSelector"] == {} and set(each["spec"]["policyTypes"]) == {"Ingress", "Egress"}
        and not each["spec"].get("ingress") and not each["spec"].get("egress")
        for each in kinds(overlay, "NetworkPolicy")
    )  # fmt: skip
    flows = set()
    for policy in kinds(overlay, "NetworkPolicy"):
        targets = {name for name in names if selected(policy["spec"]["podSelector"], {"app.kubernetes.io/name": name})}
        for rule in policy["spec"].get("ingress", []):
            for source in rule["from"]:
                flows |= {(came, target) for came in sources(source, names) for target in targets}
    assert flows == FLOWS[overlay]


def sources(source: Json, names: set[str]) -> set[str]:
    if "namespaceSelector" in source:
        labels = source["namespaceSelector"].get("matchLabels")
        return {labels["kubernetes.io/metadata.name"]} if labels else {"anybody"}
    return {name for name in names if selected(source["podSelector"], {"app.kubernetes.io/name": name})}


def test_what_scales_exists_and_says_no_number_itself(overlay: str) -> None:
    for each in kinds(overlay, "HorizontalPodAutoscaler", "ScaledObject"):
        target = each["spec"]["scaleTargetRef"]
        [scaled] = [one for one in kinds(overlay, target["kind"]) if one["metadata"]["name"] == target["name"]]
        assert "replicas" not in scaled["spec"], "applying it again would undo what the autoscaler did"


def test_the_adapter_makes_the_metrics_that_the_autoscaler_reads() -> None:
    rules = yaml.safe_load((DEPLOYED / "components" / "autoscale-adapter" / "adapter-values.yaml").read_text())["rules"]
    made = {rule["name"]["as"] for rule in rules["custom"]}
    [scaler] = [each for each in kinds("gpu", "HorizontalPodAutoscaler") if each["metadata"]["name"] == "vllm"]
    assert {each["pods"]["metric"]["name"] for each in scaler["spec"]["metrics"] if each["type"] == "Pods"} == made


@pytest.mark.parametrize("series", ["vllm:kv_cache_usage_perc", "vllm:num_requests_waiting"])
def test_the_series_are_vllms_own(series: str) -> None:
    page = next((ROOT / "tests").rglob("vllm-0.32.0-metrics-loaded.txt")).read_text()
    assert f"\n{series}{{" in page
    told = [path.read_text() for path in (DEPLOYED / "components").rglob("*.yaml")]
    assert any(series in text for text in told)


def test_prometheus_rules_are_those_of_the_compose_stack() -> None:
    made = runpy.run_path(str(DEPLOYED / "rules.py"))
    assert made["TARGET"].read_text() == made["rendered"](), "run python deploy/kubernetes/rules.py"
