"""What nginx keeps out: malformed and oversized requests, operator routes, spoofed headers."""

from __future__ import annotations

import re
import select
import socket
import ssl
import threading
import time
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import ExitStack, suppress

import httpx
import pytest

from tests.e2e.nginx.conftest import StartNginx
from tests.support import documents
from tests.support.fake_upstream import FakeUpstream, Talk, whole
from tests.support.http2_client import H2
from tests.support.nginx import README, TMP_MB, Nginx
from tests.support.nginx_client import (
    BODY,
    CHAT,
    CONTENT,
    GET,
    HEAD,
    post,
    releasing,
    send_raw,
    wait_for_addresses,
    wait_for_event,
)
from tests.support.proxied_backend import assert_openai_error
from tests.support.real_servers import Proxy
from tests.support.unavailable import unavailable
from tests.support.waiting import wait_until
from xgen_proxy.config.settings import Settings

LIMIT = Settings(backends={"vllm": {"urls": ["http://127.0.0.1:1"]}}).limits.body_bytes


SMUGGLED = b"GET /metrics HTTP/1.1\r\nHost: x\r\n\r\n"
CHUNKED = b"Transfer-Encoding: chunked\r\n"
MALFORMED = {
    "length and chunked": HEAD + b"Content-Length: 6\r\n" + CHUNKED + b"\r\n0\r\n\r\n" + SMUGGLED,
    "chunked and length": HEAD + CHUNKED + b"Content-Length: 6\r\n\r\n0\r\n\r\n" + SMUGGLED,
    "two lengths": HEAD + b"Content-Length: 2\r\nContent-Length: 40\r\n\r\n{}" + SMUGGLED,
    "the same length twice": HEAD + b"Content-Length: 2\r\nContent-Length: 2\r\n\r\n{}" + SMUGGLED,
    "a list of lengths": HEAD + b"Content-Length: 2, 2\r\n\r\n{}" + SMUGGLED,
    "a signed length": HEAD + b"Content-Length: +2\r\n\r\n{}" + SMUGGLED,
    "a negative length": HEAD + b"Content-Length: -2\r\n\r\n{}" + SMUGGLED,
    "a hexadecimal length": HEAD + b"Content-Length: 0x2\r\n\r\n{}" + SMUGGLED,
    "a length beyond all bounds": HEAD + b"Content-Length: 99999999999999999999\r\n\r\n{}" + SMUGGLED,
    "an empty length": HEAD + b"Content-Length:\r\n\r\n{}" + SMUGGLED,
    "chunked and more": HEAD + b"Transfer-Encoding: chunked, identity\r\n\r\n0\r\n\r\n" + SMUGGLED,
    "more and chunked": HEAD + b"Transfer-Encoding: gzip, chunked\r\n\r\n0\r\n\r\n" + SMUGGLED,
    "almost chunked": HEAD + b"Transfer-Encoding: xchunked\r\n\r\n0\r\n\r\n" + SMUGGLED,
    "chunked after a tab": HEAD + b"Transfer-Encoding:\x0bchunked\r\n\r\n0\r\n\r\n" + SMUGGLED,
    "chunked twice": HEAD + CHUNKED + CHUNKED + b"\r\n0\r\n\r\n" + SMUGGLED,
    "chunked in HTTP/1.0": HEAD.replace(b"HTTP/1.1", b"HTTP/1.0") + CHUNKED + b"\r\n0\r\n\r\n" + SMUGGLED,
    "a bad chunk size": HEAD + CHUNKED + b"\r\nzz\r\n{}\r\n0\r\n\r\n",
    "a chunk size beyond all bounds": HEAD + CHUNKED + b"\r\nfffffffffffffffff1\r\n{}\r\n0\r\n\r\n",
    "a chunk longer than it says": HEAD + CHUNKED + b"\r\n1\r\n{}\r\n0\r\n\r\n",
    "a folded header": HEAD + b"X-One: a\r\n b\r\nContent-Length: 2\r\n\r\n{}",
    "a folded first header": f"POST {CHAT} HTTP/1.1\r\n Host: x\r\n\r\n".encode(),
    "a space before the colon": HEAD + b"Content-Length : 2\r\n\r\n{}",
    "a NUL in a header": HEAD + b"X-One: a\0b\r\nContent-Length: 2\r\n\r\n{}",
    "a control character in a name": HEAD + b"X-O\x01ne: a\r\nContent-Length: 2\r\n\r\n{}",
    "no host": f"POST {CHAT} HTTP/1.1\r\nContent-Length: 2\r\n\r\n{{}}".encode(),
    "two hosts": HEAD + b"Host: other\r\nContent-Length: 2\r\n\r\n{}",
    "no HTTP": b"\x16\x03\x01\x02\x00\x01\x00\x01\xfc\x03\x03\r\n\r\n",
    "a version of its own": HEAD.replace(b"HTTP/1.1", b"HTTP/1.x") + b"Content-Length: 2\r\n\r\n{}",
    "a NUL in the path": b"POST /v1/%00 HTTP/1.1\r\nHost: localhost\r\nContent-Length: 2\r\n\r\n{}",
    "a path above the root": b"GET /v1/../../metrics HTTP/1.1\r\nHost: localhost\r\n\r\n",
}  # fmt: skip


