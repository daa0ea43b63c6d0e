"""The client's side of a request on a real socket: bodies that are too large, too slow, wrong or never finished."""

from __future__ import annotations

import json
import logging
import socket
from collections.abc import Iterator
from typing import Any

import httpx
import pytest

from tests.support.fake_upstream import FakeUpstream
from tests.support.running_proxy import CHAT, RunningProxy, assert_nothing_held, backend, chat, get, post, wait_until
from xgen_proxy.config.settings import Settings

LIMIT = 4096
ROUTES = ["/v1/chat/completions", "/v1/completions", "/v1/embeddings", "/generate", "/generate/stream", "/route"]


@pytest.fixture(scope="module")
def upstream() -> Iterator[FakeUpstream]:
    fake = FakeUpstream()
    yield fake
    fake.close()


@pytest.fixture(scope="module")
def door(upstream: FakeUpstream) -> Iterator[RunningProxy]:
    limits = {"body_bytes": LIMIT, "body_timeout_s": 0.5, "json_depth": 10, "json_nodes": 1000}
    proxy = RunningProxy(Settings(backends={"vllm": backend(upstream)}, limits=limits, scrape_interval_s=0.05))
    proxy.until_up(1)
    yield proxy
    proxy.stop()
    assert_nothing_held(proxy)


@pytest.fixture(autouse=True)
def no_request_reaches_the_backend(door: RunningProxy, upstream: FakeUpstream) -> Iterator[None]:
    """And the proxy goes on as if nothing had been."""
    upstream.talks.clear()
    yield
    assert upstream.talks == []
    assert chat(door).status_code == 200
    upstream.talks.clear()


class Raw:
    """A client that says exactly what the test says."""

    def __init__(self, proxy: RunningProxy) -> None:
        self.socket = socket.create_connection(("127.0.0.1", proxy.port), timeout=10)

    def send(self, data: bytes) -> None:
        self.socket.sendall(data)

    def begin(self, path: str, headers: str) -> None:
        self.send(f"POST {path} HTTP/1.1\r\nhost: x\r\ncontent-type: application/json\r\n{headers}\r\n".encode())

    def all(self) -> tuple[int, dict[str, str], Any]:
        """Status, headers and body of all that comes until the proxy closes the connection."""
        data = b""
        while part := self.socket.recv(65536):
            data += part
        head, _, body = data.partition(b"\r\n\r\n")
        status, *lines = head.decode().split("\r\n")
        headers = {name.lower(): value.strip() for name, _, value in (line.partition(":") for line in lines)}
        return int(status.split()[1]), headers, json.loads(body)

    def __enter__(self) -> Raw:
        return self

    def __exit__(self, *error: object) -> None:
        self.socket.close()


@pytest.mark.parametrize("route", ROUTES)
def test_too_large_by_its_own_words_is_refused_before_it_is_read(door: RunningProxy, route: str) -> None:
    with Raw(door) as client:
        client.begin(route, f"content-length: {LIMIT + 1}\r\n")
        status, headers, body = client.all()
    assert (status, body["error"]["code"]) == (413, "request_too_large")
    assert str(LIMIT) in body["error"]["message"]
    assert headers["connection"] == "close"
    assert headers["x-request-id"]


@pytest.mark.parametrize("route", ROUTES)
def test_too_large_in_chunks_is_refused_when_it_is(door: RunningProxy, route: str) -> None:
    with Raw(door) as client:
        client.begin(route, "transfer-encoding: chunked\r\n")
        client.send(b"800\r\n" + b" " * 0x800 + b"\r\n")
        client.send(b"801\r\n" + b" " * 0x801 + b"\r\n")
        status, headers, body = client.all()
    assert (status, body["error"]["code"]) == (413, "request_too_large")
    assert headers["connection"] == "close"


def test_a_common_client_reads_the_413_of_a_large_body(door: RunningProxy) -> None:
    content = b'{"messages": "' + b"x" * 5_000_000 + b'"}'
    answer = post(f"{door.url}/v1/chat/completions", content=content)
    assert answer.status_code == 413


def test_exactly_the_limit_is_not_too_large(door: RunningProxy, upstream: FakeUpstream) -> None:
    body = json.dumps(CHAT).encode().ljust(LIMIT)
    assert post(f"{door.url}/v1/chat/completions", content=body).status_code == 200
    assert len(upstream.talks) == 1
    upstream.talks.clear()


@pytest.mark.parametrize("route", ROUTES)
def test_a_body_that_does_not_come_is_not_waited_for(door: RunningProxy, route: str) -> None:
    with Raw(door) as client:
        client.begin(route, "content-length: 100\r\n")
        client.send(b'{"a"')
        status, headers, body = client.all()
    assert (status, body["error"]["code"]) == (408, "request_timeout")
    assert "0.5 s" in body["error"]["message"]
    assert headers["connection"] == "close"


