"""The manifests of deploy/kubernetes build, match the schemas of Kubernetes, and agree with the code."""

from __future__ import annotations

import copy
import re
import runpy
import shutil
import subprocess
import sys
from collections.abc import Callable, Iterator
from functools import cache
from ipaddress import ip_network
from pathlib import Path
from typing import Any

import jsonschema
import kubernetes_validate
import pytest
import yaml

from tests.repo.test_docs import METRICS, served_routes
from tests.support.documents import ROOT
from xgen_proxy.config.loading import ConfigError, ConfigSources
from xgen_proxy.fleet.discovery import LOOKUP_INTERVAL_S

DEPLOYED = ROOT / "deploy" / "kubernetes"
OVERLAYS = ["cpu", "gpu", "gpu-keda", "multi-node"]
KUBERNETES = "1.37"
Json = dict[str, Any]
CUSTOM: dict[str, Json] = yaml.safe_load((ROOT / "tests" / "fixtures" / "custom_kinds.yaml").read_text())


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
    """(labels, pod spec) of each kind that creates pods."""
    found = []
    for each in built(overlay):
        spec = each.get("spec", {})
        templates = [spec["template"]] if "template" in spec else group_templates(spec)
        found += [(each["metadata"]["labels"], each["spec"]) for each in templates]
    return found


def group_templates(spec: Json) -> list[Json]:
    group = spec.get("leaderWorkerTemplate", {})
    return [group[name] for name in ("leaderTemplate", "workerTemplate") if name in group]


def containers(spec: Json) -> list[Json]:
    return [*spec.get("initContainers", []), *spec["containers"]]


def selected(selector: Json, labels: Json) -> bool:
    return all(labels.get(key) == value for key, value in selector.get("matchLabels", {}).items()) and all(
        labels.get(each["key"]) in each["values"] for each in selector.get("matchExpressions", [])
    )


def settings_of(overlay: str) -> dict[str, str]:
    [found] = [each["data"] for each in kinds(overlay, "ConfigMap") if each["metadata"]["name"].startswith("proxy-")]
    return dict(found)


@pytest.fixture(params=OVERLAYS)
def overlay(request: pytest.FixtureRequest) -> str:
    name: str = request.param
    return name


def test_manifests_match_the_schemas(overlay: str) -> None:
    assert len(built(overlay)) > 10
    for each in built(overlay):
        check_custom(each) if each["kind"] in CUSTOM else check(each)


def check(resource: Json) -> None:
    kubernetes_validate.validate(resource, KUBERNETES, strict=True)


def check_custom(resource: Json) -> None:
    """Validate a custom kind by our schema, and the Kubernetes parts in it by the schemas of Kubernetes."""
    known = CUSTOM[resource["kind"]]
    assert resource["apiVersion"] == known["apiVersion"]
    spec = resource["spec"]
    jsonschema.validate(spec, {"$defs": CUSTOM["$defs"], **known["spec"]})
    for template in group_templates(spec):
        check({"apiVersion": "v1", "kind": "PodTemplate", "metadata": {"name": "a"}, "template": template})
    if "advanced" in spec:
        scaler = {"maxReplicas": 1, "scaleTargetRef": {"kind": "StatefulSet", "name": "a"}}
        scaler["behavior"] = spec["advanced"]["horizontalPodAutoscalerConfig"]["behavior"]
        check(
            {
                "apiVersion": "autoscaling/v2",
                "kind": "HorizontalPodAutoscaler",
                "metadata": {"name": "a"},
                "spec": scaler,
            }
        )


@pytest.mark.parametrize(
    ("kind", "break_it"),
    [
        ("LeaderWorkerSet", lambda spec: spec.update(workers=2)),
        ("LeaderWorkerSet", lambda spec: spec["leaderWorkerTemplate"]["workerTemplate"]["spec"].update(image="x")),
        ("ScaledObject", lambda spec: spec["triggers"][0]["metadata"].update(threshold=5)),
        ("ServiceMonitor", lambda spec: spec["endpoints"][0].update(portName="http")),
        ("PrometheusRule", lambda spec: spec["groups"][0]["rules"][0].pop("expr")),
    ],
)
def test_wrong_custom_kinds_are_rejected(kind: str, break_it: Callable[[Json], object]) -> None:
    [resource] = [each for overlay in ("multi-node", "gpu-keda") for each in kinds(overlay, kind)][:1]
    wrong = copy.deepcopy(resource)
    break_it(wrong["spec"])
    with pytest.raises((jsonschema.ValidationError, kubernetes_validate.ValidationError)):
        check_custom(wrong)