@pytest.mark.parametrize("data", MALFORMED.values(), ids=MALFORMED)
def test_malformed_requests_reach_no_proxy(bare: Nginx, recorder: FakeUpstream, data: bytes) -> None:
    before = recorder.connections
    received = send_raw(bare, data)
    assert re.match(rb"HTTP/1\.[01] (400|501|505|413) ", received), received
    assert received.count(b"HTTP/1.") == 1, "the smuggled request was answered"
    assert recorder.talks == []
    assert recorder.connections == before


def test_chunk_extensions_smuggle_no_request(bare: Nginx, recorder: FakeUpstream) -> None:
    """nginx passes a legal chunked body on as one request with a Content-Length."""
    send_raw(
        bare,
        HEAD + CHUNKED + b"Connection: close\r\n\r\n2;x=GET /metrics HTTP/1.1\r\n{}\r\n0\r\nContent-Length: 9\r\n\r\n",
    )
    assert [(talk.body, talk.headers["content-length"]) for talk in recorder.talks] == [(b"{}", "2")]
    assert "transfer-encoding" not in recorder.talks[0].headers


@pytest.mark.parametrize(
    "extra",
    [
        [("content-length", "1")],
        [("content-length", "100")],
        [("content-length", "2"), ("content-length", "3")],
        [("x-one", "a\r\nx-forwarded-for: 6.6.6.6")],
        [("x-one: a\r\nx-two", "b")],
        [("X-Upper", "a")],
        [(":path", "/metrics")],
        [("host", "other")],
    ],
    ids=str,
)
def test_malformed_http2_reaches_no_proxy(bare: Nginx, recorder: FakeUpstream, extra: list[tuple[str, str]]) -> None:
    with H2(bare.connect("h2")) as client:
        status = client.status(client.request(CHAT, b"{}", extra))
    assert status in (400, 501, None)
    assert recorder.talks == []


def test_http1_headers_are_dropped_from_http2_requests(bare: Nginx, recorder: FakeUpstream) -> None:
    of_http1 = [("transfer-encoding", "chunked"), ("connection", "x-one"), ("keep-alive", "1"), ("upgrade", "h2c")]
    with H2(bare.connect("h2")) as client:
        assert client.status(client.request(CHAT, b"{}", of_http1)) == 200
    (talk,) = recorder.talks
    assert (talk.body, talk.headers["content-length"]) == (b"{}", "2")
    assert not {name for name, _ in of_http1} & set(talk.headers)


def test_slow_clients_are_disconnected(bare: Nginx, recorder: FakeUpstream) -> None:
    """All attacks run at once, since the timeout is 10 s."""

    def until_closed(first: bytes, each: bytes) -> tuple[float, bytes]:
        began = time.monotonic()
        received = b""
        with bare.connect() as connection:
            connection.sendall(first)
            connection.settimeout(0.5)
            while time.monotonic() < began + 40:
                try:
                    connection.sendall(each)
                    part = connection.recv(65536)
                    if not part:
                        break
                    received += part
                except TimeoutError:
                    continue
                except OSError:
                    break
        return time.monotonic() - began, received

    attacks = {
        "a head byte by byte": (HEAD + b"X-Slow: ", b"x"),
        "a head that stops": (HEAD, b""),
        "a body that stops": (HEAD + b"Content-Length: 100\r\n\r\n{", b""),
        "silence": (b"", b""),
    }
    with ThreadPoolExecutor(len(attacks)) as pool:
        results = dict(zip(attacks, pool.map(lambda attack: until_closed(*attack), attacks.values()), strict=True))
    for name, (took, received) in results.items():
        assert 9 < took < 30, f"{name}: {took}"
        assert received.startswith((b"HTTP/1.1 408", b"")), f"{name}: {received!r}"
    assert recorder.talks == []


