"""Request bodies on real connections: too large, too slow, invalid or never finished."""

from __future__ import annotations

import gzip
import json
import logging
import socket
from collections.abc import Iterator
from typing import Any

import httpx
import pytest

from tests.support.fake_upstream import FakeUpstream
from tests.support.running_proxy import (
    CHAT,
    RunningProxy,
    backend,
    chat,
    get,
    post,
    running_proxy,
    wait_until,
)

LIMIT = 4096
ROUTES = [
    "/v1/chat/completions",
    "/v1/completions",
    "/v1/embeddings",
    "/v1/responses",
    "/generate",
    "/generate/stream",
    "/route",
]


@pytest.fixture(scope="module")
def upstream() -> Iterator[FakeUpstream]:
    fake = FakeUpstream()
    yield fake
    fake.close()


@pytest.fixture(scope="module")
def proxy(upstream: FakeUpstream) -> Iterator[RunningProxy]:
    limits = {"body_bytes": LIMIT, "body_timeout_s": 0.5, "json_depth": 10, "json_nodes": 1000}
    with running_proxy(backends={"vllm": backend(upstream)}, limits=limits) as running:
        yield running


@pytest.fixture(autouse=True)
def no_request_reaches_the_backend(proxy: RunningProxy, upstream: FakeUpstream) -> Iterator[None]:
    """After each test the proxy serves the next request as usual."""
    upstream.talks.clear()
    yield
    assert upstream.talks == []
    assert chat(proxy).status_code == 200
    upstream.talks.clear()


class RawClient:
    """A client that sends exactly the bytes that the test gives it."""

    def __init__(self, proxy: RunningProxy) -> None:
        self.socket = socket.create_connection(("127.0.0.1", proxy.port), timeout=10)

    def send(self, data: bytes) -> None:
        self.socket.sendall(data)

    def begin(self, path: str, headers: str) -> None:
        self.send(f"POST {path} HTTP/1.1\r\nhost: x\r\ncontent-type: application/json\r\n{headers}\r\n".encode())

    def read_response(self) -> tuple[int, dict[str, str], Any]:
        """Status, headers and body of the response, read until the proxy closes the connection."""
        data = b""
        while part := self.socket.recv(65536):
            data += part
        head, _, body = data.partition(b"\r\n\r\n")
        status, *lines = head.decode().split("\r\n")
        headers = {name.lower(): value.strip() for name, _, value in (line.partition(":") for line in lines)}
        return int(status.split()[1]), headers, json.loads(body)

    def __enter__(self) -> RawClient:
        return self

    def __exit__(self, *error: object) -> None:
        self.socket.close()


@pytest.mark.parametrize("route", ROUTES)
def test_too_large_content_length_is_refused_before_reading(proxy: RunningProxy, route: str) -> None:
    with RawClient(proxy) as client:
        client.begin(route, f"content-length: {LIMIT + 1}\r\n")
        status, headers, body = client.read_response()
    assert (status, body["error"]["code"]) == (413, "request_too_large")
    assert str(LIMIT) in body["error"]["message"]
    assert headers["connection"] == "close"
    assert headers["x-request-id"]


@pytest.mark.parametrize("route", ROUTES)
def test_too_large_chunked_body_is_refused_at_the_limit(proxy: RunningProxy, route: str) -> None:
    with RawClient(proxy) as client:
        client.begin(route, "transfer-encoding: chunked\r\n")
        client.send(b"800\r\n" + b" " * 0x800 + b"\r\n")
        client.send(b"801\r\n" + b" " * 0x801 + b"\r\n")
        status, headers, body = client.read_response()
    assert (status, body["error"]["code"]) == (413, "request_too_large")
    assert headers["connection"] == "close"


def test_ordinary_client_can_read_the_413(proxy: RunningProxy) -> None:
    content = b'{"messages": "' + b"x" * 5_000_000 + b'"}'
    response = post(f"{proxy.url}/v1/chat/completions", content=content)
    assert response.status_code == 413