def test_everything_is_in_one_namespace(overlay: str) -> None:
    [namespace] = kinds(overlay, "Namespace")
    others = [each for each in built(overlay) if each["kind"] != "Namespace"]
    assert {each["metadata"].get("namespace") for each in others} == {namespace["metadata"]["name"]}


def test_nothing_is_defined_twice(overlay: str) -> None:
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


def test_each_service_points_at_an_existing_port(overlay: str) -> None:
    for service in kinds(overlay, "Service"):
        for labels, spec in pod_templates(overlay):
            if selected({"matchLabels": service["spec"]["selector"]}, labels):
                names = {port["name"] for each in spec["containers"] for port in each["ports"]}
                assert {port["targetPort"] for port in service["spec"]["ports"]} <= names


def test_used_config_maps_and_claims_exist(overlay: str) -> None:
    there = {each["metadata"]["name"] for each in kinds(overlay, "ConfigMap")}
    for _, spec in pod_templates(overlay):
        for container in containers(spec):
            used = [each["configMapRef"]["name"] for each in container.get("envFrom", [])]
            assert set(used) <= there
    claims = {each["metadata"]["name"] for each in kinds(overlay, "PersistentVolumeClaim")}
    for _, spec in pod_templates(overlay):
        used = [
            each["persistentVolumeClaim"]["claimName"] for each in spec["volumes"] if "persistentVolumeClaim" in each
        ]
        assert set(used) <= claims


def test_each_mount_has_its_volume(overlay: str) -> None:
    for each in built(overlay):
        claimed = {claim["metadata"]["name"] for claim in each.get("spec", {}).get("volumeClaimTemplates", [])}
        for template in [each["spec"]["template"]] if "template" in each.get("spec", {}) else []:
            spec = template["spec"]
            there = {volume["name"] for volume in spec["volumes"]} | claimed
            assert {mount["name"] for one in containers(spec) for mount in one["volumeMounts"]} <= there


def test_no_service_has_the_name_of_a_group() -> None:
    """The controller creates a service of that name, by which pods find each other before they are ready."""
    [group] = kinds("multi-node", "LeaderWorkerSet")
    assert group["metadata"]["name"] not in {each["metadata"]["name"] for each in kinds("multi-node", "Service")}


def test_a_group_has_the_machines_and_gpus_in_vllms_flags() -> None:
    [group] = kinds("multi-node", "LeaderWorkerSet")
    flags = {key: value for each in kinds("multi-node", "ConfigMap") for key, value in each["data"].items()}
    assert group["spec"]["leaderWorkerTemplate"]["size"] == int(flags["VLLM_PIPELINE_PARALLEL_SIZE"])
    leader, worker = (template["spec"]["containers"][0] for template in group_templates(group["spec"]))
    for machine in (leader, worker):
        assert machine["resources"]["limits"]["nvidia.com/gpu"] == int(flags["VLLM_TENSOR_PARALLEL_SIZE"])
    assert set(leader["args"]) - set(worker["args"]) == {"--port=8000", "--shutdown-timeout=60"}
    assert set(worker["args"]) - set(leader["args"]) == {"--headless"}


def test_arguments_name_variables_that_are_set(overlay: str) -> None:
    """Kubernetes does not replace $(NAME) if the variable is missing."""
    data = {each["metadata"]["name"]: each["data"] for each in kinds(overlay, "ConfigMap")}
    for _, spec in pod_templates(overlay):
        for each in containers(spec):
            known = {one["name"] for one in each.get("env", [])}
            known |= {key for one in each.get("envFrom", []) for key in data[one["configMapRef"]["name"]]}
            if overlay == "multi-node":  # the controller sets these
                known |= {"LWS_GROUP_SIZE", "LWS_WORKER_INDEX", "LWS_LEADER_ADDRESS"}
            used = re.findall(r"\$\((\w+)\)", " ".join([*each.get("args", []), *each.get("command", [])]))
            assert set(used) <= known


