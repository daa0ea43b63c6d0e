"""No log line contains any part of a prompt, an answer or a key."""

from __future__ import annotations

import json
import logging
import socket
from collections.abc import Callable, Iterator
from typing import Any

import httpx
import pytest

from tests.support.fake_upstream import FakeUpstream, Script, Talk, delta, good, status, whole
from tests.support.running_proxy import RunningProxy, backend, post, running_proxy
from tests.support.waiting import wait_until
from xgen_proxy.api.api_keys import hash_key
from xgen_proxy.forwarding.progress import Progress
from xgen_proxy.observability.logging_setup import JsonFormatter, PlainFormatter

SECRET = "SENTINEL"  # in every secret below
PROMPT, ANSWER, KEY = f"my {SECRET} prompt", f"its {SECRET} answer", f"sk-{SECRET}"
MESSAGES = [{"role": "user", "content": PROMPT}]
AUTHORIZED = {"authorization": f"Bearer {KEY}"}
CHAT = "/v1/chat/completions"


@pytest.fixture(scope="module")
def proxy(fakes: tuple[FakeUpstream, FakeUpstream]) -> Iterator[RunningProxy]:
    gpu, cpu = fakes
    backends = {
        "vllm": backend(gpu, api_key=f"{SECRET}-of-the-backend"),
        "llama_cpp": backend(cpu, dialect="llama-cpp-python", context=2048, models={"m": "m"}),
    }
    with running_proxy(backends=backends, api_keys=[hash_key(KEY)], trusted_proxies=["127.0.0.0/8"]) as running:
        yield running


@pytest.fixture(autouse=True)
def fresh(proxy: RunningProxy, fakes: tuple[FakeUpstream, FakeUpstream]) -> Iterator[None]:
    yield
    for fake in fakes:
        fake.scripts.clear()
        fake.default = good
    for replica in proxy.gateway.fleet.replicas:
        replica.breaker.close(0)
        replica.set_state("up", "test")


LogLines = Callable[[], list[dict[str, Any]]]


@pytest.fixture
def log_lines(caplog: pytest.LogCaptureFixture) -> Iterator[LogLines]:
    """The log lines of requests so far, as JSON. Fails at the end if any log line has a secret."""
    caplog.set_level(logging.INFO)

    def ours() -> list[logging.LogRecord]:
        """Leaves out the lines of the tests' own client, and uvicorn's access log, which only pytest sees."""
        others = ("httpx", "httpcore", "uvicorn.access")
        return [record for record in caplog.get_records("call") if not record.name.startswith(others)]

    def lines() -> list[dict[str, Any]]:
        found = [json.loads(JsonFormatter().format(record)) for record in ours()]
        return [line for line in found if line["message"] in ("request", "refused")]

    yield lines
    assert lines(), "there is a line for each request"
    for record in ours():
        for formatter in (JsonFormatter(), PlainFormatter()):
            assert SECRET not in formatter.format(record)


def ask(proxy: RunningProxy, path: str = CHAT, **sent: Any) -> httpx.Response:
    headers = {**AUTHORIZED, **sent.pop("headers", {})}
    return post(proxy.url + path, headers=headers, **sent)


def body(**fields: Any) -> dict[str, Any]:
    return {"model": "m", "messages": MESSAGES, **fields}


# what a client sends

