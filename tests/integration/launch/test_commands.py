"""`xgen-proxy launch` as its user runs it, against a running proxy."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest

from tests.support.command_line import status_of
from tests.support.fake_upstream import FakeUpstream
from tests.support.real_servers import free_port
from tests.support.running_proxy import RunningProxy, backend, running_proxy
from xgen_proxy.api.api_keys import hash_key
from xgen_proxy.launch.clients import CLIENTS

Launch = Callable[..., tuple[int, str, str]]


@pytest.fixture(scope="module")
def proxy(fakes: tuple[FakeUpstream, FakeUpstream]) -> Iterator[RunningProxy]:
    """The GPU's model can call tools; the CPU's, which is the default, cannot."""
    gpu, cpu = fakes
    backends = {
        "vllm": backend(gpu, models={"alpha": "m"}, context=40_960),
        "llama_cpp": backend(cpu, device_class="cpu", models={"beta": "m"}, tools=False),
    }
    with running_proxy(backends=backends, default_model="beta", api_keys=[hash_key("sk-1")]) as running:
        yield running


@pytest.fixture(autouse=True)
def directory(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("COLUMNS", "200")
    monkeypatch.delenv("XGEN_KEY", raising=False)
    return tmp_path


@pytest.fixture
def launch(capsys: pytest.CaptureFixture[str]) -> Launch:
    """launch(*arguments) → (exit status, standard output, standard error)"""

    def launch(*arguments: str) -> tuple[int, str, str]:
        return status_of("launch", *arguments), *capsys.readouterr()

    return launch


def start(*arguments: str, path: Path, **variables: str) -> subprocess.CompletedProcess[str]:
    """As a process of its own, which --run replaces."""
    environment = {**os.environ, "PATH": f"{path}:/usr/bin:/bin", **variables}
    command = [sys.executable, "-m", "xgen_proxy.cli", "launch", *arguments]
    return subprocess.run(command, env=environment, capture_output=True, text=True, timeout=60)


def stub(folder: Path, name: str) -> None:
    """A client that tells how it was started."""
    program = folder / name
    program.write_text(
        f"#!{sys.executable}\nimport json, os, sys\nprint(json.dumps([sys.argv[1:], dict(os.environ)]))\nsys.exit(7)\n"
    )
    program.chmod(0o755)


# the model


@pytest.mark.parametrize(
    ("client", "model"),
    [("claude", "alpha"), ("codex", "alpha"), ("opencode", "alpha"), ("openwebui", "beta"), ("python", "beta")],
)
def test_agents_get_a_model_with_tools_and_others_the_default(
    launch: Launch, proxy: RunningProxy, client: str, model: str
) -> None:
    status, out, err = launch(client, "--url", proxy.url, "--key", "sk-1")
    assert (status, err) == (0, "")
    assert model in out
    assert ({"alpha": "beta", "beta": "alpha"}[model] in out) == (client == "opencode"), "opencode lists all"


def test_context_of_the_model(launch: Launch, proxy: RunningProxy) -> None:
    _, out, _ = launch("codex", "--url", f"{proxy.url}/v1", "--key", "sk-1")
    assert "(40,960 tokens)" in out
    assert "model_context_window=40960" in out


def test_a_model_that_is_named(launch: Launch, proxy: RunningProxy) -> None:
    url = ("--url", proxy.url, "--key", "sk-1")
    assert "DEFAULT_MODELS=alpha" in launch("openwebui", *url, "--model", "alpha")[1]
    status, out, err = launch("claude", *url, "--model", "beta")
    assert (status, "MODEL=beta" in out) == (0, True)
    assert err.startswith("xgen-proxy: note: no backend that serves beta can call tools")
    status, out, err = launch("claude", *url, "--model", "claude-opus")
    assert (status, "MODEL=claude-opus" in out) == (0, True)
    assert "note: the proxy does not list the model claude-opus (it lists beta, alpha)" in err


def test_no_model_yet(launch: Launch, start: Callable[..., RunningProxy], gpu: FakeUpstream) -> None:
    gpu.kill()
    proxy = start(up=0, backends={"vllm": backend(gpu)})
    status, out, err = launch("claude", "--url", proxy.url)
    assert (status, out) == (1, "")
    assert err == (
        f"xgen-proxy: the proxy at {proxy.url} has no model that writes text now; `xgen-proxy status` says why,"
        " --model names one\n"
    )


def test_the_address_is_that_of_the_settings(
    launch: Launch, proxy: RunningProxy, directory: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    (directory / "xgen-proxy.toml").write_text(f"port = {proxy.port}\n")
    monkeypatch.setenv("XGEN_KEY", "sk-1")
    status, out, _ = launch("claude")
    assert status == 0
    assert f"export ANTHROPIC_BASE_URL={proxy.url}\n" in out
    assert "sk-1" not in out


# errors


def test_no_proxy(launch: Launch) -> None:
    url = f"http://127.0.0.1:{free_port()}"
    status, out, err = launch("claude", "--url", url)
    assert (status, out, err.count("\n")) == (1, "", 1)
    assert err.startswith(f"xgen-proxy: no proxy answers at {url} (")
    assert err.endswith("start one with `xgen-proxy serve`, or name the model with --model\n")
    status, out, err = launch("claude", "--url", url, "--model", "m")
    assert (status, "ANTHROPIC_DEFAULT_OPUS_MODEL=m" in out) == (0, True)
    assert err.startswith(f"xgen-proxy: note: no proxy answers at {url} (")


@pytest.mark.parametrize(
    ("key", "words"),
    [([], "it asks for an API key"), (["--key", "sk-2"], "the key is not one of its own")],
)
def test_wrong_key(launch: Launch, proxy: RunningProxy, key: list[str], words: str) -> None:
    status, out, err = launch("codex", "--url", proxy.url, *key)
    assert (status, out) == (1, "")
    assert err == f"xgen-proxy: the proxy at {proxy.url} refuses: {words}; pass --key or set XGEN_KEY\n"


def test_another_server(launch: Launch, gpu: FakeUpstream) -> None:
    gpu.health = 404
    status, out, err = launch("codex", "--url", gpu.url)
    assert (status, out) == (1, "")
    assert err == f"xgen-proxy: the server at {gpu.url} lists no models as a proxy does (status 404); correct --url\n"


@pytest.mark.parametrize(
    ("arguments", "words"),
    [
        ([], "usage: xgen-proxy launch"),
        (["emacs"], "invalid choice: 'emacs'"),
        (["claude", "--run", "--config"], "not allowed with argument"),
        (
            ["claude", "--url", "box:8080"],
            "xgen-proxy: --url 'box:8080' is not the address of a proxy; write http://HOST",
        ),
        (["claude", "--key", "a\nb"], "xgen-proxy: a key or a model name has characters that cannot be shown"),
        (["claude", "--", "-p", "hi"], "xgen-proxy: '-p hi' is for the client, which only --run starts"),
    ],
)
def test_wrong_arguments(launch: Launch, arguments: list[str], words: str) -> None:
    status, out, err = launch(*arguments)
    assert (status, out) == (2, "")
    assert words in err


@pytest.mark.parametrize("client", ["", *CLIENTS])
def test_help(launch: Launch, client: str) -> None:
    status, out, _ = launch(*client.split(), "--help")
    assert status == 0
    assert (CLIENTS[client].install if client else "examples:") in out


# --config and --run


@pytest.mark.parametrize("client", CLIENTS)
def test_only_the_configuration(launch: Launch, proxy: RunningProxy, client: str) -> None:
    status, out, err = launch(client, "--url", proxy.url, "--key", "sk-1", "--config")
    assert (status, err) == (0, "")
    assert proxy.url in out
    assert "export " not in out
    if client in ("claude", "opencode"):
        json.loads(out)


KEYS = {
    "claude": "ANTHROPIC_AUTH_TOKEN",
    "codex": "XGEN_KEY",
    "opencode": "XGEN_KEY",
    "openwebui": "OPENAI_API_KEY",
}  # where each looks for its key


@pytest.mark.parametrize("client", [name for name in CLIENTS if name != "python"])
def test_run(proxy: RunningProxy, directory: Path, client: str) -> None:
    """The client takes the place of the command: its output, its exit status and its arguments."""
    name = {"openwebui": "open-webui"}.get(client, client)
    stub(directory, name)
    done = start(client, "--url", proxy.url, "--key", "sk-1", "--run", "--", "-p", "two words", path=directory)
    assert done.returncode == 7, done.stderr
    arguments, environment = json.loads(done.stdout)
    assert arguments[-2:] == ["-p", "two words"]
    assert {name for name, value in environment.items() if value == "sk-1"} == {KEYS[client]}
    shown = json.dumps([arguments, environment])
    assert proxy.url in shown
    assert done.stderr.endswith(f" at {proxy.url}\n")


@pytest.mark.parametrize("client", ["claude", "openwebui"])
def test_run_with_the_key_of_the_shell(proxy: RunningProxy, directory: Path, client: str) -> None:
    """The others read it from XGEN_KEY themselves."""
    stub(directory, {"openwebui": "open-webui"}.get(client, client))
    done = start(client, "--url", proxy.url, "--run", path=directory, XGEN_KEY="sk-1")
    assert done.returncode == 7, done.stderr
    assert json.loads(done.stdout)[1][KEYS[client]] == "sk-1"


@pytest.mark.parametrize("client", ["claude", "codex", "opencode", "openwebui"])
def test_run_without_the_program(proxy: RunningProxy, directory: Path, client: str) -> None:
    done = start(client, "--url", proxy.url, "--key", "sk-1", "--run", path=directory)
    assert (done.returncode, done.stdout) == (1, "")
    title, install = CLIENTS[client].title, CLIENTS[client].install
    assert done.stderr == f"xgen-proxy: {title} is not installed here; install it with: {install}\n"


def test_the_python_script_runs_as_it_is(launch: Launch, proxy: RunningProxy, directory: Path) -> None:
    _, script, _ = launch("python", "--url", proxy.url, "--key", "sk-1")
    (directory / "ask.py").write_text(script)
    assert subprocess.check_output([sys.executable, "ask.py"], text=True) == "hello\n"
    done = start("python", "--url", proxy.url, "--run", path=directory, XGEN_KEY="sk-1")
    assert (done.returncode, done.stdout) == (0, "hello\n"), done.stderr