def test_a_body_that_drips_is_not_waited_for_either(door: RunningProxy) -> None:
    with Raw(door) as client:
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
def test_a_client_that_leaves_while_it_sends_leaves_nothing(
    door: RunningProxy, route: str, headers: str, caplog: pytest.LogCaptureFixture
) -> None:
    before = len(door.server.server_state.connections)
    with Raw(door) as client:
        client.begin(route, headers)
        client.send(b'4\r\n{"a"\r\n')
        wait_until(lambda: len(door.server.server_state.tasks) == 1)
    wait_until(lambda: not door.server.server_state.tasks)
    wait_until(lambda: len(door.server.server_state.connections) <= before)
    assert [record for record in caplog.records if record.levelno >= logging.ERROR] == []


WRONG: dict[str, tuple[bytes, str, int, str]] = {
    "empty": (b"", "application/json", 400, "empty"),
    "not JSON": (b"{", "application/json", 400, "not valid JSON"),
    "not UTF-8": (b'{"a": "\xff"}', "application/json", 400, "not valid JSON"),
    "an array": (b"[1]", "application/json", 400, "must be a JSON object, not list"),
    "null": (b"null", "application/json", 400, "must be a JSON object"),
    "NaN": (b'{"temperature": NaN}', "application/json", 400, "not valid JSON"),
    "too deep for the limit": (b'{"messages":' + b"[" * 50 + b"]" * 50 + b"}", "application/json", 400, "10 levels"),
    "too deep for any": (b"[" * 2000 + b"]" * 2000, "application/json", 400, "not valid JSON"),
    "too many": (b'{"messages":[' + b"1," * 1500 + b"1]}", "application/json", 400, "1000 values"),
    "a form": (b"a=b", "application/x-www-form-urlencoded", 415, "application/json"),
    "text": (b"{}", "text/plain", 415, "application/json"),
    "no kind": (b"{}", "", 415, "application/json"),
}


@pytest.mark.parametrize("route", ROUTES)
@pytest.mark.parametrize(("content", "kind", "status", "words"), WRONG.values(), ids=WRONG.keys())
def test_a_wrong_body(door: RunningProxy, route: str, content: bytes, kind: str, status: int, words: str) -> None:
    if route.startswith("/generate") and words in ("10 levels", "1000 values"):
        return  # takes its own fields only, and none of them is deep
    answer = post(door.url + route, content=content, headers={"content-type": kind})
    assert answer.status_code == status
    error = answer.json()["error"]
    assert words in error["message"]
    assert error["type"] == "invalid_request_error"
    assert answer.headers["x-should-retry"] == "false"
    assert answer.headers["x-request-id"]


def test_json_with_a_charset_is_json(door: RunningProxy, upstream: FakeUpstream) -> None:
    for kind in ("application/json; charset=utf-8", "Application/JSON"):
        content = json.dumps(CHAT).encode()
        answer = post(f"{door.url}/v1/chat/completions", content=content, headers={"content-type": kind})
        assert answer.status_code == 200
    upstream.talks.clear()


@pytest.mark.parametrize("given", ["a", "A.b-c_9", "x" * 128])
@pytest.mark.parametrize("route", ROUTES)
def test_a_harmless_request_id_is_kept(door: RunningProxy, route: str, given: str) -> None:
    answer = post(door.url + route, content=b"{", headers={"x-request-id": given})
    assert answer.headers["x-request-id"] == given


@pytest.mark.parametrize("given", ["", "a b", "x" * 129, "a\tb", "<script>", "é".encode().decode("latin-1")])
@pytest.mark.parametrize("route", ROUTES)
def test_any_other_is_replaced(door: RunningProxy, route: str, given: str) -> None:
    headers = [(b"x-request-id", given.encode("latin-1"))]
    ids = {post(door.url + route, content=b"{", headers=headers).headers["x-request-id"] for _ in range(2)}
    assert len(ids) == 2
    assert all(id.startswith("req-") for id in ids)


@pytest.mark.parametrize("route", ROUTES)
def test_another_method(door: RunningProxy, route: str) -> None:
    answer = get(door.url + route)
    assert (answer.status_code, answer.json()["error"]["code"]) == (405, "method_not_allowed")
    assert "POST" in answer.json()["error"]["message"]


@pytest.mark.parametrize("path", ["/", "/v1", "/v2/chat/completions", "/v1/chat/completions/", "/generate/x"])
def test_an_unknown_path(door: RunningProxy, path: str) -> None:
    for answer in (get(door.url + path), post(door.url + path, json=CHAT)):
        assert answer.status_code == 404
        assert answer.json()["error"]["type"] == "not_found_error"
        assert answer.headers["x-request-id"]


def test_many_requests_on_one_connection(door: RunningProxy, upstream: FakeUpstream) -> None:
    """Wrong ones between right ones: each answer belongs to its request."""
    with httpx.Client(base_url=door.url, verify=False) as client:
        for number in range(5):
            headers = {"x-request-id": f"id-{number}"}
            wrong = client.post("/v1/chat/completions", content=b"{", headers=headers)
            right = client.post("/v1/chat/completions", json=CHAT, headers=headers)
            assert (wrong.status_code, right.status_code) == (400, 200)
            assert wrong.headers["x-request-id"] == right.headers["x-request-id"] == f"id-{number}"
    assert [talk.headers["x-request-id"] for talk in upstream.talks] == [f"id-{number}" for number in range(5)]
    upstream.talks.clear()
