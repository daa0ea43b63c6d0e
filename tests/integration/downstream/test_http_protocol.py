"""What comes in on a client's connection before it is a request."""

from __future__ import annotations

import contextlib
import json
import socket
import threading
from collections.abc import Iterator
from http.client import HTTPResponse

import pytest

from tests.support.fake_upstream import FakeUpstream, Talk, delta
from tests.support.running_proxy import CHAT, RunningProxy, assert_nothing_held, backend, chat, wait_until
from xgen_proxy.config.settings import Settings
from xgen_proxy.downstream import http_protocol

BODY = json.dumps(CHAT).encode()
POST = b"POST /v1/chat/completions HTTP/1.1\r\nhost: x\r\ncontent-type: application/json\r\n"
GET = b"GET /health HTTP/1.1\r\nhost: x\r\n\r\n"


@pytest.fixture(scope="module")
def fake() -> Iterator[FakeUpstream]:
    fake = FakeUpstream()
    yield fake
    fake.close()


@pytest.fixture(scope="module")
def door(fake: FakeUpstream) -> Iterator[RunningProxy]:
    proxy = RunningProxy(Settings(backends={"vllm": backend(fake)}, scrape_interval_s=0.05))
    proxy.until_up(1)
    yield proxy
    proxy.stop()
    assert_nothing_held(proxy)


@pytest.fixture
def client(door: RunningProxy) -> Iterator[socket.socket]:
    with socket.create_connection(("127.0.0.1", door.port), timeout=20) as client:
        yield client


def status_of(client: socket.socket) -> int:
    """Of one whole answer, whose head and body may come apart."""
    answer = HTTPResponse(client)
    answer.begin()
    answer.read()
    return answer.status


def all_of(client: socket.socket) -> bytes:
    """Until the proxy closes the connection."""
    data = b""
    try:
        while part := client.recv(65536):
            data += part
    except ConnectionResetError:  # it closed with bytes of ours unread
        pass
    return data


def error_of(data: bytes) -> tuple[int, dict[str, object]]:
    head, _, body = data.partition(b"\r\n\r\n")
    assert b"\r\nconnection: close" in head
    error: dict[str, object] = json.loads(body)["error"]
    return int(head.split()[1]), error


# a head without end


@pytest.mark.parametrize("path", [b"x: " + b"a" * 500_000, b"x: 1\r\n" * 50_000], ids=["one header", "many headers"])
def test_a_head_that_is_too_large(door: RunningProxy, client: socket.socket, path: bytes) -> None:
    with contextlib.suppress(OSError):  # refused before all of it was sent
        client.sendall(POST + path)
    data = all_of(client)
    if data:  # a reset can overtake it
        assert error_of(data)[0] == 431
    assert chat(door).status_code == 200


def test_what_is_too_large_is_told(client: socket.socket) -> None:
    client.sendall(POST + b"x: " + b"a" * http_protocol.HEAD_LIMIT)
    status, error = error_of(all_of(client))
    assert (status, error["code"]) == (431, "headers_too_large")
    assert str(http_protocol.HEAD_LIMIT) in str(error["message"])


