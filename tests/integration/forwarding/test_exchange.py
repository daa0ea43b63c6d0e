from __future__ import annotations

import gzip
import json
import re

import pytest

from tests.support.fake_upstream import FakeUpstream, Script, Talk, whole
from tests.support.running_proxy import RunningProxy, chat, get, text_of


def test_a_reused_connection_that_died_costs_no_attempt(proxy: RunningProxy, gpu: FakeUpstream) -> None:
    async def answer_and_close_later(talk: Talk) -> None:
        await talk.answer(200, whole())
        data = await talk.reader.read(1)  # the next request begins: close without a byte
        assert data
        talk.reset()

    gpu.scripts.append(answer_and_close_later)
    assert chat(proxy).status_code == 200
    again = chat(proxy)
    assert again.headers["x-backend"] == "vllm"
    assert again.headers["x-attempts"] == "1"
    page = get(f"{proxy.url}/metrics").text
    assert f'xgen_resent_requests_total{{backend="vllm",replica="vllm@127.0.0.1:{gpu.port}"}} 1.0' in page


def test_connections_are_reused(proxy: RunningProxy, gpu: FakeUpstream) -> None:
    for _ in range(5):
        assert text_of(chat(proxy, stream=True)) == "hello"
    [replica] = [each for each in proxy.gateway.fleet.replicas if each.backend_name == "vllm"]
    assert replica.pool.opened == 1


def test_only_our_headers_pass_in_either_direction(proxy: RunningProxy, gpu: FakeUpstream) -> None:
    async def chatty(talk: Talk) -> None:
        await talk.answer(200, whole(), "server: evil\r\nset-cookie: a=b\r\nx-internal: 1\r\n")

    gpu.scripts.append(chatty)
    given = {
        "x-conversation-id": "abc", "authorization": "Bearer secret", "x-request-id": "mine-1", "cookie": "c=d",
        "traceparent": "00-0af7651916cd43dd8448eb211c80319c-b7ad6b7169203331-01",
    }  # fmt: skip
    answer = chat(proxy, headers=given)
    assert answer.headers["x-request-id"] == "mine-1"
    assert not {"server", "set-cookie", "x-internal"} & set(answer.headers)
    sent = gpu.talks[0].headers
    assert re.fullmatch(r"mine-1-1-[0-9a-f]{8}", sent["x-request-id"])
    assert sent["accept-encoding"] == "identity"
    assert sent["traceparent"].startswith("00-0af7")
    assert not {"x-conversation-id", "authorization", "cookie"} & set(sent)


def raw(head: str, body: bytes) -> Script:
    """Sends these bytes and closes."""

    async def script(talk: Talk) -> None:
        await talk.send(head.replace("\n", "\r\n").encode() + b"\r\n\r\n" + body)
        talk.writer.close()

    return script


JSON = json.dumps(whole()).encode()
LENGTH = f"content-length: {len(JSON)}"
PAGE = b"<html>Sign in</html>"
NO_ANSWERS: dict[str, Script] = {
    "HTTP/1.0, cut": raw("HTTP/1.0 200 OK\ncontent-type: application/json", JSON[:20]),
    "HTTP/1.0 without a length": raw("HTTP/1.0 200 OK\ncontent-type: application/json", JSON),
    "HTTP/1.1 without a length": raw("HTTP/1.1 200 OK\ncontent-type: application/json", JSON[:20]),
    "shorter than its length": raw("HTTP/1.1 200 OK\ncontent-length: 1000", JSON),
    "HTML": raw(f"HTTP/1.1 200 OK\ncontent-type: text/html; charset=utf-8\ncontent-length: {len(PAGE)}", PAGE),
    "HTML that says JSON": raw(f"HTTP/1.1 200 OK\ncontent-type: application/json\ncontent-length: {len(PAGE)}", PAGE),
    "gzip": raw(
        f"HTTP/1.1 200 OK\ncontent-type: application/json\ncontent-encoding: gzip\ncontent-length: "
        f"{len(gzip.compress(JSON, mtime=0))}",
        gzip.compress(JSON, mtime=0),
    ),
    "gzip as a transfer encoding": raw("HTTP/1.1 200 OK\ntransfer-encoding: gzip", gzip.compress(JSON, mtime=0)),
    "a list": raw("HTTP/1.1 200 OK\ncontent-length: 4", b"[{}]"),
    "nothing": raw("HTTP/1.1 200 OK\ncontent-length: 0", b""),
    "no content": raw("HTTP/1.1 204 No Content", b""),
    "a redirect": raw("HTTP/1.1 302 Found\nlocation: /login\ncontent-length: 0", b""),
}


@pytest.mark.parametrize("stream", [False, True])
@pytest.mark.parametrize("script", NO_ANSWERS.values(), ids=NO_ANSWERS.keys())
def test_an_answer_that_is_none_leads_to_the_next_candidate(
    proxy: RunningProxy, gpu: FakeUpstream, script: Script, stream: bool
) -> None:
    gpu.scripts.append(script)
    answer = chat(proxy, stream=stream)
    assert (answer.status_code, answer.headers["x-backend"]) == (200, "llama_cpp")
    assert "hel" in answer.text


def test_a_whole_answer_of_http_1_0_with_a_length_is_one(proxy: RunningProxy, gpu: FakeUpstream) -> None:
    gpu.scripts.append(raw(f"HTTP/1.0 200 OK\n{LENGTH}", JSON))
    assert chat(proxy).headers["x-backend"] == "vllm"


def test_a_long_error_is_read_as_far_as_it_is_needed(proxy: RunningProxy, gpu: FakeUpstream, cpu: FakeUpstream) -> None:
    """vLLM repeats the whole request when it refuses one."""
    message = "1 validation error:\n  {'type': 'missing', 'loc': ('body', 'x'), 'msg': 'Field required', 'input': '"

    async def repeats(talk: Talk) -> None:
        await talk.answer(400, {"error": {"message": message + "y" * 3_000_000, "code": 400}})

    gpu.scripts.append(repeats)
    answer = chat(proxy)
    assert answer.status_code == 400
    assert answer.json()["error"]["message"] == "validation error: x: Field required"
    assert cpu.talks == []


def test_each_attempt_has_an_id_of_its_own(proxy: RunningProxy, gpu: FakeUpstream, cpu: FakeUpstream) -> None:
    async def busy(talk: Talk) -> None:
        await talk.answer(503, {})

    gpu.scripts += [busy, busy]
    answers = [chat(proxy, headers={"x-request-id": "same"}) for _ in range(2)]
    assert [answer.headers["x-request-id"] for answer in answers] == ["same", "same"]
    ids = [talk.headers["x-request-id"] for talk in (*gpu.talks, *cpu.talks)]
    assert len(set(ids)) == 4
    assert [each.split("-")[:2] for each in ids] == [["same", "1"]] * 2 + [["same", "2"]] * 2
