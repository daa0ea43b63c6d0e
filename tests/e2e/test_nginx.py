"""nginx as it is shipped, in front of real proxies: what it lets through, what it keeps out, and what it mends."""

from __future__ import annotations

import asyncio
import json
import os
import re
import select
import signal
import socket
import ssl
import stat
import subprocess
import threading
import time
from collections.abc import Callable, Iterator, Mapping
from concurrent.futures import ThreadPoolExecutor
from contextlib import ExitStack, contextmanager, suppress
from pathlib import Path
from typing import Any

import httpx
import openai
import pytest

from tests.e2e.conftest import unavailable
from tests.support import documents
from tests.support import real_servers as servers
from tests.support.documents import ticked
from tests.support.fake_upstream import FakeUpstream, Talk, delta, whole
from tests.support.http2_client import H2
from tests.support.nginx import CONFIGURATION, TMP_MB, NameServer, Nginx, UnavailableError, certificate, runner
from tests.support.proxied_backend import CAPITAL, assert_openai_error
from tests.support.real_servers import MODEL, Proxy, Server, free_port
from tests.support.waiting import wait_until
from xgen_proxy import server
from xgen_proxy.config.settings import Settings
from xgen_proxy.downstream import http_protocol
from xgen_proxy.downstream.request_body import REQUEST_ID

BODY = {"model": "m", "messages": [{"role": "user", "content": "a secret question"}]}
CONTENT = json.dumps(BODY).encode()
CHAT = "/v1/chat/completions"
NGINX_PAGE = CONFIGURATION.parent / "README.md"
LIMIT = Settings(backends={"vllm": {"urls": ["http://127.0.0.1:1"]}}).limits.body_bytes
HEAD = f"POST {CHAT} HTTP/1.1\r\nHost: localhost\r\nContent-Type: application/json\r\n".encode()
GET = b"GET /v1/models HTTP/1.1\r\nHost: localhost\r\n\r\n"

NO_PROBES = {"XGEN_PROBE_INTERVAL_S": "0"}  # they would be answered by the script that is meant for the test

StartNginx = Callable[..., Nginx]


@pytest.fixture(scope="module")
def nginx_runner() -> str:
    try:
        return runner()
    except UnavailableError as error:
        unavailable(f"NOT TESTED WITH nginx: {error}")


@pytest.fixture(scope="module")
def start_nginx(nginx_runner: str, tmp_path_factory: pytest.TempPathFactory) -> Iterator[StartNginx]:
    """start_nginx(port, *addresses): proxies listen on `port` of those addresses. `added` goes into its settings, and
    `changed` names what stands there and what is to stand there instead."""
    with ExitStack() as stack:

        def start(port: int, *addresses: str, added: str = "", changed: Mapping[str, str] | None = None) -> Nginx:
            names = NameServer(*addresses or ["127.0.0.1"])
            stack.callback(names.close)
            made = Nginx(nginx_runner, tmp_path_factory.mktemp("nginx"), port, names, added, changed or {})
            stack.callback(made.stop)
            return made.start()

        yield start


@pytest.fixture(scope="module")
def recorder_alone() -> Iterator[FakeUpstream]:
    """In a proxy's place: keeps what nginx sends."""
    fake = FakeUpstream()
    yield fake
    fake.close()


@pytest.fixture(scope="module")
def bare_alone(start_nginx: StartNginx, recorder_alone: FakeUpstream) -> Nginx:
    return informed(start_nginx(recorder_alone.port))


@pytest.fixture
def recorder(recorder_alone: FakeUpstream) -> FakeUpstream:
    recorder_alone.talks.clear()
    return recorder_alone


@pytest.fixture
def bare(bare_alone: Nginx, recorder: FakeUpstream) -> Nginx:
    """nginx right in front of `recorder`."""
    return bare_alone


@pytest.fixture(scope="module")
def engine() -> Iterator[FakeUpstream]:
    """A scripted vLLM behind the proxies."""
    fake = FakeUpstream()
    yield fake
    fake.close()


@pytest.fixture(scope="module")
def proxy(engine: FakeUpstream, start_proxy: Callable[..., Proxy]) -> Proxy:
    made = start_proxy("--vllm", engine.url, env=NO_PROBES)
    made.wait_ready()
    return made


