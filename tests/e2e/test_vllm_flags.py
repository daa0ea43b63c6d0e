"""The flags that compose.yaml and the Kubernetes manifests give to vLLM, read by the real vLLM's own parser."""

from __future__ import annotations

import json
import re
import subprocess
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import pytest
import yaml

from tests.repo.test_kubernetes import kinds
from tests.support import compose_stack

PARSE = """
import json, sys
from vllm.entrypoints.launchers.cli_args import make_arg_parser, validate_parsed_serve_args
from vllm.utils.argparse_utils import FlexibleArgumentParser
found = make_arg_parser(FlexibleArgumentParser()).parse_args(sys.argv[1:])
validate_parsed_serve_args(found)
print(json.dumps({name: getattr(found, name) for name in __NAMES__}))
"""

# Variable: a value, and the argument it becomes.
SETTINGS = {
    "VLLM_TENSOR_PARALLEL_SIZE": ("2", "tensor_parallel_size", 2),
    "VLLM_GPU_MEMORY_UTILIZATION": ("0.8", "gpu_memory_utilization", 0.8),
    "VLLM_MAX_MODEL_LEN": ("4096", "max_model_len", 4096),
    "VLLM_MAX_NUM_SEQS": ("64", "max_num_seqs", 64),
    "VLLM_MAX_NUM_BATCHED_TOKENS": ("4096", "max_num_batched_tokens", 4096),
    "VLLM_BLOCK_SIZE": ("32", "block_size", 32),
    "VLLM_KV_CACHE_DTYPE": ("fp8", "kv_cache_dtype", "fp8"),
    "VLLM_KV_OFFLOADING_SIZE": ("4", "kv_offloading_size", 4.0),
    "VLLM_CPU_OFFLOAD_GB": ("1", "cpu_offload_gb", 1.0),
    "VLLM_TOOL_CALL_PARSER": ("llama3_json", "tool_call_parser", "llama3_json"),
}
GIVEN = {name: value for name, (value, _, _) in SETTINGS.items()}
LEFT_OUT = ("block_size", "kv_offloading_size")  # while their variables are empty


@pytest.fixture(scope="module")
def python(vllm_program: str) -> str:
    return str(Path(vllm_program).with_name("python"))


def parsed(python: str, command: list[str], variables: Mapping[str, str], folder: Path) -> dict[str, Any]:
    """What vLLM understands. `command` runs in a shell as in a container, where `vllm` prints its arguments."""
    program = folder / "vllm"
    program.write_text('#!/bin/sh\nprintf "%s\\n" "$@"\n')
    program.chmod(0o755)
    environ = {"PATH": f"{folder}:/usr/bin:/bin", **variables}
    done = subprocess.run(command, env=environ, capture_output=True, text=True, check=True)
    word, *flags = done.stdout.splitlines()
    assert word == "serve"
    script = PARSE.replace("__NAMES__", repr([name for _, name, _ in SETTINGS.values()]))
    done = subprocess.run([python, "-c", script, *flags], capture_output=True, text=True, timeout=280, check=False)
    assert done.returncode == 0, done.stderr[-2000:]
    found: dict[str, Any] = json.loads(done.stdout.splitlines()[-1])
    return found


def of_compose(variables: Mapping[str, str]) -> list[str]:
    """As Compose interpolates it: https://docs.docker.com/reference/compose-file/interpolation"""

    def value(match: re.Match[str]) -> str:
        name, kind, text = match.groups()
        if kind == "-":
            return variables.get(name) or text
        return text.replace(f"${name}", variables[name]) if variables.get(name) else ""

    service = yaml.safe_load(compose_stack.COMPOSE.read_text())["services"]["vllm"]
    words = [re.sub(r"\$\{(\w+):([-+])([^}]*)\}", value, each) for each in service["entrypoint"] + service["command"]]
    return [word.replace("$$", "$") for word in words]


def of_kubernetes(overlay: str, kind: str, variables: Mapping[str, str]) -> tuple[list[str], dict[str, str]]:
    """The container's command with its variables, and its environment."""
    config = {key: value for each in kinds(overlay, "ConfigMap") for key, value in each["data"].items()}
    environ = {**config, "LWS_GROUP_SIZE": "2", "LWS_WORKER_INDEX": "0", "LWS_LEADER_ADDRESS": "a", **variables}
    [workload] = [each for each in kinds(overlay, kind) if "vllm" in each["metadata"]["name"]]
    spec = workload["spec"]
    template = spec["template"] if kind == "StatefulSet" else spec["leaderWorkerTemplate"]["leaderTemplate"]
    [container] = template["spec"]["containers"]
    words = container.get("command", ["vllm", "serve"]) + container["args"]
    return [re.sub(r"\$\((\w+)\)", lambda match: environ[match[1]], word) for word in words], environ


@pytest.mark.parametrize("given", [{}, GIVEN], ids=["none", "all"])
@pytest.mark.parametrize("where", ["compose", "kubernetes"])
def test_vllm_takes_every_setting(python: str, where: str, given: dict[str, str], tmp_path: Path) -> None:
    command, environ = (of_compose(given), {}) if where == "compose" else of_kubernetes("gpu", "StatefulSet", given)
    found = parsed(python, command, environ, tmp_path)
    if given:
        assert found == {name: value for _, name, value in SETTINGS.values()}
    else:
        assert {name for name, value in found.items() if value is None} == set(LEFT_OUT)


def test_vllm_takes_the_flags_of_a_group_of_machines(python: str, tmp_path: Path) -> None:
    command, environ = of_kubernetes("multi-node", "LeaderWorkerSet", {})
    assert parsed(python, command, environ, tmp_path)["tensor_parallel_size"] == 8
    command, environ = of_kubernetes("multi-node", "LeaderWorkerSet", GIVEN)
    assert parsed(python, command, environ, tmp_path) == {name: value for _, name, value in SETTINGS.values()}
