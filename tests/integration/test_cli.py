"""Each command as its user sees it: its output, its errors and its exit status."""

from __future__ import annotations

import io
import json
import runpy
import socket
import subprocess
import sys
from collections.abc import Callable, Iterator
from dataclasses import asdict
from pathlib import Path
from typing import Any

import pytest

from tests.support.command_line import status_of
from tests.support.fake_upstream import FakeUpstream, Talk
from tests.support.running_proxy import CHAT, RunningProxy, backend, running_proxy
from tests.support.waiting import wait_until
from xgen_proxy import __version__, cli
from xgen_proxy.api import ops
from xgen_proxy.api.api_keys import hash_key
from xgen_proxy.config.loading import ConfigSources
from xgen_proxy.config.settings import Settings
from xgen_proxy.dialects.backend_request import ModelFacts

Cli = Callable[..., tuple[int, str, str]]


@pytest.fixture(scope="module")
def proxy(fakes: tuple[FakeUpstream, FakeUpstream]) -> Iterator[RunningProxy]:
    gpu, cpu = fakes
    backends = {"vllm": backend(gpu), "llama_cpp": backend(cpu, device_class="cpu", tools=False)}
    with running_proxy(backends=backends) as running:
        yield running


@pytest.fixture(autouse=True)
def directory(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("COLUMNS", "200")
    return tmp_path


@pytest.fixture
def run(capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch) -> Cli:
    """run(*arguments, stdin=b"") → (exit status, standard output, standard error)"""

    def run(*arguments: str, stdin: bytes = b"") -> tuple[int, str, str]:
        monkeypatch.setattr(sys, "stdin", io.TextIOWrapper(io.BytesIO(stdin)))
        return status_of(*arguments), *capsys.readouterr()

    return run


def table(out: str) -> list[list[str]]:
    return [line.split() for line in out.splitlines()]


# help


@pytest.mark.parametrize("command", ["serve", "check", "route", "status", "key", "cost", "launch"])
def test_help_of_a_command_has_examples(run: Cli, command: str) -> None:
    status, out, _ = run(command, "--help")
    assert status == 0
    assert "examples:" in out
    assert f"xgen-proxy {command}" in out
    assert out.splitlines()[2].endswith(".")


def test_help_lists_every_command(run: Cli) -> None:
    status, out, _ = run("--help")
    assert status == 0
    for command in ("serve", "check", "route", "status", "key", "cost", "launch"):
        assert f"\n    {command} " in out
    assert run("--version")[1] == f"xgen-proxy {__version__}\n"


@pytest.mark.parametrize("arguments", [[], ["dance"], ["serve", "--port", "x"], ["serve", "--engine", "tgi"]])
def test_wrong_arguments(run: Cli, arguments: list[str]) -> None:
    status, out, err = run(*arguments)
    assert (status, out) == (2, "")
    assert "usage: xgen-proxy" in err


# check


def test_check_prints_every_setting_with_its_source(run: Cli, monkeypatch: pytest.MonkeyPatch, directory: Path) -> None:
    monkeypatch.setenv("XGEN_ROUTING__LONG_PROMPT_WORDS", "200")
    monkeypatch.setenv("XGEN_BACKENDS__VLLM__API_KEY", "hush")
    (directory / ".env").write_text("XGEN_DRAIN_S=5\n")
    (directory / "xgen-proxy.toml").write_text("log_format = 'json'\n")
    status, out, err = run(
        "check", "--vllm", "http://a:1,http://b:1", "--llama-cpp", "http://c:1", "--engine", "llama-server",
        "--port", "81", "--host", "::1",
    )  # fmt: skip
    assert (status, err) == (0, "")
    rows = table(out)
    assert rows[0] == ["setting", "value", "from"]
    for row in (
        ["port", "81", "flag"],
        ["host", "::1", "flag"],
        ["backends.vllm.urls", "['http://a:1',", "'http://b:1']", "flag"],
        ["backends.llama_cpp.dialect", "llama-server", "flag"],
        ["backends.vllm.api_key", "********", "environment"],
        ["routing.long_prompt_words", "200", "environment"],
        ["drain_s", "5.0", ".env"],
        ["log_format", "json", "xgen-proxy.toml"],
        ["limits.queue", "512", "default"],
    ):
        assert row in rows
    assert "hush" not in out


def test_check_of_a_named_file(run: Cli, directory: Path) -> None:
    (directory / "mine.toml").write_text('port = 82\n[backends.vllm]\nurls = ["http://a:1"]\n')
    status, out, _ = run("check", "--config", "mine.toml")
    assert status == 0
    assert ["port", "82", "mine.toml"] in table(out)


def test_check_warns_of_an_alias_of_nothing(run: Cli, directory: Path) -> None:
    (directory / "xgen-proxy.toml").write_text(
        '[models.aliases]\n"claude-*" = "gone"\n[backends.vllm]\nurls = ["http://a:1"]\nmodels = {m = "m"}\n'
    )
    status, out, err = run("check")
    assert (status, err) == (
        0, "xgen-proxy: warning: models.aliases.claude-*: no backend serves 'gone'; there are m\n",
    )  # fmt: skip
    assert ["models.aliases.claude-*.model", "gone", "xgen-proxy.toml"] in table(out)


@pytest.mark.parametrize("command", ["check", "serve"])
@pytest.mark.parametrize(
    ("arguments", "words"),
    [
        ([], "no backend is configured: pass --vllm URL or --llama-cpp URL"),
        (["--vllm", "gpu-box"], "backends.vllm.urls: 'gpu-box' is not a backend URL; write http://HOST:PORT"),
        (["--vllm", "http://a:1", "--port", "99999"], "port: Input should be less than or equal to 65535"),
        (["--engine", "llama-server"], "backends.llama_cpp.urls: say where it is"),
        (["--vllm", "http://a:1", "--config", "no.toml"], "the configuration file no.toml does not exist"),
    ],
)
def test_invalid_settings_are_explained(run: Cli, command: str, arguments: list[str], words: str) -> None:
    status, out, err = run(command, *arguments)
    assert (status, out) == (2, "")
    assert err.startswith(f"xgen-proxy: {words}")


# serve


def test_serve_on_a_port_in_use_names_the_process(run: Cli, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("xgen_proxy.server.set_up_logging", lambda log_format: None)
    with socket.create_server(("127.0.0.1", 0)) as sock:
        port = sock.getsockname()[1]
        status, out, err = run("serve", "--vllm", "http://127.0.0.1:1", "--port", str(port))
    assert (status, out) == (2, "")
    assert f"xgen-proxy: port {port} is taken by process " in err
    assert "choose another with --port" in err


def test_serve_uses_its_flags(run: Cli, monkeypatch: pytest.MonkeyPatch, directory: Path) -> None:
    served: list[Settings] = []

    def serve(sources: ConfigSources, announce: Callable[[str], None]) -> None:
        served.append(sources.load())
        assert sources.files()[0] == Path("mine.toml")
        announce("http://127.0.0.1:1234")

    monkeypatch.setattr(cli, "serve", serve)
    (directory / "mine.toml").write_text("drain_s = 5\n")
    status, out, _ = run("serve", "--llama-cpp", "http://a:1", "--port", "0", "--config", "mine.toml")
    assert (status, out) == (0, "listening on http://127.0.0.1:1234\n")
    assert (served[0].port, served[0].drain_s) == (0, 5)
    assert served[0].backends["llama_cpp"].urls == ["http://a:1"]


def test_interrupted_command(run: Cli, monkeypatch: pytest.MonkeyPatch) -> None:
    def serve(*_: object, **__: object) -> None:
        raise KeyboardInterrupt

    monkeypatch.setattr(cli, "serve", serve)
    assert run("serve", "--llama-cpp", "http://a:1")[0] == 130


# route


def request(**fields: Any) -> bytes:
    return json.dumps({**CHAT, **fields}).encode()


def test_route_from_stdin(run: Cli, proxy: RunningProxy, fakes: tuple[FakeUpstream, FakeUpstream]) -> None:
    status, out, _ = run("route", "--url", proxy.url, stdin=request(urgency="high"))
    gpu, cpu = fakes
    assert status == 0
    assert table(out) == [
        ["try", "backend", "replica", "load", "reason"],
        ["1", "vllm", f"vllm@127.0.0.1:{gpu.port}", "0.00", "urgent:", "GPU", "load", "0.00", "<", "0.7"],
        ["2", "llama_cpp", f"llama_cpp@127.0.0.1:{cpu.port}", "0.00", "fallback:", "after", "vllm"],
    ]
    assert gpu.talks == []


def test_route_from_a_file(run: Cli, proxy: RunningProxy, directory: Path) -> None:
    (directory / "request.json").write_bytes(request(backend="llama_cpp"))
    status, out, _ = run("route", "request.json", "--url", proxy.url + "/")
    assert status == 0
    assert table(out)[1][1] == "llama_cpp"


def test_route_lists_backends_that_were_ruled_out(run: Cli, proxy: RunningProxy) -> None:
    body = request(tools=[{"type": "function", "function": {"name": "f"}}])
    status, out, _ = run("route", "-", "--url", proxy.url, stdin=body)
    assert status == 0
    assert "not llama_cpp: cannot do tools" in out


def test_route_of_a_request_that_no_backend_supports(run: Cli, proxy: RunningProxy) -> None:
    body = request(backend="llama_cpp", tools=[{"type": "function", "function": {"name": "f"}}])
    status, out, _ = run("route", "--url", proxy.url, stdin=body)
    assert status == 1
    assert out.startswith("refused: backend llama_cpp cannot do tools")
    assert "try" not in out.split()


@pytest.mark.parametrize(
    ("body", "words"),
    [(b"{", "not valid JSON"), (b"", "empty"), (request(model="none"), "'none' does not exist; known models: m")],
)
def test_route_of_an_invalid_request(run: Cli, proxy: RunningProxy, body: bytes, words: str) -> None:
    status, out, err = run("route", "--url", proxy.url, stdin=body)
    assert (status, out) == (2, "")
    assert words in err


def test_route_and_status_tell_of_aliases(run: Cli, start: Callable[..., RunningProxy], gpu: FakeUpstream) -> None:
    aliases = {"claude-*": {"model": "m", "route": "gpu"}, "old-*": "gone"}
    proxy = start(backends={"vllm": backend(gpu)}, models={"aliases": aliases})
    status, out, _ = run("route", "--url", proxy.url, stdin=request(model="claude-x"))
    assert status == 0
    assert out.startswith("alias: claude-x is m (models.aliases, claude-*)\ntry")
    assert run("status", "--url", proxy.url)[1].endswith("alias old-*: no backend serves gone\n")
    status, _, err = run("route", "--url", proxy.url, stdin=request(model="old-x"))
    assert status == 2
    assert "'gone', for which 'old-x' stands" in err


def test_route_of_a_missing_file(run: Cli, proxy: RunningProxy) -> None:
    assert run("route", "no.json", "--url", proxy.url)[::2] == (
        2, "xgen-proxy: cannot read no.json: No such file or directory\n",
    )  # fmt: skip


# status


def test_status(run: Cli, proxy: RunningProxy, fakes: tuple[FakeUpstream, FakeUpstream]) -> None:
    status, out, _ = run("status", "--url", proxy.url)
    assert status == 0
    header, cpu, gpu, waiting = table(out)
    assert header == ["replica", "device", "state", "busy", "load", "models", "context", "memory", "reason"]
    assert gpu[:7] == [f"vllm@127.0.0.1:{fakes[0].port}", "gpu", "up", "0/256", "0.00", "m", "2048"]
    assert gpu[8:] == ["MB", "healthy"]
    assert cpu[1] == "cpu"
    assert waiting == ["waiting", "for", "a", "slot:", "0"]


def test_details_of_the_fleet(
    run: Cli, start: Callable[..., RunningProxy], gpu: FakeUpstream, monkeypatch: pytest.MonkeyPatch
) -> None:
    class OneGpu:
        async def read(self) -> list[dict[str, Any]]:
            return [{"name": "NVIDIA H100", "used_bytes": 72_000_000_000, "total_bytes": None}]

    monkeypatch.setattr(ops, "GPUS", OneGpu())
    monkeypatch.setattr(
        ops, "model_status", lambda *_: asdict(ModelFacts(vocabulary=49_152, layers=30, bytes=96_576_768))
    )
    gpu.kv, gpu.preemptions = 0.25, 3
    proxy = start(backends={"vllm": backend(gpu)})
    name = f"vllm@127.0.0.1:{gpu.port}"
    assert len(table(run("status", "--url", proxy.url)[1])) == 3, "no details unless asked for"
    status, out, _ = run("status", "--details", "--url", proxy.url)
    assert status == 0
    assert table(out)[3:] == [
        [],
        ["KV", "cache", "in", "use", "blocks", "block", "tokens", "share", "hits", "preempted"],
        [name, "25%", "?", "?", "?", "?", "?", "3"],
        [],
        ["model", "vocabulary", "context", "layers", "width", "parameters", "size", "quantization"],
        [name, "49,152", "?", "30", "?", "?", "97", "MB", "?"],
        [],
        ["GPU", "used", "total"],
        ["NVIDIA", "H100", "72000", "MB", "?"],
    ]


def test_status_and_route_tell_which_memory_is_short(
    run: Cli, start: Callable[..., RunningProxy], gpu: FakeUpstream
) -> None:
    gpu.kv = 1.0
    proxy = start(backends={"vllm": backend(gpu)})
    wait_until(lambda: "healthy; closed, memory: KV cache 100% used" in run("status", "--url", proxy.url)[1])
    _, out, _ = run("route", "--url", proxy.url, stdin=request())
    assert "only: no CPU backend is up that can do it; memory: KV cache 100% used" in out


def test_status_of_a_backend_that_is_down(run: Cli, start: Callable[..., RunningProxy], gpu: FakeUpstream) -> None:
    gpu.kill()
    proxy = start(up=0, backends={"vllm": backend(gpu)})
    status, out, _ = run("status", "--url", proxy.url)
    assert status == 0
    assert "?" in table(out)[1]  # neither context nor memory is known


@pytest.mark.parametrize("command", ["status", "route"])
def test_no_server_at_the_url(run: Cli, command: str) -> None:
    with socket.create_server(("127.0.0.1", 0)) as sock:
        url = f"http://127.0.0.1:{sock.getsockname()[1]}"
    for wrong in (url, "no url", "http://"):
        status, out, err = run(command, "--url", wrong, stdin=b"{}")
        assert (status, out) == (2, "")
        assert f"no proxy answers at {wrong}" in err
        assert "start one with `xgen-proxy serve`" in err


@pytest.mark.parametrize("command", ["status", "route"])
@pytest.mark.parametrize("body", [b"<html>404</html>", {"detail": "Not Found"}, [1]])
def test_another_server_at_the_url(run: Cli, command: str, body: object) -> None:
    """Such as a backend, whose URL was given by mistake."""

    class Other(FakeUpstream):
        async def answer_check(self, talk: Talk) -> None:
            await talk.answer(404, body)

    async def nothing(talk: Talk) -> None:
        await talk.answer(404, body)

    other = Other(default=nothing)
    status, out, err = run(command, "--url", other.url, stdin=b"{}")
    other.close()
    assert (status, out) == (2, "")
    assert f"the server at {other.url} is not an xgen-proxy" in err


def test_key_works_with_its_hash(run: Cli, start: Callable[..., RunningProxy], gpu: FakeUpstream) -> None:
    status, out, _ = run("key")
    [[_, key], [_, hash]] = table(out)
    assert status == 0
    assert hash == hash_key(key)
    proxy = start(backends={"vllm": backend(gpu)}, api_keys=[hash])
    assert run("route", "--url", proxy.url, "--api-key", key, stdin=request())[0] == 0
    status, _, err = run("route", "--url", proxy.url, stdin=request())
    assert status == 2
    assert "send a valid API key" in err


def test_run_as_a_module(monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> None:
    monkeypatch.setattr(sys, "argv", ["xgen-proxy", "key"])
    monkeypatch.delitem(sys.modules, "xgen_proxy.cli")
    with pytest.raises(SystemExit) as end:
        runpy.run_module("xgen_proxy.cli", run_name="__main__")
    assert end.value.code == 0
    assert capsys.readouterr().out.startswith("key ")


def test_closed_output_pipe_causes_no_traceback() -> None:
    command = f"{sys.executable} -m xgen_proxy.cli check --vllm http://a:1 | head -n 1"
    root = str(Path(cli.__file__).parents[2])
    done = subprocess.run(["sh", "-c", command], capture_output=True, text=True, check=True, cwd=root)
    assert done.stdout.split() == ["setting", "value", "from"]
    assert done.stderr == ""