@pytest.fixture(scope="module")
def stack(start_nginx: StartNginx, proxy: Proxy) -> Nginx:
    """nginx, a real proxy, `engine`."""
    return ready(start_nginx(proxy.port))


def informed(nginx: Nginx) -> Nginx:
    """It knows the proxies' addresses; before, it answers 502 itself. For those whose proxy is a scripted one."""
    with nginx.client() as client:
        wait_until(lambda: client.get("/health").status_code != 502, 20, "nginx to find the proxies' addresses")
    return nginx


def ready(nginx: Nginx) -> Nginx:
    with nginx.client() as client:
        wait_until(lambda: client.get("/ready").status_code == 200, 20, "a proxy to be ready behind nginx")
    return nginx


def post(client: httpx.Client, **fields: Any) -> httpx.Response:
    return client.post(CHAT, json={**BODY, **fields})


def raw(nginx: Nginx, data: bytes) -> bytes:
    """What comes back until nginx closes, or has answered and would take more."""
    with nginx.connect() as connection:
        connection.sendall(data)
        connection.settimeout(15)
        received = b""
        try:
            while part := connection.recv(65536):
                received += part
        except (OSError, ssl.SSLError):
            pass
        return received


def in_flight(proxy: Server) -> int:
    backends = httpx.get(proxy.url + "/models/status").json()["backends"]
    return sum(replica["in_flight"] for backend in backends for replica in backend["replicas"])


# -- what is agreed on with the proxy ----------------------------------------------------------------------------------


def directive(name: str) -> str:
    values = re.findall(rf"^\s*{name} ([^;]+);", CONFIGURATION.read_text(), re.MULTILINE)
    assert len(set(values)) == 1, f"{name}: {values}"
    return str(values[0])


def seconds(name: str) -> int:
    return int(directive(name).removesuffix("s"))


def test_the_page_tells_the_limits_as_they_are() -> None:
    rows = documents.table_rows(NGINX_PAGE, "directive")
    assert rows
    for names, value, _why in rows:
        for name in ticked(names):
            found = re.findall(rf"^\s*{name} (?:clients )?([^;]+);", CONFIGURATION.read_text(), re.MULTILINE)
            assert ticked(value)[0] in found, (name, value, found)


def test_limits_fit_the_proxys() -> None:
    settings = Settings(backends={"vllm": {"urls": ["http://127.0.0.1:1"]}})
    backend = settings.backends["vllm"]
    sizes = re.findall(r"client_max_body_size (\d+);", CONFIGURATION.read_text())
    assert sizes == [str(settings.limits.body_bytes), "0"], "nothing else but the page of errors has its own"
    assert f"more than {settings.limits.body_bytes} bytes" in CONFIGURATION.read_text()
    assert seconds("send_timeout") == http_protocol.STALL_S
    assert seconds("client_header_timeout") <= http_protocol.HEAD_S
    assert seconds("proxy_read_timeout") > settings.limits.queue_timeout_s + backend.total_timeout_s
    assert seconds("worker_shutdown_timeout") >= seconds("proxy_read_timeout")
    upstream = CONFIGURATION.read_text().partition("upstream proxies {")[2].partition("}")[0]
    kept = re.search(r"keepalive_timeout (\d+)s;", upstream)
    assert kept
    assert int(kept[1]) < server.KEEP_ALIVE_S
    assert f'"~^{REQUEST_ID.pattern.decode()}$"' in CONFIGURATION.read_text()


# -- what is kept out --------------------------------------------------------------------------------------------------

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
    received = raw(bare, data)
    assert re.match(rb"HTTP/1\.[01] (400|501|505|413) ", received), received
    assert received.count(b"HTTP/1.") == 1, "what was smuggled in has been answered"
    assert recorder.talks == []
    assert recorder.connections == before


