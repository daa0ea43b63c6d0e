"""What nginx passes on: streams, disconnects, TLS, and a log line for each request."""

from __future__ import annotations

import json
import re
import socket
import ssl
import threading
from collections.abc import Callable

import httpx
import openai
import pytest

from tests.e2e.nginx.conftest import StartNginx
from tests.support.fake_upstream import FakeUpstream, Talk, delta
from tests.support.http2_client import H2
from tests.support.nginx import Nginx
from tests.support.nginx_client import (
    BODY,
    CHAT,
    HEAD,
    endless_response,
    in_flight,
    post,
    send_raw,
    wait_for_event,
    wait_ready,
)
from tests.support.proxied_backend import CAPITAL, assert_openai_error
from tests.support.real_servers import MODEL, Proxy, Server, free_port
from tests.support.waiting import wait_until


@pytest.mark.parametrize("http2", [False, True], ids=["1.1", "2"])
def test_events_are_not_buffered(stack: Nginx, engine: FakeUpstream, http2: bool) -> None:
    """The engine sends an event only after the client has read the one before: a buffer on the way would stall it."""
    read = [threading.Event() for _ in range(20)]

    async def script(talk: Talk) -> None:
        await talk.start_stream()
        for number, event in enumerate(read):
            await talk.event(delta(f"word{number} "))
            await wait_for_event(event, 10)
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


@pytest.mark.parametrize("http2", [False, True], ids=["1.1", "2"])
@pytest.mark.parametrize("stream", [False, True], ids=["waiting", "streaming"])
def test_disconnects_free_the_slot(stack: Nginx, proxy: Proxy, engine: FakeUpstream, http2: bool, stream: bool) -> None:
    content = json.dumps({**BODY, "stream": stream}).encode()
    with endless_response(engine, stream) as left:
        if http2:  # only the stream is cancelled, the connection stays
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
        assert left.wait(2), "the engine still generates for a client that is gone"


def test_the_openai_sdk_reaches_a_real_engine(
    llama_server: Server, start_proxy: Callable[..., Proxy], start_nginx: StartNginx
) -> None:
    """The openai SDK over TLS, through nginx and a proxy, to a real model."""
    proxy = start_proxy("--llama-cpp", llama_server.url, "--engine", "llama-server")
    proxy.wait_ready()
    nginx = wait_ready(start_nginx(proxy.port))
    for http2 in (False, True):
        transport = openai.DefaultHttpxClient(verify=nginx.context(), http2=http2)
        with openai.OpenAI(base_url=nginx.url + "/v1", api_key="k", http_client=transport) as client:
            chats = client.chat.completions
            whole = chats.create(model=MODEL, messages=CAPITAL, temperature=0)
            chunks = list(chats.create(model=MODEL, messages=CAPITAL, temperature=0, stream=True))
        assert "Paris" in (whole.choices[0].message.content or "")
        assert "Paris" in "".join(chunk.choices[0].delta.content or "" for chunk in chunks if chunk.choices)


def test_plain_http_redirects_to_tls(stack: Nginx) -> None:
    plain = f"http://127.0.0.1:{stack.plain}"
    answer = httpx.post(plain + CHAT + "?x=1", json=BODY, headers={"Host": "my.example"})
    assert (answer.status_code, answer.headers["location"]) == (308, f"https://my.example{CHAT}?x=1")
    assert "strict-transport-security" not in answer.headers
    assert httpx.get(plain + "/health").json() == {"status": "ok"}
    for path in ("/metrics", "/models/status", "/route", "/ready"):
        assert httpx.get(plain + path).status_code == 308
    wrong = httpx.get(f"http://127.0.0.1:{stack.tls}/v1/models")  # plain HTTP where TLS is spoken
    assert_openai_error(wrong, 400)


def test_responses_have_security_headers(stack: Nginx) -> None:
    with stack.client() as client:
        for answer in (client.get("/v1/models"), client.get("/metrics"), client.get("/health"), post(client)):
            headers = answer.headers
            assert headers["strict-transport-security"].startswith("max-age=")
            assert headers["x-content-type-options"] == "nosniff"
            assert headers["x-frame-options"] == "DENY"
            assert "default-src 'none'" in headers["content-security-policy"]
            assert headers["server"] == "nginx", "the header shows nginx's version"
            assert len(headers.get_list("x-request-id")) <= 1


def test_old_tls_versions_are_rejected(stack: Nginx) -> None:
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


def test_each_request_is_logged_with_its_id(stack: Nginx, engine: FakeUpstream) -> None:
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


def test_the_error_log_contains_no_query(start_nginx: StartNginx) -> None:
    nginx = start_nginx(free_port())
    with nginx.client() as client:
        error = assert_openai_error(client.post(CHAT + "?key=very-secret", json=BODY), 502)
        assert error["code"] == "bad_gateway"
        assert_openai_error(client.get("/v1/" + "x" * 9000 + "?key=very-secret"), 414)
    send_raw(nginx, HEAD + b"X-Query: very-secret\r\nContent-Length: 1\r\nContent-Length: 2\r\n\r\n")
    wait_until(lambda: [line for line in nginx.lines() if line["status"] == 400], 5, "the last line")
    assert "very-secret" not in nginx.log.read_text()