TOOL = {"type": "function", "function": {"name": SECRET, "parameters": {SECRET: {"type": SECRET}}}}
SENT: dict[str, dict[str, Any]] = {
    "a chat": {"json": body()},
    "a stream": {"json": body(stream=True, stream_options={"include_usage": True})},
    "a prompt": {"path": "/v1/completions", "json": {"model": "m", "prompt": PROMPT}},
    "generate": {"path": "/generate", "json": {"prompt": PROMPT}},
    "generate, wrong": {"path": "/generate", "json": {"prompt": {SECRET: 1}, SECRET: 1}},
    "embeddings": {"path": "/v1/embeddings", "json": {"model": "m", "input": PROMPT}},
    "the dry run": {"path": "/route", "json": body(model=SECRET)},
    "a model": {"json": body(model=SECRET)},
    "a user": {"json": body(user=SECRET, metadata={SECRET: SECRET})},
    "a field": {"json": body(**{SECRET: SECRET})},
    "a type": {"json": body(temperature=SECRET)},
    "a range": {"json": body(stop=[SECRET] * 3, temperature=99)},
    "a role": {"json": {"model": "m", "messages": [{"role": SECRET, "content": PROMPT}]}},
    "a part": {"json": {"model": "m", "messages": [{"role": "user", "content": [{"type": SECRET}]}]}},
    "a tool": {"json": body(tools=[TOOL], tool_choice=SECRET)},
    "a schema": {"json": body(response_format={"type": SECRET})},
    "a hint": {"json": body(urgency=SECRET)},
    "a backend": {"json": body(backend=SECRET)},
    "a header": {"json": body(), "headers": {"x-task-type": SECRET, "x-backend": SECRET}},
    "an id": {"json": body(), "headers": {"x-request-id": f"{SECRET}!"}},
    "an address": {"json": body(), "headers": {"x-forwarded-for": SECRET}},
    "a trace": {"json": body(), "headers": {"traceparent": SECRET}},
    "no JSON": {"content": f'{{"prompt": "{PROMPT}'.encode()},
    "a media type": {"content": b"{}", "headers": {"content-type": SECRET}},
    "a path": {"path": f"/v1/{SECRET}?{SECRET}", "json": body()},
    "another key": {"json": body(), "headers": {"authorization": f"Bearer sk-{SECRET}-2"}},
    "another scheme": {"json": body(), "headers": {"authorization": f"Basic {SECRET}"}},
    "too long": {"path": "/v1/completions", "json": {"model": "m", "prompt": f"{PROMPT} " * 5000}},
}


@pytest.mark.parametrize("sent", SENT.values(), ids=SENT.keys())
def test_nothing_that_a_client_sends_is_logged(proxy: RunningProxy, log_lines: LogLines, sent: dict[str, Any]) -> None:
    answer = ask(proxy, **sent)
    wait_until(log_lines)
    if "x-request-id" not in sent.get("headers", {}) and answer.headers["content-type"] == "application/json":
        assert log_lines()[-1]["request_id"] == answer.headers["x-request-id"]


def test_input_that_is_not_http_is_not_logged(proxy: RunningProxy, log_lines: LogLines) -> None:
    with socket.create_connection(("127.0.0.1", proxy.port)) as client:
        client.sendall(f"{SECRET} {SECRET}\r\n\r\n".encode())
        assert client.recv(65536).startswith(b"HTTP/1.1 400")
    wait_until(log_lines)


# what a backend says

ERROR = {"message": PROMPT, "type": SECRET, "code": SECRET, "param": SECRET}


async def late_error(talk: Talk) -> None:
    await talk.start_stream()
    await talk.event(delta(ANSWER))
    await talk.event({"error": {**ERROR, "code": 500}})
    await talk.end(done=False)


async def late_refusal(talk: Talk) -> None:
    await talk.start_stream()
    await talk.event({"error": {**ERROR, "code": 400}})
    await talk.end(done=False)


async def reset(talk: Talk) -> None:
    await talk.start_stream()
    await talk.event(delta(ANSWER))
    talk.reset()


async def no_json(talk: Talk) -> None:
    await talk.start_stream()
    await talk.event(delta(ANSWER))
    await talk.event(f'{{"choices": {ANSWER}')
    await talk.end(done=False)


async def no_choices(talk: Talk) -> None:
    await talk.start_stream()
    await talk.event({SECRET: ANSWER})
    await talk.end(done=False)


async def strange_delta(talk: Talk) -> None:
    await talk.start_stream()
    await talk.event({**delta(), "choices": [{"index": 0, "delta": {"content": ANSWER, "x": ANSWER}}]})
    talk.reset()