@pytest.mark.parametrize("route", ROUTES)
def test_compressed_body_is_415(proxy: RunningProxy, route: str) -> None:
    content = gzip.compress(json.dumps(CHAT).encode())
    response = post(proxy.url + route, content=content, headers={"content-encoding": "gzip"})
    assert response.status_code == 415
    error = response.json()["error"]
    assert (error["code"], "Content-Encoding: gzip" in error["message"]) == ("unsupported_media_type", True)
    assert response.headers["accept-encoding"] == "identity"


def test_body_that_does_not_fit_beside_others(proxy: RunningProxy, upstream: FakeUpstream) -> None:
    budget = proxy.gateway.bodies
    with budget.hold() as held:
        held.grow_to(budget.limit)
        response = chat(proxy)
        assert (response.status_code, response.json()["error"]["code"]) == (429, "queue_full")
        assert response.headers["retry-after"] == "1"
    assert budget.used == 0
    assert chat(proxy).status_code == 200
    assert budget.used == 0
    upstream.talks.clear()


def test_body_of_exactly_the_limit(proxy: RunningProxy, upstream: FakeUpstream) -> None:
    body = json.dumps(CHAT).encode().ljust(LIMIT)
    assert post(f"{proxy.url}/v1/chat/completions", content=body).status_code == 200
    assert len(upstream.talks) == 1
    upstream.talks.clear()


@pytest.mark.parametrize("route", ROUTES)
def test_missing_body_times_out(proxy: RunningProxy, route: str) -> None:
    with RawClient(proxy) as client:
        client.begin(route, "content-length: 100\r\n")
        client.send(b'{"a"')
        status, headers, body = client.read_response()
    assert (status, body["error"]["code"]) == (408, "request_timeout")
    assert "0.5 s" in body["error"]["message"]
    assert headers["connection"] == "close"


def test_dripping_body_times_out(proxy: RunningProxy) -> None:
    with RawClient(proxy) as client:
        client.begin("/v1/chat/completions", "content-length: 4000\r\n")
        client.socket.settimeout(0.02)
        data = b""
        for _ in range(500):
            try:
                client.send(b" ")
                data += client.socket.recv(65536)
            except TimeoutError:
                continue
            except OSError:
                break
            if data:
                break
    assert data.startswith(b"HTTP/1.1 408")


@pytest.mark.parametrize("route", ROUTES)
@pytest.mark.parametrize("headers", ["content-length: 100\r\n", "transfer-encoding: chunked\r\n"])
def test_disconnect_while_sending_leaves_nothing(
    proxy: RunningProxy, route: str, headers: str, caplog: pytest.LogCaptureFixture
) -> None:
    before = len(proxy.server.server_state.connections)
    with RawClient(proxy) as client:
        client.begin(route, headers)
        client.send(b'4\r\n{"a"\r\n')
        wait_until(lambda: len(proxy.server.server_state.tasks) == 1)
    wait_until(lambda: not proxy.server.server_state.tasks)
    wait_until(lambda: len(proxy.server.server_state.connections) <= before)
    assert [record for record in caplog.records if record.levelno >= logging.ERROR] == []


INVALID: dict[str, tuple[bytes, str, int, str]] = {
    "empty": (b"", "application/json", 400, "empty"),
    "not JSON": (b"{", "application/json", 400, "not valid JSON"),
    "not UTF-8": (b'{"a": "\xff"}', "application/json", 400, "not valid JSON"),
    "an array": (b"[1]", "application/json", 400, "must be a JSON object, not list"),
    "null": (b"null", "application/json", 400, "must be a JSON object"),
    "NaN": (b'{"temperature": NaN}', "application/json", 400, "not valid JSON"),
    "too deep for the limit": (b'{"messages":' + b"[" * 50 + b"]" * 50 + b"}", "application/json", 400, "10 levels"),
    "too many and too deep": (b"[" * 2000 + b"]" * 2000, "application/json", 400, "1000 values"),
    "too many": (b'{"messages":[' + b"1," * 1500 + b"1]}", "application/json", 400, "1000 values"),
    "a form": (b"a=b", "application/x-www-form-urlencoded", 415, "application/json"),
    "text": (b"{}", "text/plain", 415, "application/json"),
    "no kind": (b"{}", "", 415, "application/json"),
}