def reaches(nginx: Nginx, listener: socket.socket) -> bool:
    """True when nginx passes a request on. Before it knows an address, it answers itself."""
    with nginx.connect() as client:
        client.sendall(GET)
        if not select.select([listener], [], [], 0.5)[0]:
            return False
        with listener.accept()[0] as passed_on:
            passed_on.recv(65536)
            passed_on.sendall(b"HTTP/1.1 204 No Content\r\nConnection: close\r\n\r\n")
            return True


def test_request_bodies_are_buffered(start_nginx: StartNginx) -> None:
    with socket.create_server(("127.0.0.1", 0)) as listener:
        listener.settimeout(20)
        nginx = start_nginx(listener.getsockname()[1])
        wait_until(lambda: reaches(nginx, listener), 20, "nginx to find the listener's address")
        with nginx.connect() as slow, nginx.connect() as quick:
            slow.sendall(HEAD + b"Content-Length: %d\r\n\r\n" % len(CONTENT))
            for position in range(10):
                slow.sendall(CONTENT[position : position + 1])
            quick.sendall(GET)
            with listener.accept()[0] as first:
                assert first.recv(65536).startswith(b"GET "), "the slow request arrived first"
            slow.sendall(CONTENT[10:])
            received = b""
            while not received.startswith(b"POST "):  # nginx retries the GET whose connection `first` closed
                with listener.accept()[0] as later:
                    received = later.recv(65536)
            assert received.endswith(CONTENT), "the body arrived in more than one piece"


def test_large_headers_are_rejected(bare: Nginx, recorder: FakeUpstream) -> None:
    with bare.client() as client:
        assert client.get("/v1/models", headers={"x-large": "x" * 8000}).status_code == 200
        assert_openai_error(client.get("/v1/models", headers={"x-large": "x" * 9000}), 431)
        many = {f"x-{number}": "x" * 4000 for number in range(12)}
        assert_openai_error(client.get("/v1/models", headers=many), 431)
        assert_openai_error(client.get("/v1/" + "x" * 9000), 414)
    with bare.client(http2=True) as client:
        assert client.get("/v1/models", headers={"x-large": "x" * 8000}).status_code == 200
        with pytest.raises(httpx.RemoteProtocolError):
            client.get("/v1/models", headers={"x-large": "x" * 60000})
    assert recorder.talks == []


def parts(size: int) -> Iterator[bytes]:
    """A body without a Content-Length."""
    yield b"{}"
    yield b" " * (size - 2)


@pytest.mark.parametrize("http2", [False, True], ids=["1.1", "2"])
def test_bodies_up_to_the_proxys_limit_pass(bare: Nginx, recorder: FakeUpstream, http2: bool) -> None:
    headers = {"content-type": "application/json"}
    with bare.client(http2=http2) as client:
        for content in (b"".join(parts(LIMIT)), parts(LIMIT)):
            assert client.post(CHAT, content=content, headers=headers).status_code == 200
    assert [len(talk.body) for talk in recorder.talks] == [LIMIT, LIMIT]


def test_larger_bodies_are_rejected(bare: Nginx, recorder: FakeUpstream) -> None:
    for content in (b" " * (LIMIT + 1), parts(LIMIT + 1)):
        with bare.client() as client:
            assert_openai_error(client.post(CHAT, content=content), 413)
    for extra in ([("content-length", str(LIMIT + 1))], []):
        with H2(bare.connect("h2")) as client:
            stream = client.request(CHAT, b"", extra, end=False)
            client.upload(stream, LIMIT + 1)
            assert client.status(stream) == 413
    assert recorder.talks == []


def test_two_uploads_of_one_client_at_once(bare: Nginx, recorder: FakeUpstream) -> None:
    """More could fill the /tmp that all bodies share, before anyone looked at a key. Other requests pass."""
    path, size = "/v1/audio/transcriptions", [("content-length", "20000000")]
    with ExitStack() as crowd, H2(bare.connect("h2")) as third, bare.client() as client:
        for _ in range(2):
            open_one = crowd.enter_context(H2(bare.connect("h2")))
            open_one.request(path, b"x", size, end=False)
        wait_until(lambda: third.status(third.request(path, b"x")) == 429, 5, "a third upload to be refused")
        assert post(client).status_code == 200
    assert [talk.path for talk in recorder.talks if "audio" in talk.path] == []


