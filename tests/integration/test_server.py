"""The server process: its port, its signals and its exit. Signals and logging need a process of its own."""

from __future__ import annotations

import errno
import os
import signal
import socket
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any
from unittest.mock import Mock

import httpx
import pytest

from tests.conftest import LOOPBACK
from tests.support.documents import ROOT
from tests.support.fake_upstream import FakeUpstream, good
from tests.support.running_proxy import CHAT, get, post
from tests.support.server_process import Process, Streaming
from tests.support.waiting import wait_until
from xgen_proxy import cli, server
from xgen_proxy.config.loading import ConfigSources
from xgen_proxy.config.settings import Settings
from xgen_proxy.server import PortInUseError, listen

Serve = Callable[..., Process]


@pytest.fixture
def serve(tmp_path: Path) -> Iterator[Serve]:
    started: list[Process] = []

    def serve(*arguments: str, **environment: str) -> Process:
        process = Process(tmp_path, *arguments, **environment)
        started.append(process)
        return process

    yield serve
    for process in started:
        process.close()


def test_port_in_use() -> None:
    with socket.create_server(("127.0.0.1", 0)) as sock:
        port = sock.getsockname()[1]
        with pytest.raises(PortInUseError) as error:
            listen("127.0.0.1", port)
    assert str(error.value) == f"port {port} is taken by process {os.getpid()}; end that, or choose another with --port"