async def no_http(talk: Talk) -> None:
    await talk.send(f"HTTP/9.9 {SECRET}\r\n{SECRET}\r\n\r\n".encode())
    talk.writer.close()


async def says(talk: Talk) -> None:
    if talk.json.get("stream"):
        await talk.start_stream()
        await talk.event(delta(ANSWER))
        await talk.event(delta(finish="stop"))
        await talk.end()
    else:
        await talk.answer(200, whole(ANSWER))


SAID: dict[str, Script] = {
    "an answer": says,
    **{f"status {code}": status(code, {"error": ERROR}) for code in (400, 401, 404, 418, 422, 429, 500, 503)},
    "text": status(500, PROMPT.encode()),
    "a list": status(422, {"detail": [{"loc": ["body", SECRET], "msg": PROMPT, "input": PROMPT}]}),
    "an error in the stream": late_error,
    "a refusal in the stream": late_refusal,
    "a reset": reset,
    "no JSON": no_json,
    "no choices": no_choices,
    "a strange delta": strange_delta,
    "no HTTP": no_http,
    "no answer": status(200, ANSWER.encode()),
}


@pytest.mark.parametrize("stream", [False, True], ids=["whole", "stream"])
@pytest.mark.parametrize("script", SAID.values(), ids=SAID.keys())
@pytest.mark.parametrize("first", ["vllm", "llama_cpp"])
def test_nothing_that_a_backend_sends_is_logged(
    proxy: RunningProxy,
    fakes: tuple[FakeUpstream, FakeUpstream],
    log_lines: LogLines,
    script: Script,
    stream: bool,
    first: str,
) -> None:
    for fake in fakes:
        fake.default = script
    ask(proxy, json=body(stream=stream, backend=first))
    wait_until(log_lines)


# what goes wrong here


@pytest.mark.parametrize("stream", [False, True], ids=["whole", "stream"])
def test_an_internal_error_logs_no_prompt(
    proxy: RunningProxy, log_lines: LogLines, monkeypatch: pytest.MonkeyPatch, stream: bool
) -> None:
    def fault(progress: Progress) -> list[tuple[bytes, bytes]]:
        monkeypatch.undo()
        try:
            raise KeyError(str(progress.call.body))
        except KeyError as error:
            raise ValueError(PROMPT) from error

    monkeypatch.setattr(Progress, "response_headers", fault)
    assert ask(proxy, json=body(stream=stream)).status_code == 500
    wait_until(log_lines)
    assert log_lines()[-1]["code"] == "internal_error"


def test_an_internal_error_logs_its_traceback(
    proxy: RunningProxy, log_lines: LogLines, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    def fault(progress: Progress) -> list[tuple[bytes, bytes]]:
        monkeypatch.undo()
        raise ValueError(PROMPT)

    monkeypatch.setattr(Progress, "response_headers", fault)
    assert ask(proxy, json=body()).status_code == 500
    wait_until(log_lines)
    [record] = [record for record in caplog.records if record.exc_info]
    exception = json.loads(JsonFormatter().format(record))["exception"]
    assert "in fault\n" in exception
    assert exception.endswith("ValueError")


# origin


def test_the_key_hash_and_the_client_are_logged(proxy: RunningProxy, log_lines: LogLines) -> None:
    ask(proxy, json=body(), headers={"x-forwarded-for": "192.0.2.66, 192.0.2.7, 127.0.0.9"})
    ask(proxy, json=body(model="x"), headers={"x-forwarded-for": "192.0.2.8"})
    ask(proxy, json=body(), headers={"authorization": "Bearer sk-wrong"})
    wait_until(lambda: len(log_lines()) == 3)
    known = hash_key(KEY)[:8]
    assert [(line["client"], line.get("key")) for line in log_lines()] == [
        ("192.0.2.7", known), ("192.0.2.8", known), ("127.0.0.1", None),
    ]  # fmt: skip
    assert [line["status"] for line in log_lines()] == [200, 404, 401]
    assert [line.get("code") for line in log_lines()] == [None, "model_not_found", "invalid_api_key"]
