"""Limits and fixes of the HTTP protocol, on real connections: what a client sends before it is a request."""

from __future__ import annotations

import asyncio
import contextlib
import json
import resource
import socket
import threading
from collections.abc import Iterator
from http.client import HTTPResponse

import pytest

from tests.support.fake_upstream import FakeUpstream, Talk, delta
from tests.support.running_proxy import (
    CHAT,
    RunningProxy,
    ask,
    backend,
    chat,
    running_proxy,
    wait_until,
)
from xgen_proxy.downstream import http_protocol

BODY = json.dumps(CHAT).encode()
POST = b"POST /v1/chat/completions HTTP/1.1\r\nhost: x\r\ncontent-type: application/json\r\n"
GET = b"GET /health HTTP/1.1\r\nhost: x\r\n\r\n"


@pytest.fixture(scope="module")
def proxy(fake: FakeUpstream) -> Iterator[RunningProxy]:
    with running_proxy(backends={"vllm": backend(fake)}) as running:
        yield running


@pytest.fixture
def client(proxy: RunningProxy) -> Iterator[socket.socket]:
    with socket.create_connection(("127.0.0.1", proxy.port), timeout=20) as client:
        yield client


def status_of(client: socket.socket) -> int:
    """Read one complete response, whose head and body may arrive separately."""
    response = HTTPResponse(client)
    response.begin()
    response.read()
    return response.status


def read_all(client: socket.socket) -> bytes:
    """All that arrives until the proxy closes the connection."""
    data = b""
    try:
        while part := client.recv(65536):
            data += part
    except ConnectionResetError:  # it closed before it had read everything
        pass
    return data


def error_of(data: bytes) -> tuple[int, dict[str, object]]:
    head, _, body = data.partition(b"\r\n\r\n")
    assert b"\r\nconnection: close" in head
    error: dict[str, object] = json.loads(body)["error"]
    return int(head.split()[1]), error


# the size of a head


@pytest.mark.parametrize("path", [b"x: " + b"a" * 500_000, b"x: 1\r\n" * 50_000], ids=["one header", "many headers"])
def test_oversized_head_does_not_block_others(proxy: RunningProxy, client: socket.socket, path: bytes) -> None:
    with contextlib.suppress(OSError):  # it is refused before all of it was sent
        client.sendall(POST + path)
    data = read_all(client)
    if data:  # a reset can overtake the response
        assert error_of(data)[0] == 431
    assert chat(proxy).status_code == 200


def test_oversized_head_is_refused(client: socket.socket) -> None:
    client.sendall(POST + b"x: " + b"a" * http_protocol.MAX_HEAD_BYTES)
    status, error = error_of(read_all(client))
    assert (status, error["code"]) == (431, "headers_too_large")
    assert str(http_protocol.MAX_HEAD_BYTES) in str(error["message"])


