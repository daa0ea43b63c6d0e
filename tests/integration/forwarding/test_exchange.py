from __future__ import annotations

import asyncio
import gzip
import json
import re
from collections.abc import Callable
from typing import Any

import pytest

from tests.support.fake_upstream import FakeUpstream, Script, Talk, delta, good, whole
from tests.support.running_proxy import RunningProxy, backend, chat, get, text_of

Start = Callable[..., RunningProxy]


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
    "an error that says 200": raw("HTTP/1.1 200 OK\ncontent-length: 28", b'{"error":{"message":"boom"}}'),
    "an empty object": raw("HTTP/1.1 200 OK\ncontent-length: 2", b"{}"),
    "half a JSON of the right length": raw("HTTP/1.1 200 OK\ncontent-length: 30", JSON[:30]),
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


TOOLS: dict[str, Any] = {"tools": [{"type": "function", "function": {"name": "f", "parameters": {"type": "object"}}}]}
SCHEMA = {"response_format": {"type": "json_schema", "json_schema": {"name": "s", "schema": {"type": "object"}}}}


def pausing(pause_s: float, *, after_the_role: bool) -> Script:
    """A parser that holds the output back, after the role or after some text."""

    async def script(talk: Talk) -> None:
        role = delta()
        role["choices"][0]["delta"] = {"role": "assistant", "content": ""}
        await talk.start_stream()
        await talk.event(role)
        if not after_the_role:
            await talk.event(delta("hel"))
        await asyncio.sleep(pause_s)
        await talk.event(delta("lo"))
        await talk.event(delta(finish="stop"))
        await talk.end()

    return script


@pytest.mark.parametrize("after_the_role", [True, False])
@pytest.mark.parametrize("fields", [TOOLS, SCHEMA], ids=["tools", "schema"])
@pytest.mark.parametrize("dialect", ["vllm", "llama-server", "openai"])
def test_silence_of_a_parser_is_not_death(
    start: Start, gpu: FakeUpstream, dialect: str, fields: dict[str, Any], after_the_role: bool
) -> None:
    limits = {"idle_timeout_s": 0.4, "first_byte_timeout_s": 0.4, "tools": True}
    proxy = start(backends={"one": backend(gpu, dialect=dialect, **limits)}, canary_interval_s=0)
    gpu.scripts.append(pausing(1.2, after_the_role=after_the_role))
    answer = chat(proxy, stream=True, **fields)
    assert text_of(answer).endswith("lo")
    assert len(gpu.talks) == 1


def test_silence_without_tools_breaks_the_stream(start: Start, gpu: FakeUpstream) -> None:
    proxy = start(backends={"vllm": backend(gpu, idle_timeout_s=0.4)}, canary_interval_s=0)
    gpu.scripts.append(pausing(1.2, after_the_role=False))
    assert '"code":"stream_broken"' in chat(proxy, stream=True).text


def test_patience_with_tools_ends_with_the_total_limit(start: Start, gpu: FakeUpstream) -> None:
    proxy = start(backends={"vllm": backend(gpu, idle_timeout_s=60, total_timeout_s=0.5)}, canary_interval_s=0)
    gpu.scripts.append(silent_after("hel"))
    assert '"code":"stream_broken"' in chat(proxy, stream=True, **TOOLS).text


def silent_after(text: str) -> Script:
    async def script(talk: Talk) -> None:
        await talk.start_stream()
        await talk.event(delta(text))
        await talk.until_client_leaves()

    return script


def test_a_long_prompt_of_few_words_gets_time(start: Start, gpu: FakeUpstream) -> None:
    """3,000 Chinese characters are one word and some 8,000 tokens."""
    limits = {"first_byte_timeout_s": 0.4, "first_byte_per_1k_words_s": 1}
    proxy = start(backends={"vllm": backend(gpu, context=20_000, **limits)}, canary_interval_s=0)

    async def slow(talk: Talk) -> None:
        await asyncio.sleep(1.2)
        await good(talk)

    gpu.scripts.append(slow)
    answer = chat(proxy, stream=True, messages=[{"role": "user", "content": "\u4e2d" * 3000}])
    assert text_of(answer) == "hello"
    assert len(gpu.talks) == 1


def test_comments_without_end_are_no_beginning(start: Start, gpu: FakeUpstream) -> None:
    async def comments(talk: Talk) -> None:
        await talk.start_stream()
        for _ in range(40):
            await talk.chunk(b": " + b"x" * 8190 + b"\n\n")
        await talk.until_client_leaves()

    proxy = start(backends={"vllm": backend(gpu)})
    gpu.scripts.append(comments)
    answer = chat(proxy, stream=True)
    assert answer.status_code == 502
    assert "no output in the first" in answer.text
