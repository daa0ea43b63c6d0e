"""compose.yaml and the Kubernetes manifests give vLLM the same. Whether it takes that: tests/e2e/test_vllm_flags.py."""

from __future__ import annotations

import re

import pytest
import yaml

from tests.repo.test_kubernetes import Json, kinds, pod_templates
from tests.support.compose_stack import COMPOSE, variables

SPARE_GIB = 4  # of shared memory, beside the KV cache that is offloaded to it
GROUP = {"--nnodes", "--node-rank", "--master-addr", "--distributed-executor-backend", "--pipeline-parallel-size"}


def flags(container: Json) -> set[str]:
    """The names of vLLM's flags, those included that are left out while their variables are empty."""
    return set(re.findall(r"--[a-z][a-z-]+", " ".join([*container["command"], *container.get("args", [])])))


@pytest.mark.parametrize(
    ("overlay", "own"),
    [("gpu", [set()]), ("gpu-keda", [set()]), ("multi-node", [GROUP, GROUP | {"--headless"}])],
)
def test_pods_give_vllm_the_flags_that_compose_gives(overlay: str, own: list[set[str]]) -> None:
    """`own`: those that only the pods have, of each template. A machine without a server has no port."""
    compose = flags(yaml.safe_load(COMPOSE.read_text())["services"]["vllm"])
    pods = [spec["containers"] for labels, spec in pod_templates(overlay) if labels["app.kubernetes.io/name"] == "vllm"]
    assert len(pods) == len(own)
    for [container], more in zip(pods, own, strict=True):
        less = {"--port", "--shutdown-timeout"} if "--headless" in more else set()
        assert flags(container) == compose - less | more


def test_compose_has_shared_memory_for_the_offloaded_cache() -> None:
    given = variables()
    shared = float(given["VLLM_SHM_SIZE"].removesuffix("g"))
    assert float(given["VLLM_KV_OFFLOADING_SIZE"] or 0) + SPARE_GIB <= shared


@pytest.mark.parametrize("overlay", ["gpu", "gpu-keda", "multi-node"])
def test_pods_have_shared_memory_for_the_offloaded_cache(overlay: str) -> None:
    [given] = [each["data"] for each in kinds(overlay, "ConfigMap") if each["metadata"]["name"].startswith("vllm")]
    volumes = [volume for _, spec in pod_templates(overlay) for volume in spec.get("volumes", [])]
    sizes = [each["emptyDir"]["sizeLimit"] for each in volumes if each["name"] == "shared-memory"]
    assert sizes
    for size in sizes:
        assert float(given["VLLM_KV_OFFLOADING_SIZE"] or 0) + SPARE_GIB <= float(size.removesuffix("Gi"))
