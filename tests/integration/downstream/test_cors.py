"""CORS on every kind of answer, from a browser's point of view."""

from __future__ import annotations

import json
import socket
from collections.abc import Iterator

import httpx
import pytest

from tests.support.fake_upstream import FakeUpstream
from tests.support.running_proxy import CHAT, RunningProxy, backend, get, post, running_proxy
from xgen_proxy.api.api_keys import hash_key
from xgen_proxy.config.settings import Settings
from xgen_proxy.downstream.cors import cors_headers

PAGE = "https://chat.example.org"
KEY = {"authorization": "Bearer sk-mine"}
ROUTES = ["/v1/chat/completions", "/v1/embeddings", "/v1/models", "/generate", "/health", "/nowhere", "//v1/models/"]


@pytest.fixture(scope="module")
def proxy(fake: FakeUpstream) -> Iterator[RunningProxy]:
    origins = f"{PAGE},http://localhost:3000"
    with running_proxy(backends={"vllm": backend(fake)}, cors_origins=origins, api_keys=[hash_key("sk-mine")]) as made:
        yield made


def preflight(url: str, origin: str) -> httpx.Response:
    headers = {
        "origin": origin,
        "access-control-request-method": "POST",
        "access-control-request-headers": "authorization,content-type,x-stainless-os",
    }
    return httpx.options(url, headers=headers, verify=False)


@pytest.mark.parametrize("route", ROUTES)
def test_preflight_needs_no_key(proxy: RunningProxy, route: str) -> None:
    answer = preflight(proxy.url + route, PAGE)
    assert (answer.status_code, answer.content) == (204, b"")
    assert answer.headers["access-control-allow-origin"] == PAGE
    assert "POST" in answer.headers["access-control-allow-methods"]
    assert answer.headers["access-control-allow-headers"] == "authorization,content-type,x-stainless-os"
    assert int(answer.headers["access-control-max-age"]) > 0


def test_preflight_of_another_page_is_not_allowed(proxy: RunningProxy) -> None:
    answer = preflight(f"{proxy.url}/v1/chat/completions", "https://evil.example.org")
    assert "access-control-allow-origin" not in answer.headers


def assert_readable(headers: httpx.Headers) -> None:
    assert headers["access-control-allow-origin"] == PAGE
    assert headers["vary"] == "Origin"
    exposed = headers["access-control-expose-headers"].lower().split(", ")
    ours = {name for name in headers if name.startswith("x-") and name != "x-accel-buffering"}
    assert ours <= set(exposed)


BODIES = {
    "whole": CHAT,
    "stream": {**CHAT, "stream": True},
    "refused": {"messages": "none"},
    "unknown model": {**CHAT, "model": "none"},
}


@pytest.mark.parametrize("body", BODIES.values(), ids=BODIES.keys())
@pytest.mark.parametrize("headers", [KEY, {}], ids=["key", "no key"])
def test_answers_can_be_read(proxy: RunningProxy, body: dict[str, object], headers: dict[str, str]) -> None:
    answer = post(f"{proxy.url}/v1/chat/completions", json=body, headers={**headers, "origin": PAGE})
    assert_readable(answer.headers)
    assert answer.headers.get_list("access-control-allow-origin") == [PAGE]


def test_every_route_can_be_read(proxy: RunningProxy) -> None:
    for path in ("/v1/models", "/health", "/nowhere", "/", "/metrics"):
        assert_readable(get(proxy.url + path, headers={**KEY, "origin": PAGE}).headers)


def test_refusals_of_the_protocol_can_be_read(proxy: RunningProxy) -> None:
    with socket.create_connection(("127.0.0.1", proxy.port), timeout=20) as client:
        head = f"POST /v1/chat/completions HTTP/1.1\r\norigin: {PAGE}\r\ntransfer-encoding: chunked\r\n\r\nno chunk\r\n"
        client.sendall(head.encode())
        data = b""
        while part := client.recv(65536):
            data += part
    assert f"access-control-allow-origin: {PAGE}\r\n".encode() in data
    assert json.loads(data.partition(b"\r\n\r\n")[2])["error"]


@pytest.mark.parametrize("origin", ["https://evil.example.org", "null", PAGE + ".evil.org", ""])
def test_other_pages_get_no_permission(proxy: RunningProxy, origin: str) -> None:
    answer = post(f"{proxy.url}/v1/chat/completions", json=CHAT, headers={**KEY, "origin": origin})
    assert answer.status_code == 200
    assert "access-control-allow-origin" not in answer.headers
    assert answer.headers["vary"] == "Origin"


def test_any_page() -> None:
    allowed = dict(cors_headers([(b"origin", b"https://a.org")], ["*"]))
    assert allowed[b"access-control-allow-origin"] == b"*"
    assert b"vary" not in allowed


def test_off_by_default(fake: FakeUpstream) -> None:
    with running_proxy(backends={"vllm": backend(fake)}) as proxy:
        url = f"{proxy.url}/v1/chat/completions"
        assert preflight(url, PAGE).status_code == 405
        for answer in (post(url, json=CHAT, headers={"origin": PAGE}), preflight(url, PAGE)):
            assert not any(name.startswith("access-control") or name == "vary" for name in answer.headers)


@pytest.mark.parametrize("origin", ["chat.example.org", "https://chat.example.org/", "https://a b", "**"])
def test_what_is_no_origin_is_refused(origin: str) -> None:
    with pytest.raises(ValueError, match="is not an origin"):
        Settings(cors_origins=origin)
