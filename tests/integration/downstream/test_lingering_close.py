"""A client that is still sending reads why it was refused."""

from __future__ import annotations

import contextlib
import json
import socket
import time
from collections.abc import Iterator

import httpx
import openai
import pytest

from tests.support.fake_upstream import FakeUpstream
from tests.support.running_proxy import RunningProxy, backend, chat, running_proxy, wait_until
from xgen_proxy.downstream import lingering_close

SIZE = 11 * 2**20  # the limit is 10 MiB
BODY = json.dumps({"messages": [{"role": "user", "content": "x" * SIZE}]}).encode()


@pytest.fixture(scope="module")
def proxy() -> Iterator[RunningProxy]:
    fake = FakeUpstream()
    with running_proxy(backends={"vllm": backend(fake)}, limits={"body_timeout_s": 20}) as running:
        yield running
    fake.close()


@pytest.fixture
def client(proxy: RunningProxy) -> Iterator[socket.socket]:
    with socket.create_connection(("127.0.0.1", proxy.port), timeout=20) as client:
        yield client


def pieces() -> Iterator[bytes]:
    for start in range(0, len(BODY), 65536):
        yield BODY[start : start + 65536]


@pytest.mark.parametrize("chunked", [False, True])
def test_httpx_reads_the_413(proxy: RunningProxy, chunked: bool) -> None:
    with httpx.Client(verify=False, timeout=20) as client:
        for _ in range(20):
            content = pieces() if chunked else BODY
            headers = {"content-type": "application/json"}
            answer = client.post(f"{proxy.url}/v1/chat/completions", content=content, headers=headers)
            assert (answer.status_code, answer.headers["x-should-retry"]) == (413, "false")
            assert answer.json()["error"]["code"] == "request_too_large"


def test_the_openai_sdk_sends_it_once(proxy: RunningProxy) -> None:
    refused = ("chat", "request_too_large")
    before = proxy.gateway.metrics.refusals.values.get(refused, 0)
    with openai.OpenAI(base_url=f"{proxy.url}/v1", api_key="x", max_retries=2) as client:
        for _ in range(5):
            with pytest.raises(openai.APIStatusError) as refusal:
                client.chat.completions.create(model="m", messages=[{"role": "user", "content": "x" * SIZE}])
            assert refusal.value.status_code == 413
    assert proxy.gateway.metrics.refusals.values[refused] == before + 5


def read_status(client: socket.socket) -> int:
    data = b""
    while part := client.recv(65536):
        data += part
    assert data.count(b"HTTP/1.1 4") == 1
    return int(data.split()[1])


def test_a_431_can_be_read(proxy: RunningProxy) -> None:
    """All of it is sent before anything is read."""
    for _ in range(20):
        with socket.create_connection(("127.0.0.1", proxy.port), timeout=20) as client:
            for _ in range(40):
                client.sendall(b"GET / HTTP/1.1\r\nx: " + b"a" * 50_000)
            assert read_status(client) == 431


def test_a_400_can_be_read(proxy: RunningProxy) -> None:
    for _ in range(20):
        with socket.create_connection(("127.0.0.1", proxy.port), timeout=20) as client:
            for _ in range(40):
                client.sendall(b"this is not HTTP" * 4000)
            assert read_status(client) == 400


def test_a_408_can_be_read(proxy: RunningProxy, monkeypatch: pytest.MonkeyPatch) -> None:
    """The client goes on sending, slowly, after the time is up."""
    monkeypatch.setattr(proxy.gateway.settings.limits, "body_timeout_s", 0.2)
    with socket.create_connection(("127.0.0.1", proxy.port), timeout=20) as client:
        client.sendall(b"POST /v1/chat/completions HTTP/1.1\r\nhost: x\r\ncontent-length: 100\r\n\r\n")
        for _ in range(40):
            client.sendall(b" ")
            time.sleep(0.01)
        assert read_status(client) == 408


def begin_too_large(client: socket.socket) -> None:
    head = f"POST /v1/chat/completions HTTP/1.1\r\nhost: x\r\ncontent-length: {10**9}\r\n\r\n"
    client.sendall(head.encode())


def test_the_bytes_are_bounded(proxy: RunningProxy, client: socket.socket, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(lingering_close, "MAX_BYTES", 1_000_000)
    begin_too_large(client)
    sent = 0
    with contextlib.suppress(ConnectionError):
        while sent < 10**9:
            sent += client.send(b"x" * 65536)
    assert sent < 10**8


def test_a_silent_client_is_not_waited_for(
    proxy: RunningProxy, client: socket.socket, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(lingering_close, "QUIET_S", 0.1)
    begin_too_large(client)
    assert read_status(client) == 413
    wait_until(lambda: not proxy.server.server_state.connections)


def test_the_time_is_bounded(proxy: RunningProxy, client: socket.socket, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(lingering_close, "QUIET_S", 0.1)
    monkeypatch.setattr(lingering_close, "LONGEST_S", 0.5)
    begin_too_large(client)
    began = time.monotonic()
    with contextlib.suppress(ConnectionError):
        while time.monotonic() - began < 20:
            client.sendall(b"x")
            time.sleep(0.01)
    assert time.monotonic() - began < 15


def test_the_proxy_works_on(proxy: RunningProxy) -> None:
    assert chat(proxy).status_code == 200
    assert chat(proxy, stream=True).status_code == 200