def test_a_large_head_that_is_not_too_large(client: socket.socket) -> None:
    client.sendall(GET[:-2] + b"x: " + b"a" * (http_protocol.HEAD_LIMIT // 2))
    client.sendall(b"\r\n\r\n")
    assert status_of(client) == 200


def test_heads_of_one_connection_are_not_added_up(client: socket.socket) -> None:
    for _ in range(4):
        client.sendall(GET[:-2] + b"x: " + b"a" * (http_protocol.HEAD_LIMIT // 2))
        client.sendall(b"\r\n\r\n")
        assert status_of(client) == 200


# a head that does not come


@pytest.fixture
def impatient(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(http_protocol, "HEAD_S", 0.2)


@pytest.mark.usefixtures("impatient")
def test_who_says_nothing_is_told_nothing(door: RunningProxy) -> None:
    with socket.create_connection(("127.0.0.1", door.port), timeout=20) as client:
        assert all_of(client) == b""


@pytest.mark.usefixtures("impatient")
def test_a_head_that_does_not_end(door: RunningProxy) -> None:
    with socket.create_connection(("127.0.0.1", door.port), timeout=20) as client:
        client.sendall(POST)
        status, error = error_of(all_of(client))
    assert (status, error["code"]) == (408, "request_timeout")


@pytest.mark.usefixtures("impatient")
def test_the_head_of_a_later_request_that_does_not_end(door: RunningProxy) -> None:
    with socket.create_connection(("127.0.0.1", door.port), timeout=20) as client:
        client.sendall(GET)
        assert status_of(client) == 200
        client.sendall(GET[:20])
        assert error_of(all_of(client))[0] == 408


@pytest.mark.usefixtures("impatient")
def test_a_kept_connection_may_be_idle_for_longer(door: RunningProxy) -> None:
    with socket.create_connection(("127.0.0.1", door.port), timeout=0.6) as client:
        client.sendall(GET)
        assert status_of(client) == 200
        with pytest.raises(TimeoutError):
            client.recv(1)
        client.sendall(GET)
        assert status_of(client) == 200


def test_leaving_in_the_head(door: RunningProxy) -> None:
    wait_until(lambda: not door.server.server_state.connections)
    with socket.create_connection(("127.0.0.1", door.port)) as client:
        client.sendall(POST)
        wait_until(lambda: door.server.server_state.connections)
    wait_until(lambda: not door.server.server_state.connections)


# what is no HTTP


@pytest.mark.parametrize(
    "data", [b"hello\r\n\r\n", b"\x16\x03\x01\x02\x00\x01\x00\x01\xfc\x03\x03", POST + b"content-length: x\r\n\r\n"]
)
def test_what_is_no_http(client: socket.socket, data: bytes) -> None:
    client.sendall(data)
    status, error = error_of(all_of(client))
    assert (status, error["type"]) == (400, "invalid_request_error")


def test_what_is_no_http_behind_a_running_request(door: RunningProxy, fake: FakeUpstream) -> None:
    """Its answer is cut; nothing that looks like a part of it is put in."""
    go_on = threading.Event()

    async def streams(talk: Talk) -> None:
        await talk.start_stream()
        await talk.event(delta("hel"))
        await talk.until_client_leaves()
        go_on.set()

    fake.scripts.append(streams)
    body = json.dumps({**CHAT, "stream": True}).encode()
    with socket.create_connection(("127.0.0.1", door.port), timeout=20) as client:
        client.sendall(POST + b"content-length: %d\r\n\r\n" % len(body) + body)
        assert b"hel" in client.recv(65536)
        client.sendall(b"\x00\x01\r\n\r\n")
        assert b"HTTP/1.1" not in all_of(client)
    assert go_on.wait(10)


# Upgrade


@pytest.mark.parametrize("name", [b"Upgrade", b"upgrade"])
@pytest.mark.parametrize("apart", [False, True])
def test_a_client_that_would_rather_speak_http_2(
    door: RunningProxy, client: socket.socket, fake: FakeUpstream, name: bytes, apart: bool
) -> None:
    """As Java's client asks with each request. What looks like the header in the body is left alone."""
    fake.talks.clear()
    text = "a\r\nUpgrade: b"
    body = json.dumps({"messages": [{"role": "user", "content": text}]}).encode()
    head = POST + b"Connection: Upgrade, HTTP2-Settings\r\nHTTP2-Settings: AAEAAEAA\r\n" + name + b": h2c\r\n"
    head += b"content-length: %d\r\n\r\n" % len(body)
    for _ in range(2):
        if apart:
            client.sendall(head)
            wait_until(lambda: door.server.server_state.tasks)
            client.sendall(body)
        else:
            client.sendall(head + body)
        assert status_of(client) == 200
    assert [talk.json["messages"][0]["content"] for talk in fake.talks] == [text] * 2