def test_the_proxys_settings_are_settings(overlay: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """ConfigSources.load() refuses names that it does not know."""
    for name, value in settings_of(overlay).items():
        monkeypatch.setenv(name, value)
    with pytest.raises(ConfigError, match="api_keys: none are set"):
        ConfigSources().load()
    monkeypatch.setenv("XGEN_API_KEYS", "none")
    settings = ConfigSources().load()
    assert settings.host == "0.0.0.0"
    assert settings.backends["llama_cpp"].dialect == "llama-server"
    assert ("vllm" in settings.backends) == (overlay != "cpu")


def test_no_pod_of_the_proxy_starts_without_its_keys(overlay: str) -> None:
    [proxy] = [each for each in kinds(overlay, "Deployment") if each["metadata"]["name"] == "proxy"]
    [secrets] = [each for each in proxy["spec"]["template"]["spec"]["volumes"] if each["name"] == "secrets"]
    assert secrets["secret"] == {"secretName": "proxy-secrets"}, (
        "an optional Secret that is deleted takes its files along"
    )


def test_the_proxy_resolves_headless_services(overlay: str) -> None:
    headless = {
        each["metadata"]["name"] for each in kinds(overlay, "Service") if each["spec"].get("clusterIP") == "None"
    }
    urls = [value for name, value in settings_of(overlay).items() if name.endswith("__URLS")]
    assert {url.removeprefix("dns://").partition(":")[0] for url in urls} == headless


def test_both_backends_serve_the_model_under_one_name(overlay: str) -> None:
    names = {each["data"]["MODEL_NAME"] for each in kinds(overlay, "ConfigMap") if "MODEL_NAME" in each["data"]}
    assert len(names) == 1


def test_slots_match_vllms_flags(overlay: str) -> None:
    data = {key: value for each in kinds(overlay, "ConfigMap") for key, value in each["data"].items()}
    assert data.get("XGEN_BACKENDS__VLLM__SLOTS") == data.get("VLLM_MAX_NUM_SEQS")


def test_a_pod_has_the_gpus_in_vllms_flags() -> None:
    [vllm] = [each for each in kinds("gpu", "StatefulSet") if each["metadata"]["name"] == "vllm"]
    [container] = vllm["spec"]["template"]["spec"]["containers"]
    flags = {key: value for each in kinds("gpu", "ConfigMap") for key, value in each["data"].items()}
    assert container["resources"]["limits"]["nvidia.com/gpu"] == int(flags["VLLM_TENSOR_PARALLEL_SIZE"])


def test_the_proxys_probes_are_routes(overlay: str) -> None:
    routes = {path for _, path in served_routes()}
    [spec] = [spec for labels, spec in pod_templates(overlay) if labels["app.kubernetes.io/name"] == "proxy"]
    [proxy] = spec["containers"]
    paths = {proxy[probe]["httpGet"]["path"] for probe in ("readinessProbe", "livenessProbe", "startupProbe")}
    assert paths == {"/ready", "/health"}
    assert paths <= routes


def test_pods_have_time_to_drain(overlay: str) -> None:
    """The grace period, after which a container is killed, includes preStop."""
    for labels, spec in pod_templates(overlay):
        for container in spec["containers"]:
            sleeps = container["lifecycle"]["preStop"]["sleep"]["seconds"] if "lifecycle" in container else 0
            drains = [
                int(each) for each in re.findall(r"--shutdown-timeout=(\d+)", " ".join(container.get("args", [])))
            ]
            if labels["app.kubernetes.io/name"] == "proxy":
                drains = [int(settings_of(overlay)["XGEN_DRAIN_S"])]
            assert spec["terminationGracePeriodSeconds"] >= sleeps + sum(drains) + 10


def test_a_pod_answers_until_dns_forgets_it(overlay: str) -> None:
    """The proxy resolves names every LOOKUP_INTERVAL_S, and the name server of the cluster caches them for 5 s."""
    for labels, spec in pod_templates(overlay):
        if labels.get("xgen/role") != "worker":
            [container] = spec["containers"]
            assert container["lifecycle"]["preStop"]["sleep"]["seconds"] >= LOOKUP_INTERVAL_S + 5 + 1


def test_containers_have_limits_and_few_privileges(overlay: str) -> None:
    for labels, spec in pod_templates(overlay):
        assert spec["automountServiceAccountToken"] is False
        assert spec["enableServiceLinks"] is False, "the Service vllm would set VLLM_PORT, which vLLM takes for its own"
        assert spec["securityContext"]["seccompProfile"] == {"type": "RuntimeDefault"}
        for container in containers(spec):
            assert container["resources"]["requests"].keys() == container["resources"]["limits"].keys()
            assert {"cpu", "memory"} <= container["resources"]["limits"].keys()
            assert container["securityContext"]["allowPrivilegeEscalation"] is False
            assert container["securityContext"]["capabilities"] == {"drop": ["ALL"]}
            image, _, tag = container["image"].rpartition(":")
            assert image, container["image"]
            assert tag not in ("", "latest")
            if labels["app.kubernetes.io/name"] != "vllm":  # its image runs as root and writes anywhere
                assert spec["securityContext"]["runAsNonRoot"] is True
                assert container["securityContext"]["readOnlyRootFilesystem"] is True


# Allowed connections; everything else is denied.
WAYS_IN = {
    "cpu": {("clients", "proxy"), ("proxy", "llama-cpp"), ("monitoring", "proxy"), ("monitoring", "llama-cpp")},
}
WAYS_IN["gpu"] = WAYS_IN["gpu-keda"] = WAYS_IN["cpu"] | {("proxy", "vllm"), ("monitoring", "vllm")}
WAYS_IN["multi-node"] = WAYS_IN["gpu"] | {("vllm", "vllm")}
WAYS_OUT: dict[str, set[tuple[str, str, int | None]]] = {
    "cpu": {
        ("proxy", "llama-cpp", 8000), ("llama-cpp", "the public Internet", 443),
        ("proxy", "kube-system", 53), ("llama-cpp", "kube-system", 53),
    },
}  # fmt: skip
WAYS_OUT["gpu"] = WAYS_OUT["gpu-keda"] = WAYS_OUT["cpu"] | {
    ("proxy", "vllm", 8000), ("vllm", "the public Internet", 443), ("vllm", "kube-system", 53),
}  # fmt: skip
WAYS_OUT["multi-node"] = WAYS_OUT["gpu"] | {("vllm", "vllm", None)}


def test_the_default_is_to_deny(overlay: str) -> None:
    assert any(
        each["spec"] == {"podSelector": {}, "policyTypes": ["Ingress", "Egress"]}
        for each in kinds(overlay, "NetworkPolicy")
    )


def test_only_these_may_connect(overlay: str) -> None:
    flows = {
        (came, name)
        for name, rule in rules(overlay, "ingress")
        for source in rule["from"]
        for came in peers(source, overlay)
    }
    assert flows == WAYS_IN[overlay]


def test_pods_may_connect_only_there(overlay: str) -> None:
    flows = {
        (name, target, port["port"])
        for name, rule in rules(overlay, "egress")
        for peer in rule["to"]
        for target in peers(peer, overlay)
        for port in rule.get("ports", [{"port": None}])
    }
    assert flows == WAYS_OUT[overlay]


def test_ways_in_lead_to_named_ports(overlay: str) -> None:
    for name, rule in rules(overlay, "ingress"):
        ports = {port["port"] for port in rule.get("ports", [])}
        named = {
            port["name"]
            for labels, spec in pod_templates(overlay)
            if labels["app.kubernetes.io/name"] == name
            for each in spec["containers"]
            for port in each.get("ports", [])
        }
        assert ports <= named


def rules(overlay: str, direction: str) -> Iterator[tuple[str, Json]]:
    """(selected pods, rule) of each network policy."""
    for policy in kinds(overlay, "NetworkPolicy"):
        spec = policy["spec"]
        assert (direction in spec) <= (direction.capitalize() in spec["policyTypes"]), "it would not be heeded"
        for name in pod_names(overlay):
            if selected(spec["podSelector"], {"app.kubernetes.io/name": name}):
                yield from ((name, rule) for rule in spec.get(direction, []))


def peers(peer: Json, overlay: str) -> set[str]:
    if "ipBlock" in peer:
        assert peer["ipBlock"]["cidr"] in ("0.0.0.0/0", "::/0")
        private = [ip_network(each) for each in ("10.0.0.1/32", "192.168.0.1/32", "169.254.169.254/32", "fd00::1/128")]
        spared = [ip_network(each) for each in peer["ipBlock"]["except"]]
        for address in private:
            if address.version == ip_network(peer["ipBlock"]["cidr"]).version:
                assert any(address.subnet_of(each) for each in spared)  # type: ignore[arg-type]
        return {"the public Internet"}
    if "namespaceSelector" in peer:
        labels = peer["namespaceSelector"]["matchLabels"]
        return {"clients"} if labels == {"xgen/clients": "yes"} else {labels["kubernetes.io/metadata.name"]}
    return {name for name in pod_names(overlay) if selected(peer["podSelector"], {"app.kubernetes.io/name": name})}


def pod_names(overlay: str) -> set[str]:
    return {labels["app.kubernetes.io/name"] for labels, _ in pod_templates(overlay)}


def test_scaled_workloads_exist_and_set_no_replica_count(overlay: str) -> None:
    for each in kinds(overlay, "HorizontalPodAutoscaler", "ScaledObject"):
        target = each["spec"]["scaleTargetRef"]
        [scaled] = [one for one in kinds(overlay, target["kind"]) if one["metadata"]["name"] == target["name"]]
        assert "replicas" not in scaled["spec"], "applying it again would undo what the autoscaler did"


ADAPTER = DEPLOYED / "components" / "autoscale-adapter" / "adapter-values.yaml"


def vllm_scaler() -> list[Json]:
    [scaler] = [each for each in kinds("gpu", "HorizontalPodAutoscaler") if each["metadata"]["name"] == "vllm"]
    metrics: list[Json] = scaler["spec"]["metrics"]
    return metrics


def test_the_adapter_provides_the_autoscalers_metrics() -> None:
    made = yaml.safe_load(ADAPTER.read_text())["rules"]
    for group, kind in (("custom", "Pods"), ("external", "External")):
        read = {each[kind.lower()]["metric"]["name"] for each in vllm_scaler() if each["type"] == kind}
        assert {rule["name"]["as"] for rule in made[group]} == read


def test_the_autoscalers_series_exist() -> None:
    """Series of vLLM and the proxy; those of the GPU come from its exporter."""
    [scaled] = kinds("gpu-keda", "ScaledObject")
    queries = [each["metadata"]["query"] for each in scaled["spec"]["triggers"]]
    made = yaml.safe_load(ADAPTER.read_text())["rules"]
    queries += [rule["seriesQuery"] for group in ("custom", "external") for rule in made[group]]
    asked = {name for query in queries for name in re.findall(r"[\w:]+(?=\{)", query)}
    page = (ROOT / "tests" / "fixtures" / "metrics" / "vllm-0.32.0-metrics-loaded.txt").read_text()
    there = set(re.findall(r"^(vllm:\w+)\{", page, re.M)) | set(re.findall(r"`(xgen_\w+)`", METRICS.read_text()))
    assert asked - there == {"DCGM_FI_PROF_PIPE_TENSOR_ACTIVE"}
    assert "vllm:num_requests_waiting" in asked


def test_scaling_starts_before_the_slots_are_full() -> None:
    slots = int(settings_of("gpu")["XGEN_BACKENDS__VLLM__SLOTS"])
    [running] = [each["pods"] for each in vllm_scaler() if "requests_running" in str(each)]
    [scaled] = kinds("gpu-keda", "ScaledObject")
    [trigger] = [each["metadata"] for each in scaled["spec"]["triggers"] if "requests_running" in str(each)]
    assert running["target"]["averageValue"] == trigger["threshold"] == str(round(0.8 * slots))


def test_secrets_are_read_from_a_kubernetes_mount(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """A mount has links into a folder that is replaced atomically."""
    assert settings_of("gpu")["XGEN_SECRETS_DIR"]
    kept = tmp_path / "..2026_01_01"
    kept.mkdir()
    (kept / "xgen_api_keys").write_text("ab" * 32)
    (kept / "xgen_backends__vllm__api_key").write_text("secret")
    (tmp_path / "..data").symlink_to(kept.name)
    for path in kept.iterdir():
        (tmp_path / path.name).symlink_to(f"..data/{path.name}")
    for name, value in settings_of("gpu").items():
        monkeypatch.setenv(name, value)
    monkeypatch.setenv("XGEN_SECRETS_DIR", str(tmp_path))
    settings = ConfigSources().load()
    assert settings.api_keys == ["ab" * 32]
    key = settings.backends["vllm"].api_key
    assert key is not None
    assert key.get_secret_value() == "secret"


def test_prometheus_rules_are_those_of_the_compose_stack() -> None:
    made = runpy.run_path(str(DEPLOYED / "rules.py"))
    assert made["TARGET"].read_text() == made["rendered"](), "run python deploy/kubernetes/rules.py"