def test_port_in_use_by_an_unknown_process(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("xgen_proxy.server.listener", lambda port: None)
    with socket.create_server(("127.0.0.1", 0)) as sock, pytest.raises(PortInUseError, match=r"\d+ is taken; end that"):
        listen("127.0.0.1", sock.getsockname()[1])


def test_forbidden_port(monkeypatch: pytest.MonkeyPatch) -> None:
    def forbidden(*_: object) -> None:
        raise PermissionError(errno.EACCES, "Permission denied")

    monkeypatch.setattr("xgen_proxy.server.socket.socket.bind", forbidden)
    with pytest.raises(PortInUseError, match=r"cannot listen on 127\.0\.0\.1:80: Permission denied; choose another"):
        listen("127.0.0.1", 80)


@pytest.mark.parametrize("host", ["no-such-host.invalid", "192.0.2.1"])
def test_address_of_another_host(host: str) -> None:
    with pytest.raises(PortInUseError, match="cannot listen on"):
        listen(host, 0)


@pytest.mark.parametrize("host", LOOPBACK)
def test_free_port(host: str) -> None:
    with listen(host, 0) as sock:
        socket.create_connection((host, sock.getsockname()[1])).close()


def test_second_proxy_on_the_same_port(serve: Serve, gpu: FakeUpstream, tmp_path: Path) -> None:
    first = serve("--vllm", gpu.url)
    second = subprocess.run(
        [sys.executable, "-m", "xgen_proxy.cli", "serve", "--port", str(first.port), "--vllm", gpu.url],
        cwd=tmp_path, env={**os.environ, "PYTHONPATH": str(ROOT / "proxy")}, capture_output=True, text=True, timeout=60,
    )  # fmt: skip
    assert second.returncode == 2
    assert f"is taken by process {first.child.pid}" in second.stderr
    assert "Traceback" not in second.stderr


@pytest.mark.parametrize(
    ("name", "url"), [(("127.0.0.1", 81), "http://127.0.0.1:81"), (("::1", 81, 0, 0), "http://[::1]:81")]
)
def test_announced_url(monkeypatch: pytest.MonkeyPatch, name: tuple[Any, ...], url: str) -> None:
    """The URL can be pasted into a client. The socket is a mock, since the machine may have no IPv6."""
    listening = Mock(**{"getsockname.return_value": name})
    monkeypatch.setattr(server, "listen", lambda host, port: listening)
    monkeypatch.setattr(server, "set_up_logging", lambda log_format: None)
    monkeypatch.setattr(server.Server, "run", lambda self, sockets: None)
    monkeypatch.setattr(server, "freeze_loaded_objects", lambda: None)
    announced: list[str] = []
    sources = Mock(spec=ConfigSources, **{"load.return_value": Settings(), "files.return_value": []})
    server.serve(sources, announced.append)
    assert announced == [url]


# exit


def test_idle_server_exits_at_once_with_0(serve: Serve, gpu: FakeUpstream) -> None:
    for number in (signal.SIGTERM, signal.SIGINT):
        process = serve("--vllm", gpu.url)
        process.until_ready()
        process.signal(number)
        assert process.child.wait(20) == 0
        assert "Traceback" not in process.log.read_text()


def test_live_stream_finishes_while_new_requests_are_refused(serve: Serve, gpu: FakeUpstream) -> None:
    process = serve("--vllm", gpu.url)
    process.until_ready()
    streaming = Streaming(gpu)
    streaming.start(process.url)
    process.signal(signal.SIGTERM)
    wait_until(lambda: process.asked("/ready") != 200)
    wait_until(lambda: process.asked("/health") is None)
    assert process.child.poll() is None
    streaming.release.set()
    assert process.child.wait(20) == 0
    streaming.thread.join(20)
    assert streaming.error is None
    assert streaming.text.endswith("data: [DONE]\n\n")
    assert streaming.text.count('"finish_reason":"stop"') == 1


def test_ready_fails_before_the_drain(serve: Serve, gpu: FakeUpstream) -> None:
    """On an existing connection /ready gives 503, or the connection is closed; never 200 again."""
    process = serve("--vllm", gpu.url)
    process.until_ready()
    streaming = Streaming(gpu)
    streaming.start(process.url)
    answers: list[int] = []
    with httpx.Client(base_url=process.url, verify=False) as client:
        assert client.get("/ready").status_code == 200
        process.signal(signal.SIGTERM)
        wait_until(lambda: _ended(client, answers), seconds=20)
    first_bad = next((index for index, status in enumerate(answers) if status == 503), len(answers))
    assert set(answers[first_bad:]) <= {503}
    streaming.release.set()
    assert process.child.wait(20) == 0
    streaming.thread.join(20)


def _ended(client: httpx.Client, answers: list[int]) -> bool:
    try:
        answers.append(client.get("/ready").status_code)
    except httpx.TransportError:
        return True
    return False


def test_streams_are_cut_after_the_drain_time(serve: Serve, gpu: FakeUpstream) -> None:
    process = serve("--vllm", gpu.url, XGEN_DRAIN_S="0.1")
    process.until_ready()
    streaming = Streaming(gpu)
    streaming.start(process.url)
    process.signal(signal.SIGTERM)
    assert process.child.wait(20) == 0
    streaming.thread.join(20)
    assert "[DONE]" not in streaming.text
    assert streaming.left.wait(20), "the request to the backend was not cancelled"


@pytest.mark.parametrize("second", [signal.SIGTERM, signal.SIGINT])
def test_second_signal_exits_at_once(serve: Serve, gpu: FakeUpstream, second: int) -> None:
    process = serve("--vllm", gpu.url, XGEN_DRAIN_S="3600")
    process.until_ready()
    streaming = Streaming(gpu)
    streaming.start(process.url)
    process.signal(signal.SIGTERM)
    wait_until(lambda: process.asked("/health") is None)
    assert process.child.poll() is None
    began = time.monotonic()
    process.signal(second)
    process.child.wait(20)
    assert time.monotonic() - began < 15
    streaming.thread.join(20)
    assert streaming.left.wait(20), "the request to the backend was not cancelled"


# one process


def test_there_is_one_process_regardless_of_the_environment(serve: Serve, gpu: FakeUpstream) -> None:
    process = serve("--vllm", gpu.url, WEB_CONCURRENCY="4", UVICORN_WORKERS="4")
    process.until_ready()
    threads = Path(f"/proc/{process.child.pid}/task").glob("*/children")
    assert [children for thread in threads if (children := thread.read_text())] == []
    with pytest.raises(SystemExit):
        cli.parser().parse_args(["serve", "--workers", "4"])


# log and headers


def test_json_log_without_prompts(serve: Serve, gpu: FakeUpstream) -> None:
    process = serve("--vllm", gpu.url)
    process.until_ready()
    gpu.default = good
    secret = "the-secret-of-this-prompt"
    body = {**CHAT, "messages": [{"role": "user", "content": secret}]}
    headers = {"x-request-id": "find-me"}
    assert post(f"{process.url}/v1/chat/completions", json=body, headers=headers).status_code == 200
    assert post(f"{process.url}/v1/chat/completions", content=b'{"prompt": "' + secret.encode()).status_code == 400
    wait_until(lambda: "find-me" in process.log.read_text())
    process.signal(signal.SIGTERM)
    assert process.child.wait(20) == 0
    lines = process.lines()
    assert secret not in process.log.read_text()
    [request] = [line for line in lines if line.get("request_id") == "find-me"]
    assert (request["status"], request["level"]) == (200, "info")
    assert any("is up" in line["message"] for line in lines)
    assert not [line for line in lines if line["logger"].startswith(("httpx", "httpcore"))]


def test_plain_log(serve: Serve, gpu: FakeUpstream) -> None:
    process = serve("--vllm", gpu.url, XGEN_LOG_FORMAT="plain")
    process.until_ready()
    wait_until(lambda: "is up" in process.log.read_text())
    assert not process.log.read_text().startswith("{")


def test_no_server_header(serve: Serve, gpu: FakeUpstream) -> None:
    process = serve("--vllm", gpu.url)
    answer = get(f"{process.url}/health")
    assert "server" not in answer.headers
    assert "date" in answer.headers