@pytest.mark.parametrize("route", ROUTES)
@pytest.mark.parametrize(("content", "kind", "status", "words"), INVALID.values(), ids=INVALID.keys())
def test_invalid_body(proxy: RunningProxy, route: str, content: bytes, kind: str, status: int, words: str) -> None:
    response = post(proxy.url + route, content=content, headers={"content-type": kind})
    assert response.status_code == status
    error = response.json()["error"]
    assert words in error["message"]
    assert error["type"] == "invalid_request_error"
    assert response.headers["x-should-retry"] == "false"
    assert response.headers["x-request-id"]


def test_json_with_a_charset(proxy: RunningProxy, upstream: FakeUpstream) -> None:
    for kind in ("application/json; charset=utf-8", "Application/JSON"):
        content = json.dumps(CHAT).encode()
        response = post(f"{proxy.url}/v1/chat/completions", content=content, headers={"content-type": kind})
        assert response.status_code == 200
    upstream.talks.clear()


@pytest.mark.parametrize("given", ["a", "A.b-c_9", "x" * 128])
@pytest.mark.parametrize("route", ROUTES)
def test_safe_request_id_is_kept(proxy: RunningProxy, route: str, given: str) -> None:
    response = post(proxy.url + route, content=b"{", headers={"x-request-id": given})
    assert response.headers["x-request-id"] == given


@pytest.mark.parametrize("given", ["", "a b", "x" * 129, "a\tb", "<script>", "é".encode().decode("latin-1")])
@pytest.mark.parametrize("route", ROUTES)
def test_unsafe_request_id_is_replaced(proxy: RunningProxy, route: str, given: str) -> None:
    headers = [(b"x-request-id", given.encode("latin-1"))]
    ids = {post(proxy.url + route, content=b"{", headers=headers).headers["x-request-id"] for _ in range(2)}
    assert len(ids) == 2
    assert all(id.startswith("req-") for id in ids)


@pytest.mark.parametrize("route", ROUTES)
def test_wrong_method(proxy: RunningProxy, route: str) -> None:
    response = get(proxy.url + route)
    assert (response.status_code, response.json()["error"]["code"]) == (405, "method_not_allowed")
    assert "POST" in response.json()["error"]["message"]


@pytest.mark.parametrize("path", ["/v1", "/v2/chat/completions", "/v1/assistants", "/generate/x"])
def test_unknown_path(proxy: RunningProxy, path: str) -> None:
    for response in (get(proxy.url + path), post(proxy.url + path, json=CHAT)):
        assert response.status_code == 404
        assert response.json()["error"]["type"] == "not_found_error"
        assert response.headers["x-request-id"]


def test_many_requests_on_one_connection(proxy: RunningProxy, upstream: FakeUpstream) -> None:
    """Invalid and valid requests alternate, and each response belongs to its request."""
    with httpx.Client(base_url=proxy.url, verify=False) as client:
        for number in range(5):
            headers = {"x-request-id": f"id-{number}"}
            invalid = client.post("/v1/chat/completions", content=b"{", headers=headers)
            valid = client.post("/v1/chat/completions", json=CHAT, headers=headers)
            assert (invalid.status_code, valid.status_code) == (400, 200)
            assert invalid.headers["x-request-id"] == valid.headers["x-request-id"] == f"id-{number}"
    assert [talk.headers["x-request-id"][:4] for talk in upstream.talks] == [f"id-{number}" for number in range(5)]
    upstream.talks.clear()