def test_a_smuggled_request_in_a_chunk_extension_stays_one(bare: Nginx, recorder: FakeUpstream) -> None:
    """What is legal is passed on as nginx understood it, written anew: with a length, as one request."""
    raw(
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


def test_http2_takes_nothing_along_that_is_of_http1(bare: Nginx, recorder: FakeUpstream) -> None:
    of_http1 = [("transfer-encoding", "chunked"), ("connection", "x-one"), ("keep-alive", "1"), ("upgrade", "h2c")]
    with H2(bare.connect("h2")) as client:
        assert client.status(client.request(CHAT, b"{}", of_http1)) == 200
    (talk,) = recorder.talks
    assert (talk.body, talk.headers["content-length"]) == (b"{}", "2")
    assert not {name for name, _ in of_http1} & set(talk.headers)


def test_slow_clients_are_cut_off(bare: Nginx, recorder: FakeUpstream) -> None:
    """A head that comes byte by byte, one that never comes, a body that stops: all at once, since it takes 10 s."""

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
    """Is a request passed on? Before nginx knows an address it answers itself."""
    with nginx.connect() as client:
        client.sendall(GET)
        if not select.select([listener], [], [], 0.5)[0]:
            return False
        with listener.accept()[0] as passed_on:
            passed_on.recv(65536)
            passed_on.sendall(b"HTTP/1.1 204 No Content\r\nConnection: close\r\n\r\n")
            return True


def test_a_slow_body_reaches_the_proxy_once_it_is_whole(start_nginx: StartNginx) -> None:
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
                assert first.recv(65536).startswith(b"GET "), "the slow one has come first"
            slow.sendall(CONTENT[10:])
            received = b""
            while not received.startswith(b"POST "):  # nginx asks again for what `first` was closed under
                with listener.accept()[0] as later:
                    received = later.recv(65536)
            assert received.endswith(CONTENT), "it came in more than one piece"


def test_headers_have_a_limit(bare: Nginx, recorder: FakeUpstream) -> None:
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
    """Of a body whose length is not told."""
    yield b"{}"
    yield b" " * (size - 2)


@pytest.mark.parametrize("http2", [False, True], ids=["1.1", "2"])
def test_bodies_have_the_proxys_limit(bare: Nginx, recorder: FakeUpstream, http2: bool) -> None:
    headers = {"content-type": "application/json"}
    with bare.client(http2=http2) as client:
        for content in (b"".join(parts(LIMIT)), parts(LIMIT)):
            assert client.post(CHAT, content=content, headers=headers).status_code == 200
    assert [len(talk.body) for talk in recorder.talks] == [LIMIT, LIMIT]


def test_larger_bodies_are_refused(bare: Nginx, recorder: FakeUpstream) -> None:
    for content in (b" " * (LIMIT + 1), parts(LIMIT + 1)):
        with bare.client() as client:
            assert_openai_error(client.post(CHAT, content=content), 413)
    for extra in ([("content-length", str(LIMIT + 1))], []):
        with H2(bare.connect("h2")) as client:
            stream = client.request(CHAT, b"", extra, end=False)
            client.upload(stream, LIMIT + 1)
            assert client.status(stream) == 413
    assert recorder.talks == []


def test_more_bodies_than_there_is_room_for_harm_nobody_else(bare: Nginx, recorder: FakeUpstream) -> None:
    """They wait in /tmp, which is memory: where it is full those that come are refused, and all else goes on."""
    if bare.runner != "docker":
        unavailable("NOT TESTED: only in Docker nginx has a /tmp that can be filled")

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
        wait_until(lambda: client.post(CHAT, content=b"".join(parts(LIMIT))).status_code == 200, 5, "room again")


HIDDEN = ["/metrics", "/models/status", "/route", "/", "/docs", "/openapi.json", "/v1", "/nginx.conf", "/error"]
HIDDEN += ["//metrics", "/./metrics", "/v1/../metrics", "/v1/%2e%2e/metrics", "/v1/..%2fmetrics", "/%6detrics"]
HIDDEN += ["/health/../metrics", "/ready/..//models/status", "/metrics?x", "/metrics/", "/METRICS"]


def test_what_is_for_operators_is_not_there(stack: Nginx, proxy: Proxy) -> None:
    for path in HIDDEN:
        for method in ("GET", "POST"):
            received = raw(stack, f"{method} {path} HTTP/1.1\r\nHost: x\r\nConnection: close\r\n\r\n".encode())
            assert received.startswith(b"HTTP/1.1 404"), (path, received[:300])
            assert b"xgen_" not in received
            assert b"replicas" not in received
    received = raw(
        stack, f"GET http://proxy:{proxy.port}/metrics HTTP/1.1\r\nHost: x\r\nConnection: close\r\n\r\n".encode()
    )
    assert received.startswith(b"HTTP/1.1 404"), received[:300]
    with stack.client() as client:
        assert_openai_error(client.get("/metrics"), 404)
        assert client.get("/v1/models").json()["data"][0]["id"] == "m"


def test_ready_tells_no_names(start_nginx: StartNginx, start_proxy: Callable[..., Proxy]) -> None:
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
    """256 at once, counted over all its connections; the next is told so."""
    release = threading.Event()

    async def acquire(talk: Talk) -> None:
        while not release.is_set():
            await sleep()
        await talk.answer(200, whole())

    monkeypatch.setattr(recorder, "default", acquire)
    with ExitStack() as crowd:
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
        wait_until(lambda: post(client).status_code == 200, 5, "the crowd to be gone")


async def sleep() -> None:
    await asyncio.sleep(0.02)


# -- who the client is -------------------------------------------------------------------------------------------------

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
def test_clients_cannot_say_who_they_are(bare: Nginx, recorder: FakeUpstream, http2: bool) -> None:
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


def test_another_load_balancer_in_front_is_believed_if_told_to(start_nginx: StartNginx, recorder: FakeUpstream) -> None:
    [told] = documents.blocks(NGINX_PAGE, "nginx")
    nginx = informed(start_nginx(recorder.port, added=told.replace("10.0.0.0/8", "127.0.0.0/8")))
    with nginx.client() as client:
        assert client.post(CHAT, json=BODY, headers={"X-Forwarded-For": "198.51.100.7"}).status_code == 200
    assert recorder.talks[-1].headers["x-forwarded-for"] == "198.51.100.7"


def test_the_upstream_cannot_steer_nginx(bare: Nginx, recorder: FakeUpstream) -> None:
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
    assert time.monotonic() - began < 15, "at one byte a second it would take an hour"
    assert not [name for name in answer.headers if name.startswith("x-accel")]


# -- the way through ---------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("http2", [False, True], ids=["1.1", "2"])
def test_each_event_passes_before_the_next_is_made(stack: Nginx, engine: FakeUpstream, http2: bool) -> None:
    """The engine waits for the test to have read each event: any buffer on the way, and nothing goes on."""
    read = [threading.Event() for _ in range(20)]

    async def script(talk: Talk) -> None:
        await talk.start_stream()
        for number, event in enumerate(read):
            await talk.event(delta(f"word{number} "))
            deadline = time.monotonic() + 10
            while not event.is_set():
                assert time.monotonic() < deadline, "the event was not read"
                await sleep()
        await talk.event(delta(finish="stop"))
        await talk.end()

    engine.scripts.append(script)
    headers = {"Accept-Encoding": "gzip, br", "Accept": "text/event-stream"}
    with (
        stack.client(http2=http2) as client,
        client.stream("POST", CHAT, json={**BODY, "stream": True}, headers=headers) as answer,
    ):
        assert answer.http_version == ("HTTP/2" if http2 else "HTTP/1.1")
        assert "content-encoding" not in answer.headers
        seen = 0
        for line in answer.iter_lines():
            if f"word{seen} " in line:
                read[seen].set()
                seen += 1
        assert seen == len(read)
        assert line == "" or line == "data: [DONE]"


@contextmanager
def endless(engine: FakeUpstream, stream: bool) -> Iterator[threading.Event]:
    """The engine's next answer goes on for ever, or never begins. The event is set when the proxy has left it."""
    left = threading.Event()

    async def script(talk: Talk) -> None:
        if stream:
            await talk.start_stream()
            await talk.event(delta("hello"))
        await talk.until_client_leaves()
        left.set()

    engine.scripts.append(script)
    talks = len(engine.talks)
    yield left
    assert len(engine.talks) == talks + 1


@pytest.mark.parametrize("http2", [False, True], ids=["1.1", "2"])
@pytest.mark.parametrize("stream", [False, True], ids=["waiting", "streaming"])
def test_leaving_frees_the_slot(stack: Nginx, proxy: Proxy, engine: FakeUpstream, http2: bool, stream: bool) -> None:
    content = json.dumps({**BODY, "stream": stream}).encode()
    with endless(engine, stream) as left:
        if http2:  # the connection stays: one stream alone is taken back
            with H2(stack.connect("h2")) as client:
                number = client.request(CHAT, content)
                wait_until(lambda: in_flight(proxy) == 1, 10, "the request to be under way")
                client.reset(number)
                wait_until(lambda: in_flight(proxy) == 0, 2, "the slot to be free")
                assert client.status(client.request("/health")) == 200
        else:
            with stack.connect() as connection:
                connection.sendall(HEAD + b"Content-Length: %d\r\n\r\n%b" % (len(content), content))
                wait_until(lambda: in_flight(proxy) == 1, 10, "the request to be under way")
            wait_until(lambda: in_flight(proxy) == 0, 2, "the slot to be free")
        assert left.wait(2), "the engine still works for a client that is gone"


def test_an_engine_of_flesh_and_blood(
    llama_server: Server, start_proxy: Callable[..., Proxy], start_nginx: StartNginx
) -> None:
    """The openai SDK over TLS, through nginx and a proxy, to a real model."""
    proxy = start_proxy("--llama-cpp", llama_server.url, "--engine", "llama-server")
    proxy.wait_ready()
    nginx = ready(start_nginx(proxy.port))
    for http2 in (False, True):
        transport = openai.DefaultHttpxClient(verify=nginx.context(), http2=http2)
        with openai.OpenAI(base_url=nginx.url + "/v1", api_key="k", http_client=transport) as client:
            asked = {"model": MODEL, "messages": CAPITAL, "temperature": 0}
            whole = client.chat.completions.create(**asked)
            chunks = list(client.chat.completions.create(**asked, stream=True))
        assert "Paris" in (whole.choices[0].message.content or "")
        assert "Paris" in "".join(chunk.choices[0].delta.content or "" for chunk in chunks if chunk.choices)


def test_plain_http_is_sent_to_tls(stack: Nginx) -> None:
    plain = f"http://127.0.0.1:{stack.plain}"
    answer = httpx.post(plain + CHAT + "?x=1", json=BODY, headers={"Host": "my.example"})
    assert (answer.status_code, answer.headers["location"]) == (308, f"https://my.example{CHAT}?x=1")
    assert "strict-transport-security" not in answer.headers
    assert httpx.get(plain + "/health").json() == {"status": "ok"}
    for path in ("/metrics", "/models/status", "/route", "/ready"):
        assert httpx.get(plain + path).status_code == 308
    wrong = httpx.get(f"http://127.0.0.1:{stack.tls}/v1/models")  # plain HTTP where TLS is spoken
    assert_openai_error(wrong, 400)


def test_answers_bring_security_headers(stack: Nginx) -> None:
    with stack.client() as client:
        for answer in (client.get("/v1/models"), client.get("/metrics"), client.get("/health"), post(client)):
            headers = answer.headers
            assert headers["strict-transport-security"].startswith("max-age=")
            assert headers["x-content-type-options"] == "nosniff"
            assert headers["x-frame-options"] == "DENY"
            assert "default-src 'none'" in headers["content-security-policy"]
            assert headers["server"] == "nginx", "its version is nobody's business"
            assert len(headers.get_list("x-request-id")) <= 1


def test_only_tls_of_today(stack: Nginx) -> None:
    for version in (ssl.TLSVersion.TLSv1_2, ssl.TLSVersion.TLSv1_3):
        context = stack.context("h2", "http/1.1")
        context.minimum_version = context.maximum_version = version
        with socket.create_connection(("127.0.0.1", stack.tls)) as plain:
            assert context.wrap_socket(plain, server_hostname="localhost").selected_alpn_protocol() == "h2"
    context = stack.context()
    context.set_ciphers("ALL:@SECLEVEL=0")
    context.minimum_version = context.maximum_version = ssl.TLSVersion.TLSv1_1
    with socket.create_connection(("127.0.0.1", stack.tls)) as plain, pytest.raises((ssl.SSLError, OSError)):
        context.wrap_socket(plain, server_hostname="localhost")


# -- the log -----------------------------------------------------------------------------------------------------------


def test_every_request_is_a_line_with_its_id(stack: Nginx, engine: FakeUpstream) -> None:
    with stack.client() as client:
        given = client.post(CHAT + "?key=very-secret", json=BODY, headers={"X-Request-Id": "mine-1.2_3"})
        made = client.post(CHAT, json=BODY)
        bad = client.post(CHAT, json=BODY, headers={"X-Request-Id": 'no"id {}'})
        refused = client.get("/very%22quoted?key=very-secret", headers={"X-Request-Id": "mine-2"})
    assert given.headers["x-request-id"] == "mine-1.2_3"
    assert re.fullmatch(r"[0-9a-f]{32}", made.headers["x-request-id"])
    assert re.fullmatch(r"[0-9a-f]{32}", bad.headers["x-request-id"])
    assert refused.headers["x-request-id"] == "mine-2"
    for answer in (given, made, bad):
        line = stack.line(answer.headers["x-request-id"])
        assert (line["status"], line["method"], line["path"]) == (200, "POST", CHAT)
        assert (line["proxy_status"], line["client"], line["complete"]) == ("200", "127.0.0.1", "OK")
        assert float(line["proxy_first_byte_s"]) >= 0
        assert line["duration_s"] >= 0
    line = stack.line("mine-2")
    assert (line["status"], line["path"], line["proxy"]) == (404, "/very%22quoted", "")
    log = stack.log.read_text()
    assert "very-secret" not in log
    assert "a secret question" not in log


def test_the_error_log_repeats_no_query(start_nginx: StartNginx) -> None:
    nginx = start_nginx(free_port())
    with nginx.client() as client:
        error = assert_openai_error(client.post(CHAT + "?key=very-secret", json=BODY), 502)
        assert error["code"] == "bad_gateway"
        assert_openai_error(client.get("/v1/" + "x" * 9000 + "?key=very-secret"), 414)
    raw(nginx, HEAD + b"X-Query: very-secret\r\nContent-Length: 1\r\nContent-Length: 2\r\n\r\n")
    wait_until(lambda: [line for line in nginx.lines() if line["status"] == 400], 5, "the last line")
    assert "very-secret" not in nginx.log.read_text()


# -- proxies that come and go ------------------------------------------------------------------------------------------


@pytest.fixture
def start_proxy_on(engine: FakeUpstream, logs: Path) -> Iterator[Callable[[str, int], Server]]:
    """start_proxy_on(address, port): a ready proxy that listens there, in front of `engine`."""
    started: list[Server] = []

    def start(address: str, port: int) -> Server:
        log = logs / f"proxy-{address}-{port}-{len(started)}.log"
        env = {**NO_PROBES, **{name: value for name, value in os.environ.items() if name.startswith("COVERAGE_")}}
        command = [*servers.proxy(log).command, "--host", address, "--vllm", engine.url]
        made = Server("the proxy", command, log, "/ready", 30, env, port=port, host=address)
        started.append(made)
        return made.start().wait_ready()

    yield start
    for each in started:
        each.stop()


def test_a_proxy_that_comes_back_elsewhere_is_found(
    start_nginx: StartNginx, start_proxy_on: Callable[[str, int], Server]
) -> None:
    port = free_port()
    nginx = start_nginx(port, "127.0.0.2")  # before any proxy is there
    first = start_proxy_on("127.0.0.2", port)
    with nginx.client() as client:
        wait_until(lambda: post(client).status_code == 200, 20, "the first proxy")
        nginx.names.addresses = ["127.0.0.3"]
        first.kill9()
        start_proxy_on("127.0.0.3", port)
        wait_until(lambda: post(client).status_code == 200, 10, "the proxy on its new address")
        nginx.names.addresses = ["127.0.0.2", "127.0.0.3"]
        start_proxy_on("127.0.0.2", port)

        def both() -> bool:
            assert post(client).status_code == 200
            return {line["proxy"] for line in nginx.lines()[-40:]} >= {f"127.0.0.2:{port}", f"127.0.0.3:{port}"}

        wait_until(both, 10, "both proxies to be used")


def answered(nginx: Nginx, stop: threading.Event) -> list[int]:
    """One client that asks again and again."""
    statuses = []
    with nginx.client() as client:
        while not stop.is_set():
            statuses.append(post(client, max_tokens=1).status_code)
    return statuses


def listens(server: Server) -> bool:
    with socket.socket() as probe:
        return probe.connect_ex((server.host, server.port)) == 0


@contextmanager
def releasing(*events: threading.Event) -> Iterator[None]:
    """Whatever happens, so that nobody is waited for in vain."""
    try:
        yield
    finally:
        for event in events:
            event.set()


WAITING = 77  # the max_tokens of those that wait


@pytest.mark.parametrize("how", ["killed", "stopped", "forgotten and killed"])
def test_a_proxy_of_two_that_dies_loses_nothing_that_had_not_begun(
    start_nginx: StartNginx,
    start_proxy_on: Callable[[str, int], Server],
    engine: FakeUpstream,
    monkeypatch: pytest.MonkeyPatch,
    how: str,
) -> None:
    """Both while requests wait for their first byte and while new ones come in; whether the name server goes on naming
    it, or nginx has heard by then that it is gone."""
    port = free_port()
    proxies = [start_proxy_on(address, port) for address in ("127.0.0.2", "127.0.0.3")]
    nginx = ready(start_nginx(port, "127.0.0.2", "127.0.0.3"))
    release = threading.Event()

    async def wait_or_answer(talk: Talk) -> None:
        while talk.json["max_tokens"] == WAITING and not release.is_set():
            await sleep()
        await talk.answer(200, whole())

    monkeypatch.setattr(engine, "default", wait_or_answer)
    stop = threading.Event()
    with ThreadPoolExecutor(12) as pool, nginx.client() as client, releasing(release, stop):
        waiting = [pool.submit(post, client, max_tokens=WAITING) for _ in range(8)]
        wait_until(lambda: sum(in_flight(each) for each in proxies) == 8, 20, "8 requests to wait")
        assert 0 < in_flight(proxies[0]) < 8, "random, but of two the less busy one is taken"
        moving = [pool.submit(answered, nginx, stop) for _ in range(2)]
        if how == "stopped":
            assert proxies[0].process
            proxies[0].process.send_signal(signal.SIGTERM)
            wait_until(lambda: not listens(proxies[0]), 20, "the one that is stopped to take nobody more")
        else:
            if "forgotten" in how:
                nginx.names.addresses = ["127.0.0.3"]
                wait_until(lambda: {line["proxy"] for line in nginx.lines()[-20:]} == {f"127.0.0.3:{port}"}, 20, how)
            proxies[0].kill9()
            wait_until(lambda: in_flight(proxies[1]) >= 8, 20, "what this one had to be sent to the other")
        release.set()
        assert [each.result(30).status_code for each in waiting] == [200] * 8
        stop.set()
        assert {status for each in moving for status in each.result(30)} == {200}


@contextmanager
def unreachable(address: str, port: int) -> Iterator[None]:
    """Whoever connects to it waits, as for a container that is gone: its queue of one is full."""
    with socket.create_server((address, port), backlog=0), socket.create_connection((address, port), 20):
        yield


def is_tried(address: str, port: int) -> bool:
    """Is somebody waiting for a connection to it? https://docs.kernel.org/networking/proc_net_tcp.html"""
    remote = f"{int.from_bytes(socket.inet_aton(address), 'little'):08X}:{port:04X}"
    rows = [line.split() for line in Path("/proc/net/tcp").read_text().splitlines()]
    return any(row[2:4] == [remote, SYN_SENT] for row in rows)


SYN_SENT = "02"


def test_two_proxies_that_leave_one_after_the_other_lose_nothing(
    start_nginx: StartNginx, recorder: FakeUpstream
) -> None:
    """nginx chooses the first, which goes out of the list while it connects, and then the second, which does too."""
    first, second, port = "127.0.0.2", "127.0.0.3", recorder.port
    looks_often = {"valid=2s": "valid=1s", "proxy_connect_timeout 2s": "proxy_connect_timeout 4s"}
    with unreachable(first, port), unreachable(second, port), ThreadPoolExecutor(1) as pool:
        nginx = start_nginx(port, first, changed=looks_often)
        alone = f"http://127.0.0.1:{nginx.plain}/health"  # on port 80 nothing is sent again
        wait_until(lambda: httpx.get(alone, timeout=20).status_code == 504, 60, "nginx to know the first one's address")
        with nginx.client() as client:
            answer = pool.submit(post, client)
            for tried, next_one in ((first, second), (second, "127.0.0.1")):
                wait_until(lambda tried=tried: is_tried(tried, port), 20, f"nginx to choose {tried}")
                nginx.names.addresses = [next_one]
            assert answer.result(30).status_code == 200
    assert [talk.path for talk in recorder.talks] == [CHAT]


def test_most_of_them_gone_at_once_lose_nothing(start_nginx: StartNginx, recorder: FakeUpstream) -> None:
    """Their addresses are still named, and nobody listens there: seven of eight."""
    nginx = informed(start_nginx(recorder.port, *(f"127.0.0.{number}" for number in range(1, 9))))
    with nginx.client() as client:
        assert {post(client).status_code for _ in range(20)} == {200}
    assert len(recorder.talks) == 20


def test_a_stream_that_has_begun_is_not_sent_again(
    start_nginx: StartNginx, start_proxy_on: Callable[[str, int], Server], engine: FakeUpstream
) -> None:
    port = free_port()
    proxies = [start_proxy_on(address, port) for address in ("127.0.0.2", "127.0.0.3")]
    nginx = ready(start_nginx(port, "127.0.0.2", "127.0.0.3"))
    talks = len(engine.talks)
    with nginx.client() as client, endless(engine, stream=True) as left:

        def read_and_kill() -> None:
            with client.stream("POST", CHAT, json={**BODY, "stream": True}) as answer:
                for line in answer.iter_lines():
                    if "hello" in line:
                        next(each for each in proxies if in_flight(each)).kill9()

        with pytest.raises(httpx.TransportError):
            read_and_kill()
        assert left.wait(5)
    assert len(engine.talks) == talks + 1


def test_connections_to_the_proxy_are_kept(bare: Nginx, recorder: FakeUpstream) -> None:
    before = recorder.connections
    for _ in range(20):
        with bare.client() as client:
            assert post(client).status_code == 200
    assert recorder.connections - before <= 2, "at most one for each worker of nginx"
    assert len(recorder.talks) == 20
    assert not [talk for talk in recorder.talks if "connection" in talk.headers]


# -- the first certificate ---------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("name", "others"), [("localhost", []), ("my.example", ["DNS:my.example"]), ("10.1.2.3", ["IP Address:10.1.2.3"])]
)
def test_the_first_certificate(tmp_path: Path, name: str, others: list[str]) -> None:
    done = certificate(tmp_path / "tls", name)
    assert done.returncode == 0, done.stderr
    chain, key = tmp_path / "tls" / "fullchain.pem", tmp_path / "tls" / "privkey.pem"
    command = ["openssl", "x509", "-in", str(chain), "-noout", "-ext", "subjectAltName"]
    told = subprocess.run(command, capture_output=True, text=True, check=True).stdout
    assert all(each in told for each in ["DNS:localhost", "IP Address:127.0.0.1", *others])
    if os.getuid() == 0:
        assert (stat.S_IMODE(key.stat().st_mode), key.stat().st_uid) == (0o600, 101)
    made = chain.read_bytes(), key.read_bytes()
    assert certificate(tmp_path / "tls", name).returncode == 0
    assert (chain.read_bytes(), key.read_bytes()) == made, "a certificate that is there stays"
    key.unlink()
    assert certificate(tmp_path / "tls", name).returncode == 1, "half of one is no ground to make another"
    assert chain.read_bytes() == made[0]


@pytest.mark.parametrize("name", ["", "a b", "*.example", "x,IP:6.6.6.6", "x/CN=y"])
def test_a_name_that_is_none_makes_no_certificate(tmp_path: Path, name: str) -> None:
    done = certificate(tmp_path / "tls", name)
    assert done.returncode == (0 if name == "" else 1)  # unset and empty are the same to compose
    assert (tmp_path / "tls" / "fullchain.pem").exists() == (name == "")