def test_a_full_tmp_rejects_bodies_and_nothing_else(bare: Nginx, recorder: FakeUpstream) -> None:
    """Bodies are buffered in /tmp, a tmpfs. When it is full, nginx answers 500 to bodies and serves the rest."""
    if bare.runner != "docker":
        unavailable("NOT TESTED: only in Docker nginx has a /tmp of limited size")

    def all_but_one_byte(connection: ssl.SSLSocket) -> bytes:
        head = HEAD + b"Connection: close\r\nContent-Length: %d\r\n\r\n" % LIMIT
        with suppress(OSError):  # nginx has closed
            connection.sendall(head + b" " * (LIMIT - 1))
        connection.settimeout(3)
        with suppress(OSError):
            return connection.recv(65536)
        return b""

    many = TMP_MB // 10 + 2
    with ExitStack() as crowd, bare.client() as client, ThreadPoolExecutor(many) as pool:
        connections = [crowd.enter_context(bare.connect()) for _ in range(many)]
        refused = [answer for answer in pool.map(all_but_one_byte, connections) if answer]
        assert {answer[:12] for answer in refused} == {b"HTTP/1.1 500"}
        assert 2 <= len(refused) < many
        assert post(client).status_code == 200
    with bare.client() as client:
        wait_until(lambda: client.post(CHAT, content=b"".join(parts(LIMIT))).status_code == 200, 5, "space in /tmp")


HIDDEN = ["/metrics", "/models/status", "/route", "/", "/docs", "/openapi.json", "/v1", "/nginx.conf", "/error"]
HIDDEN += ["//metrics", "/./metrics", "/v1/../metrics", "/v1/%2e%2e/metrics", "/v1/..%2fmetrics", "/%6detrics"]
HIDDEN += ["/health/../metrics", "/ready/..//models/status", "/metrics?x", "/metrics/", "/METRICS"]


def test_operator_routes_are_hidden(stack: Nginx, proxy: Proxy) -> None:
    for path in HIDDEN:
        for method in ("GET", "POST"):
            received = send_raw(stack, f"{method} {path} HTTP/1.1\r\nHost: x\r\nConnection: close\r\n\r\n".encode())
            assert received.startswith(b"HTTP/1.1 404"), (path, received[:300])
            assert b"xgen_" not in received
            assert b"replicas" not in received
    received = send_raw(
        stack, f"GET http://proxy:{proxy.port}/metrics HTTP/1.1\r\nHost: x\r\nConnection: close\r\n\r\n".encode()
    )
    assert received.startswith(b"HTTP/1.1 404"), received[:300]
    with stack.client() as client:
        assert_openai_error(client.get("/metrics"), 404)
        assert client.get("/v1/models").json()["data"][0]["id"] == "m"


def test_ready_names_no_backends(start_nginx: StartNginx, start_proxy: Callable[..., Proxy]) -> None:
    lonely = start_proxy("--vllm", "http://127.0.0.1:1")
    nginx = start_nginx(lonely.port)
    with nginx.client() as client:
        wait_until(lambda: client.get("/health").status_code == 200, 20, "nginx to find the proxy")
        answer = client.get("/ready")
        assert (answer.status_code, answer.json()) == (503, {"status": "not ready"})
        assert_openai_error(post(client), 503, 404)


def test_connections_of_one_client_are_limited(
    bare: Nginx, recorder: FakeUpstream, monkeypatch: pytest.MonkeyPatch
) -> None:
    """256 requests at once over all connections of a client; the next one gets 429."""
    release = threading.Event()

    async def hold(talk: Talk) -> None:
        await wait_for_event(release)
        await talk.answer(200, whole())

    monkeypatch.setattr(recorder, "default", hold)
    with ExitStack() as crowd, releasing(release):
        clients = [crowd.enter_context(H2(bare.connect("h2"))) for _ in range(3)]
        streams = [client.request(CHAT, CONTENT) for client in clients[:2] for _ in range(128)]
        wait_until(lambda: len(recorder.talks) == len(streams), 30, "256 requests to arrive")
        assert clients[2].status(clients[2].request(CHAT, CONTENT)) == 429
        with bare.client() as client:
            error = assert_openai_error(post(client), 429)
        assert error["code"] == "too_many_requests"
        release.set()
        assert clients[0].status(streams[127]) == 200
    with bare.client() as client:
        wait_until(lambda: post(client).status_code == 200, 5, "the held requests to end")