def test_head_below_the_limit(client: socket.socket) -> None:
    client.sendall(GET[:-2] + b"x: " + b"a" * (http_protocol.MAX_HEAD_BYTES // 2))
    client.sendall(b"\r\n\r\n")
    assert status_of(client) == 200


def test_heads_of_one_connection_are_limited_separately(client: socket.socket) -> None:
    for _ in range(4):
        client.sendall(GET[:-2] + b"x: " + b"a" * (http_protocol.MAX_HEAD_BYTES // 2))
        client.sendall(b"\r\n\r\n")
        assert status_of(client) == 200


# trailers and chunk extensions

CHUNKED = POST + b"transfer-encoding: chunked\r\n"
CHUNK = b"%x\r\n%b\r\n" % (len(BODY), BODY)


@pytest.mark.parametrize("apart", [False, True])
def test_trailers_are_dropped(proxy: RunningProxy, client: socket.socket, fake: FakeUpstream, apart: bool) -> None:
    fake.talks.clear()
    trailers = (
        b"x-request-id: from-a-trailer\r\ntraceparent: 00-1-2-01\r\nx-backend: none\r\nauthorization: Bearer x\r\n"
    )
    for _ in range(2):
        if apart:
            client.sendall(CHUNKED + b"\r\n" + CHUNK)
            wait_until(lambda: proxy.server.server_state.tasks)
            client.sendall(b"0\r\n" + trailers + b"\r\n")
        else:
            client.sendall(CHUNKED + b"\r\n" + CHUNK + b"0\r\n" + trailers + b"\r\n")
        response = HTTPResponse(client)
        response.begin()
        response.read()
        assert response.status == 200
        assert response.headers["x-request-id"] != "from-a-trailer"
    assert [talk.json for talk in fake.talks] == [CHAT] * 2
    assert all("traceparent" not in talk.headers for talk in fake.talks)


FLOODS = {
    "many trailers": b"0\r\n" + b"a:\r\n" * 100_000,
    "one trailer": b"0\r\na: " + b"b" * 500_000,
    "an extension": b"1;" + b"a" * 500_000,
    "an extension after a chunk": CHUNK + b"1;a=" + b"a" * 500_000,
    "many extensions": (b"1;" + b"a" * 300 + b"\r\n \r\n") * 2000,
}


@pytest.mark.parametrize("flood", FLOODS.values(), ids=FLOODS.keys())
def test_trailers_and_extensions_are_limited(client: socket.socket, flood: bytes) -> None:
    client.sendall(CHUNKED + b"\r\n")
    with contextlib.suppress(OSError):
        client.sendall(flood)
    status, error = error_of(read_all(client))
    assert (status, error["code"]) == (431, "headers_too_large")


def test_small_chunks_are_no_flood(client: socket.socket) -> None:
    body = BODY.ljust(100_000)
    client.sendall(CHUNKED + b"\r\n")
    client.sendall(b"".join(b"1\r\n%c\r\n" % byte for byte in body) + b"0\r\n\r\n")
    assert status_of(client) == 200


# HTTP/1.0


@pytest.mark.parametrize("path", ["/v1/chat/completions", "/generate/stream"])
def test_http_1_0_gets_no_chunks(client: socket.socket, fake: FakeUpstream, path: str) -> None:
    body = json.dumps({**CHAT, "stream": True} if "chat" in path else {"prompt": "hi"}).encode()
    if "generate" in path:

        async def completes(talk: Talk) -> None:
            await talk.start_stream()
            await talk.event({"choices": [{"index": 0, "text": "hi", "finish_reason": None}]})
            await talk.event({"choices": [{"index": 0, "text": "", "finish_reason": "stop"}]})
            await talk.end()

        fake.scripts.append(completes)
    client.sendall(f"POST {path} HTTP/1.0\r\ncontent-length: {len(body)}\r\n\r\n".encode() + body)
    head, _, answer = read_all(client).partition(b"\r\n\r\n")
    assert b" 200 OK\r\n" in head
    assert b"transfer-encoding" not in head
    assert b"\r\nconnection: close" in head
    assert answer.startswith(b"data: {")
    assert answer.endswith(b"data: [DONE]\n\n" if "chat" in path else b'data: {"done": true}\n\n')


def test_http_1_0_whole_response(client: socket.socket) -> None:
    client.sendall(b"POST /v1/chat/completions HTTP/1.0\r\ncontent-length: %d\r\n\r\n%b" % (len(BODY), BODY))
    head, _, answer = read_all(client).partition(b"\r\n\r\n")
    assert b"\r\ncontent-length: %d\r\n" % len(answer) in head


# no chunk ends a response early


def test_held_back_piece_before_an_error_does_not_end_the_stream(fake: FakeUpstream) -> None:
    """`ST` may begin the stop string, so the event that has it is empty on its way to the client."""

    release = threading.Event()

    async def breaks(talk: Talk) -> None:
        await talk.start_stream()
        await talk.event(delta("Hello "))
        await asyncio.to_thread(release.wait, 60)
        held_back, error = json.dumps(delta("ST")), json.dumps({"error": {"message": "lost", "type": "t", "code": 500}})
        await talk.chunk(f"data: {held_back}\n\ndata: {error}\n\n".encode())
        await talk.end()

    with running_proxy(backends={"only": backend(fake, dialect="llama-cpp-python")}) as proxy:
        fake.scripts.append(breaks)
        with ask(proxy, stop=["STOP"]) as client:
            assert b"Hello" in client.recv(65536)
            release.set()
            assert b"stream_broken" in read_until(client, b"0\r\n\r\n")
            client.sendall(GET)
            assert status_of(client) == 200


# one response for each request, and none after it


def test_no_error_follows_a_response_that_came_before_the_body(
    proxy: RunningProxy, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A refused request's body may go on for a while. When its time is up, the connection closes silently."""
    monkeypatch.setattr(proxy.gateway.settings.limits, "body_timeout_s", 0.2)
    with socket.create_connection(("127.0.0.1", proxy.port), timeout=20) as client:
        client.sendall(b"POST /nowhere HTTP/1.1\r\nhost: x\r\ncontent-length: 100\r\n\r\n{")
        assert read_all(client).count(b"HTTP/1.1 ") == 1


def test_no_error_lands_in_the_response_before(proxy: RunningProxy, fake: FakeUpstream) -> None:
    """A second request's body is malformed while the first one's stream goes on."""

    async def streams(talk: Talk) -> None:
        await talk.start_stream()
        await talk.event(delta("hel"))
        await talk.until_client_leaves()

    fake.scripts.append(streams)
    body = json.dumps({**CHAT, "stream": True}).encode()
    with socket.create_connection(("127.0.0.1", proxy.port), timeout=20) as client:
        client.sendall(POST + b"content-length: %d\r\n\r\n" % len(body) + body)
        assert b"hel" in client.recv(65536)
        client.sendall(CHUNKED + b"\r\n")
        client.sendall(b"no chunk\r\n")
        assert b"HTTP/1.1" not in read_all(client)


# the number of connections


def open_connections(proxy: RunningProxy) -> int:
    return len(proxy.server.server_state.connections)


@pytest.fixture
def limited(proxy: RunningProxy, monkeypatch: pytest.MonkeyPatch) -> int:
    wait_until(lambda: open_connections(proxy) == 0)
    protocol = proxy.server.config.http
    assert isinstance(protocol, type)
    monkeypatch.setattr(protocol, "max_connections", 8)
    return 8


IDLE = {
    "silent": b"",
    "in a head": GET[:20],
    "in a body": POST + b"content-length: 9\r\n\r\n{",
    "kept alive": GET,
    "refused": b"garbage\r\n\r\n",
}


@pytest.mark.parametrize("begin", IDLE.values(), ids=IDLE.keys())
def test_idle_connections_make_room(proxy: RunningProxy, limited: int, begin: bytes) -> None:
    with contextlib.ExitStack() as stack:
        idle = []
        for _ in range(3 * limited):
            client = stack.enter_context(socket.create_connection(("127.0.0.1", proxy.port), timeout=20))
            client.sendall(begin)
            if begin == GET:
                assert status_of(client) == 200
            idle.append(client)
        wait_until(lambda: open_connections(proxy) <= limited)
        assert b" 200 " not in read_all(idle[0]), "the oldest is closed"
        assert chat(proxy).status_code == 200


def test_busy_connections_are_left_alone(proxy: RunningProxy, limited: int, fake: FakeUpstream) -> None:
    """When all are busy, a new connection is refused, with a reason."""
    release = threading.Event()

    async def streams(talk: Talk) -> None:
        await talk.start_stream()
        await talk.event(delta("hel"))
        await asyncio.to_thread(release.wait, 60)
        await talk.event(delta(finish="stop"))
        await talk.end()

    fake.scripts += [streams] * limited
    before = dict(proxy.gateway.metrics.refusals.values)
    clients = [ask(proxy) for _ in range(limited)]
    for client in clients:
        assert b"hel" in client.recv(65536)
    with socket.create_connection(("127.0.0.1", proxy.port), timeout=20) as client:
        status, error = error_of(read_all(client))
    assert (status, error["code"]) == (503, "too_many_connections")
    refused = ("other", "too_many_connections")
    assert proxy.gateway.metrics.refusals.values[refused] == before.get(refused, 0) + 1
    release.set()
    for client in clients:
        assert read_until(client, b"0\r\n\r\n").endswith(b"data: [DONE]\n\n\r\n0\r\n\r\n")
        client.close()


def read_until(client: socket.socket, ending: bytes) -> bytes:
    data = b""
    while not data.endswith(ending):
        part = client.recv(65536)
        assert part
        data += part
    return data


@pytest.mark.parametrize(("files", "limit"), [(64, 16), (1024, 496), (1_000_000, 16_384), (10, 1)])
def test_the_limit_follows_from_the_descriptors(monkeypatch: pytest.MonkeyPatch, files: int, limit: int) -> None:
    monkeypatch.setattr(resource, "getrlimit", lambda _: (files, files))
    assert http_protocol.connection_limit() == limit


# the time of a head


@pytest.fixture
def short_head_timeout(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(http_protocol, "HEAD_TIMEOUT_S", 0.2)


@pytest.mark.usefixtures("short_head_timeout")
def test_silent_connection_is_closed_without_a_response(proxy: RunningProxy) -> None:
    with socket.create_connection(("127.0.0.1", proxy.port), timeout=20) as client:
        assert read_all(client) == b""


@pytest.mark.usefixtures("short_head_timeout")
def test_unfinished_head_times_out(proxy: RunningProxy) -> None:
    with socket.create_connection(("127.0.0.1", proxy.port), timeout=20) as client:
        client.sendall(POST)
        status, error = error_of(read_all(client))
    assert (status, error["code"]) == (408, "request_timeout")


@pytest.mark.usefixtures("short_head_timeout")
def test_unfinished_head_of_a_later_request_times_out(proxy: RunningProxy) -> None:
    with socket.create_connection(("127.0.0.1", proxy.port), timeout=20) as client:
        client.sendall(GET)
        assert status_of(client) == 200
        client.sendall(GET[:20])
        assert error_of(read_all(client))[0] == 408


@pytest.mark.usefixtures("short_head_timeout")
def test_kept_alive_connection_may_be_idle_for_longer(proxy: RunningProxy) -> None:
    with socket.create_connection(("127.0.0.1", proxy.port), timeout=0.6) as client:
        client.sendall(GET)
        assert status_of(client) == 200
        with pytest.raises(TimeoutError):
            client.recv(1)
        client.sendall(GET)
        assert status_of(client) == 200


def test_disconnect_in_the_head(proxy: RunningProxy) -> None:
    wait_until(lambda: not proxy.server.server_state.connections)
    with socket.create_connection(("127.0.0.1", proxy.port)) as client:
        client.sendall(POST)
        wait_until(lambda: proxy.server.server_state.connections)
    wait_until(lambda: not proxy.server.server_state.connections)


# input that is not HTTP


@pytest.mark.parametrize(
    "data", [b"hello\r\n\r\n", b"\x16\x03\x01\x02\x00\x01\x00\x01\xfc\x03\x03", POST + b"content-length: x\r\n\r\n"]
)
def test_input_that_is_not_http(client: socket.socket, data: bytes) -> None:
    client.sendall(data)
    status, error = error_of(read_all(client))
    assert (status, error["type"]) == (400, "invalid_request_error")


def test_input_that_is_not_http_during_a_response(proxy: RunningProxy, fake: FakeUpstream) -> None:
    """The response is cut, and no error response is written into it."""
    cancelled = threading.Event()

    async def streams(talk: Talk) -> None:
        await talk.start_stream()
        await talk.event(delta("hel"))
        await talk.until_client_leaves()
        cancelled.set()

    fake.scripts.append(streams)
    body = json.dumps({**CHAT, "stream": True}).encode()
    with socket.create_connection(("127.0.0.1", proxy.port), timeout=20) as client:
        client.sendall(POST + b"content-length: %d\r\n\r\n" % len(body) + body)
        assert b"hel" in client.recv(65536)
        client.sendall(b"\x00\x01\r\n\r\n")
        assert b"HTTP/1.1" not in read_all(client)
    assert cancelled.wait(10)


# Upgrade


@pytest.mark.parametrize("name", [b"Upgrade", b"upgrade"])
@pytest.mark.parametrize("apart", [False, True])
def test_upgrade_to_http_2_is_ignored(
    proxy: RunningProxy, client: socket.socket, fake: FakeUpstream, name: bytes, apart: bool
) -> None:
    """Java's client asks for it with each request. A body that contains the header's text is left alone."""
    fake.talks.clear()
    text = "a\r\nUpgrade: b"
    body = json.dumps({"messages": [{"role": "user", "content": text}]}).encode()
    head = POST + b"Connection: Upgrade, HTTP2-Settings\r\nHTTP2-Settings: AAEAAEAA\r\n" + name + b": h2c\r\n"
    head += b"content-length: %d\r\n\r\n" % len(body)
    for _ in range(2):
        if apart:
            client.sendall(head)
            wait_until(lambda: proxy.server.server_state.tasks)
            client.sendall(body)
        else:
            client.sendall(head + body)
        assert status_of(client) == 200
    assert [talk.json["messages"][0]["content"] for talk in fake.talks] == [text] * 2
