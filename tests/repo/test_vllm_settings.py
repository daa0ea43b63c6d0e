"""compose.yaml and the Kubernetes manifests give vLLM the same. Whether it takes that: tests/e2e/test_vllm_flags.py."""

from __future__ import annotations

import pytest

from tests.repo.test_kubernetes import kinds, pod_templates
from tests.support.compose_stack import variables

SPARE_GIB = 4  # of shared memory, beside the KV cache that is offloaded to it


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