def test_idle_connections_of_one_client_keep_no_one_out(start_nginx: StartNginx, recorder: FakeUpstream) -> None:
    """limit_conn counts requests only. Where connections are short, nginx closes those that have idled the longest."""
    few = {"worker_connections 8192": "worker_connections 64"}
    nginx = wait_for_addresses(start_nginx(recorder.port, changed=few))
    with ExitStack() as crowd:
        for number in range(300):
            connection = crowd.enter_context(nginx.connect(*(["h2"] if number % 3 == 0 else [])))
            if number % 3 == 1:
                with suppress(OSError):
                    connection.sendall(GET)
                    connection.recv(65536)
        with nginx.client() as client:
            assert post(client).status_code == 200


SPOOFED = {
    "X-Forwarded-For": "6.6.6.6",
    "X-Forwarded-Proto": "http",
    "X-Forwarded-Host": "evil.example",
    "X-Forwarded-Port": "6",
    "X-Forwarded-Prefix": "/evil",
    "X-Forwarded-Server": "evil.example",
    "X-Forwarded-Ssl": "off",
    "X-Real-IP": "6.6.6.6",
    "X-Client-IP": "6.6.6.6",
    "True-Client-IP": "6.6.6.6",
    "Forwarded": "for=6.6.6.6",
    "X_Forwarded_For": "6.6.6.6",
    "Proxy": "http://evil.example",
    "X-Accel-Redirect": "/metrics",
    "X-Accel-Buffering": "yes",
    "X-Accel-Expires": "60",
    "X-Accel-Limit-Rate": "1",
    "X-Accel-Charset": "evil",
    "X-Accel-Mapping": "/=/",
    "Upgrade": "h2c",
    "TE": "trailers",
}


@pytest.mark.parametrize("http2", [False, True], ids=["1.1", "2"])
def test_spoofed_headers_are_dropped(bare: Nginx, recorder: FakeUpstream, http2: bool) -> None:
    spoofed = {name: value for name, value in SPOOFED.items() if not (http2 and name == "Upgrade")}
    with bare.client(http2=http2) as client:
        assert client.post(CHAT, json=BODY, headers={**spoofed, "Authorization": "Bearer k"}).status_code == 200
    headers = recorder.talks[0].headers
    assert "6.6.6.6" not in str(headers)
    assert "evil" not in str(headers)
    assert headers["x-forwarded-for"] == headers["x-real-ip"] == "127.0.0.1"
    assert headers["x-forwarded-proto"] == "https"
    assert headers["host"] == headers["x-forwarded-host"] == "localhost"
    assert headers["authorization"] == "Bearer k"
    allowed = {"x-forwarded-for", "x-real-ip", "x-forwarded-proto", "x-forwarded-host", "x-forwarded-port"}
    left = {name for name in headers if name in {each.lower() for each in SPOOFED}}
    assert left == allowed


def test_a_trusted_load_balancer_sets_the_client_address(start_nginx: StartNginx, recorder: FakeUpstream) -> None:
    [snippet] = documents.blocks(README, "nginx")
    nginx = wait_for_addresses(start_nginx(recorder.port, added=snippet.replace("10.0.0.0/8", "127.0.0.0/8")))
    with nginx.client() as client:
        assert client.post(CHAT, json=BODY, headers={"X-Forwarded-For": "198.51.100.7"}).status_code == 200
    assert recorder.talks[-1].headers["x-forwarded-for"] == "198.51.100.7"


def test_x_accel_headers_are_ignored(bare: Nginx, recorder: FakeUpstream) -> None:
    async def script(talk: Talk) -> None:
        orders = (
            "X-Accel-Redirect: /health\r\nX-Accel-Limit-Rate: 1\r\nX-Accel-Buffering: yes\r\nX-Accel-Charset: x\r\n"
        )
        await talk.answer(200, whole("x" * 5000), orders)

    recorder.scripts.append(script)
    began = time.monotonic()
    with bare.client() as client:
        answer = post(client)
    assert answer.json() == whole("x" * 5000)
    assert time.monotonic() - began < 15, "the rate was limited: one byte a second"
    assert not [name for name in answer.headers if name.startswith("x-accel")]
