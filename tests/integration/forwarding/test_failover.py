from __future__ import annotations

import asyncio
import contextlib
import os
import threading
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from functools import partial
from typing import Any

import httpx
import pytest

from tests.support.fake_upstream import FakeUpstream, Script, Talk, good, status, whole
from tests.support.running_proxy import RunningProxy, backend, chat, get, post, text_of
from tests.support.waiting import wait_until
from xgen_proxy.own_limits import EXHAUSTED
from xgen_proxy.upstream import pool

Start = Callable[..., RunningProxy]
ERROR_500 = {"error": {"message": "EngineCore encountered an issue.", "type": "InternalServerError", "code": 500}}


async def close_at_once(talk: Talk) -> None:
    talk.reset()


async def garbage(talk: Talk) -> None:
    await talk.send(b"SSH-2.0-OpenSSH_9.6\r\n\r\n")


async def headers_then_reset(talk: Talk) -> None:
    await talk.start_stream()
    talk.reset()


async def headers_then_error(talk: Talk) -> None:
    """vLLM when overloaded: 200, then the error as an event, then [DONE]."""
    await talk.start_stream()
    await talk.event(ERROR_500)
    await talk.end()


async def half_an_event(talk: Talk) -> None:
    await talk.start_stream()
    await talk.chunk(b'data: {"id":"chatcmpl-1","cho')
    talk.reset()


async def empty_stream(talk: Talk) -> None:
    await talk.start_stream()
    await talk.end(done=False)


async def only_done(talk: Talk) -> None:
    await talk.start_stream()
    await talk.end()


BEFORE_COMMIT: dict[str, Script] = {
    "reset": close_at_once,
    "garbage": garbage,
    "500": status(500),
    "502": status(502),
    "503": status(503),
    "429": status(429),
    "401 (our key is wrong)": status(401),
    "headers, reset": headers_then_reset,
    "headers, error event": headers_then_error,
    "half an event": half_an_event,
    "empty stream": empty_stream,
    "only [DONE]": only_done,
}


@pytest.mark.parametrize("script", BEFORE_COMMIT.values(), ids=BEFORE_COMMIT.keys())
def test_the_client_does_not_see_a_failure_before_the_commit(
    proxy: RunningProxy, gpu: FakeUpstream, cpu: FakeUpstream, script: Script
) -> None:
    gpu.scripts.append(script)
    answer = chat(proxy, stream=True)
    assert answer.status_code == 200
    assert text_of(answer) == "hello"
    assert answer.headers["x-backend"] == "llama_cpp"
    assert answer.headers["x-attempts"] == "2"
    assert answer.headers["x-route-reason"].startswith("fallback: vllm")
    assert len(gpu.talks) == len(cpu.talks) == 1


async def whole_aborted(talk: Talk) -> None:
    await talk.answer(200, whole("half an ans", finish="abort"))


async def whole_cut(talk: Talk) -> None:
    await talk.send(b"HTTP/1.1 200 OK\r\ncontent-length: 1000\r\n\r\n{")
    talk.reset()


@pytest.mark.parametrize("script", [close_at_once, status(500), whole_aborted, whole_cut])
def test_a_whole_response_fails_over(proxy: RunningProxy, gpu: FakeUpstream, script: Script) -> None:
    gpu.scripts.append(script)
    answer = chat(proxy)
    assert answer.status_code == 200
    assert answer.json()["choices"][0]["message"]["content"] == "hello"
    assert answer.headers["x-backend"] == "llama_cpp"


@pytest.mark.parametrize(
    ("path", "asked"),
    [
        ("/v1/messages", {"max_tokens": 5, "messages": [{"role": "user", "content": "Hi"}]}),
        ("/v1/responses", {"input": "Hi"}),
    ],
)
def test_a_whole_response_that_cannot_be_translated_fails_over(
    proxy: RunningProxy, gpu: FakeUpstream, path: str, asked: dict[str, Any]
) -> None:
    gpu.default = status(200, {"choices": [{"message": {"tool_calls": [5]}}]})
    answer = post(proxy.url + path, json={"model": "m", **asked})
    assert (answer.status_code, answer.headers["x-backend"]) == (200, "llama_cpp")
    assert gpu.talks


def test_a_slow_first_byte_fails_over(start: Start, gpu: FakeUpstream, cpu: FakeUpstream) -> None:
    async def silent(talk: Talk) -> None:
        await talk.start_stream()
        await talk.until_client_leaves()

    backends = {"vllm": backend(gpu, first_byte_timeout_s=0.2), "llama_cpp": backend(cpu, device_class="cpu")}
    proxy = start(backends=backends)
    gpu.scripts.append(silent)
    answer = chat(proxy, stream=True)
    assert text_of(answer) == "hello"
    assert answer.headers["x-route-reason"] == f"fallback: vllm@127.0.0.1:{gpu.port} timed_out"


def test_all_targets_failing_is_502(proxy: RunningProxy, gpu: FakeUpstream, cpu: FakeUpstream) -> None:
    gpu.scripts.append(status(500))
    cpu.scripts.append(close_at_once)
    answer = chat(proxy)
    assert answer.status_code == 502
    assert answer.headers["x-should-retry"] == "false"
    assert answer.json()["error"]["code"] == "all_backends_failed"
    assert answer.headers["x-attempts"] == "2"


def test_all_targets_overloaded_is_503_with_retry_after(
    proxy: RunningProxy, gpu: FakeUpstream, cpu: FakeUpstream
) -> None:
    gpu.scripts.append(status(429))
    cpu.scripts.append(status(503))
    answer = chat(proxy)
    assert answer.status_code == 503
    assert answer.headers["x-should-retry"] == "false"
    assert "retry-after" in answer.headers


def test_a_timeout_of_the_last_target_is_504(start: Start, gpu: FakeUpstream) -> None:
    async def silent(talk: Talk) -> None:
        await talk.until_client_leaves()

    proxy = start(backends={"vllm": backend(gpu, first_byte_timeout_s=0.1)})
    gpu.scripts.append(silent)
    assert chat(proxy, stream=True).status_code == 504


def test_a_4xx_is_not_retried(proxy: RunningProxy, gpu: FakeUpstream, cpu: FakeUpstream) -> None:
    gpu.scripts.append(status(400, {"error": {"message": "top_k is wrong", "type": "BadRequestError", "code": 400}}))
    answer = chat(proxy)
    assert answer.status_code == 400
    assert answer.json()["error"]["type"] == "invalid_request_error"
    assert answer.headers["x-should-retry"] == "false"
    assert cpu.talks == []


def test_a_client_can_turn_failover_off(proxy: RunningProxy, gpu: FakeUpstream, cpu: FakeUpstream) -> None:
    gpu.scripts.append(status(500))
    answer = chat(proxy, headers={"x-fallback": "none"})
    assert answer.status_code == 502
    assert cpu.talks == []


def test_a_killed_backend_loses_no_request_and_comes_back(proxy: RunningProxy, gpu: FakeUpstream) -> None:
    assert chat(proxy).headers["x-backend"] == "vllm"
    gpu.kill()
    answer = chat(proxy)
    assert (answer.status_code, answer.headers["x-backend"]) == (200, "llama_cpp")
    gpu.start()
    wait_until(lambda: chat(proxy).headers["x-backend"] == "vllm")


def test_a_replica_with_one_slot_gets_one_request_at_a_time(start: Start, gpu: FakeUpstream) -> None:
    inside = []
    peak = []

    async def counting(talk: Talk) -> None:
        inside.append(1)
        peak.append(len(inside))
        await good(talk)
        inside.pop()

    gpu.default = counting
    proxy = start(backends={"llama": backend(gpu, dialect="openai", slots=1)})
    answers: list[int] = []
    threads = [threading.Thread(target=lambda: answers.append(chat(proxy).status_code)) for _ in range(8)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert answers == [200] * 8
    assert max(peak) <= 1


TOO_LONG = {"error": {"message": "the request exceeds the available context size", "type": "invalid_request_error"}}
LONG_PROMPT = [{"role": "user", "content": "word " * 2_400}]  # too long for the CPU by estimate, but not by half of it


@pytest.mark.parametrize(
    ("gpu_says", "expected"),
    [(good, 200), (status(503), 503), (status(500), 502), (None, 503)],
    ids=["good", "busy", "failed", "down"],
)
def test_a_prompt_that_is_too_long_for_one_backend_may_fit_another(
    start: Start, gpu: FakeUpstream, cpu: FakeUpstream, gpu_says: Script | None, expected: int
) -> None:
    """An agent that takes an outage for a long prompt drops its history for good."""
    cpu.default = status(400, TOO_LONG)
    llama = backend(cpu, dialect="llama-server", device_class="cpu", context=2_048)
    proxy = start(backends={"vllm": backend(gpu, context=65_536), "llama": llama})
    if gpu_says is None:
        gpu.kill()
        vllm = proxy.gateway.fleet.backends_by_name["vllm"]
        wait_until(lambda: not any(replica.up for replica in vllm.replicas))
    else:
        gpu.default = gpu_says
    answer = chat(proxy, messages=LONG_PROMPT, backend="llama")
    assert answer.status_code == expected, answer.text
    assert "context_length_exceeded" not in answer.text
    assert ("retry-after" in answer.headers) == (expected == 503)
    assert len([talk for talk in cpu.talks if talk.path.endswith("completions")]) == 1


@pytest.mark.parametrize(
    ("limit", "words", "code"),
    [(32_000, 100, "context_length_exceeded"), (1_000, 100, None), (1_000, 2_400, "context_length_exceeded")],
    ids=["an agent's constant", "a limit that the client means", "a long prompt"],
)
def test_vllm_does_not_tell_what_is_too_long(
    start: Start, gpu: FakeUpstream, limit: int, words: int, code: str | None
) -> None:
    """0.26 to 0.30 count a prompt no further than max_tokens leaves room."""

    async def refuses(talk: Talk) -> None:
        asked = talk.json["max_tokens"]
        said = f"you requested {asked} output tokens and your prompt contains at least {2048 - asked + 1} input tokens"
        message = f"This model's maximum context length is 2048 tokens. However, {said}, for a total of at least 2049."
        await talk.answer(400, {"error": {"message": message, "type": "BadRequestError", "param": "input_tokens"}})

    gpu.default = refuses
    proxy = start(backends={"vllm": backend(gpu, context=2_048)})
    messages = [{"role": "user", "content": "word " * words}]
    told = chat(proxy, messages=messages, max_tokens=limit).json()["error"]
    assert (told["code"], told["param"]) == (code, None if code else "max_tokens")


@pytest.mark.parametrize("fields", [{}, {"fallback": "none"}], ids=["the largest", "no fallback"])
def test_a_prompt_that_is_too_long_for_all_is_the_clients(
    start: Start, gpu: FakeUpstream, cpu: FakeUpstream, fields: dict[str, Any]
) -> None:
    gpu.default = cpu.default = status(400, TOO_LONG)
    other = 65_536 if fields else 1_024
    proxy = start(backends={"vllm": backend(gpu, context=2_048), "other": backend(cpu, context=other)})
    answer = chat(proxy, messages=LONG_PROMPT, backend="vllm", **fields)
    assert (answer.status_code, answer.json()["error"]["code"]) == (400, "context_length_exceeded")
    assert not cpu.talks


def test_a_request_whose_replica_died_waits_although_the_queue_is_full(
    start: Start, gpu: FakeUpstream, cpu: FakeUpstream
) -> None:
    """It had been admitted, and its client did nothing wrong."""
    dies, release = threading.Event(), threading.Event()
    asked: list[Talk] = []

    async def first_one_dies(talk: Talk) -> None:
        asked.append(talk)
        if len(asked) == 1:
            await asyncio.to_thread(dies.wait, 10)
            talk.reset()
        else:
            await asyncio.to_thread(release.wait, 10)
            await good(talk)

    gpu.default = cpu.default = first_one_dies
    proxy = start(backends={"vllm": backend(gpu, cpu, dialect="llama-server", slots=1)}, limits={"queue": 0})
    with ThreadPoolExecutor(2) as pool:
        answers = []
        for number in (1, 2):
            answers.append(pool.submit(chat, proxy))
            wait_until(partial(lambda count: len(asked) == count, number))
        dies.set()
        wait_until(lambda: len(proxy.gateway.admission.queue) == 1)
        release.set()
        assert [answer.result(30).status_code for answer in answers] == [200, 200]


def test_a_full_queue_is_429(start: Start, gpu: FakeUpstream) -> None:
    async def endless(talk: Talk) -> None:
        await talk.until_client_leaves()

    gpu.default = endless
    proxy = start(backends={"only": backend(gpu, dialect="openai", slots=1)}, limits={"queue": 0})

    def hold_the_slot() -> None:
        with pytest.raises(httpx.HTTPError):
            chat(proxy, timeout=3)

    thread = threading.Thread(target=hold_the_slot)
    thread.start()
    wait_until(lambda: gpu.talks)
    answer = chat(proxy)
    assert answer.status_code == 429
    assert "retry-after" in answer.headers
    thread.join()


# blame


POISON: dict[str, Any] = {"messages": [{"role": "user", "content": "poison"}]}


def poisoned(otherwise: Script) -> Script:
    """An engine that fails a poisonous body in one way and answers all else, canaries too."""

    async def script(talk: Talk) -> None:
        await (otherwise if b"poison" in talk.body else good)(talk)

    return script


async def too_large(talk: Talk) -> None:
    await talk.send(b"HTTP/1.1 200 OK\r\ncontent-type: application/json\r\ncontent-length: 70000000\r\n\r\n{")
    with contextlib.suppress(ConnectionError):
        for _ in range(70):
            await talk.send(b" " * 1_000_000)


async def error_in_the_stream(talk: Talk) -> None:
    if talk.json.get("stream"):
        await headers_then_error(talk)
    else:
        await talk.answer(500, ERROR_500)


MISFORTUNES: dict[str, tuple[Script, int]] = {
    "500": (status(500, ERROR_500), 502),
    "500 without a body": (status(500, b" "), 502),
    "501": (status(501), 503),
    "404": (status(404), 503),
    "401": (status(401), 503),
    "a 500 event": (error_in_the_stream, 502),
    "a template that refuses": (status(500, {"error": {"message": "\nError: Jinja Exception: roles"}}), 400),
    "400": (status(400), 400),
    "429": (status(429), 503),
}


@pytest.mark.parametrize("replicas", [1, 2])
@pytest.mark.parametrize(("script", "expected"), MISFORTUNES.values(), ids=MISFORTUNES.keys())
def test_one_poisonous_request_takes_no_replica_from_the_others(
    start: Start, gpu: FakeUpstream, cpu: FakeUpstream, script: Script, expected: int, replicas: int
) -> None:
    """20 poisonous requests, streamed and not, among good ones."""
    fakes = [gpu, cpu][:replicas]
    for fake in fakes:
        fake.default = poisoned(script)
    proxy = start(backends={"vllm": backend(*fakes)})
    for number in range(20):
        bad = chat(proxy, **POISON, stream=number % 2 == 0)
        assert (bad.status_code, bad.headers["x-should-retry"]) == (expected, "false")
        assert chat(proxy).status_code == 200
    for _ in range(20):
        assert chat(proxy, **POISON).status_code == expected
        assert all(replica.up for replica in proxy.gateway.fleet.replicas)
    assert chat(proxy).status_code == 200


def test_a_poisonous_request_tells_its_client_to_change_it(proxy: RunningProxy, gpu: FakeUpstream) -> None:
    gpu.scripts.append(status(500, ERROR_500))
    answer = chat(proxy, headers={"x-fallback": "none"})
    assert answer.status_code == 502
    assert "change it before you send it again" in answer.json()["error"]["message"]
    assert "retry-after" not in answer.headers


def test_one_request_that_fails_everywhere_counts_once(start: Start, gpu: FakeUpstream, cpu: FakeUpstream) -> None:
    proxy = start(backends={"vllm": backend(gpu, cpu)})
    for fail in (close_at_once, status(500)):
        gpu.scripts.append(fail)
        cpu.scripts.append(fail)
        assert chat(proxy).status_code == 502
    breakers = [replica.breaker for replica in proxy.gateway.fleet.replicas]
    assert sum(breaker.failures for breaker in breakers) == 1
    assert sum(breaker.doubts for breaker in breakers) == 1


def test_a_response_over_our_limit_is_not_asked_for_again(start: Start, gpu: FakeUpstream, cpu: FakeUpstream) -> None:
    gpu.default = cpu.default = poisoned(too_large)
    proxy = start(backends={"vllm": backend(gpu, cpu)})
    for _ in range(3):
        answer = chat(proxy, **POISON)
        assert (answer.status_code, answer.json()["error"]["code"]) == (502, "response_too_large")
        assert answer.headers["x-should-retry"] == "false"
        assert answer.headers["x-attempts"] == "1"
    assert len(gpu.talks) + len(cpu.talks) == 3
    assert all(replica.up for replica in proxy.gateway.fleet.replicas)
    assert chat(proxy).status_code == 200


@pytest.mark.parametrize("number", sorted(EXHAUSTED))
def test_a_limit_of_our_own_is_held_against_no_replica(
    proxy: RunningProxy, gpu: FakeUpstream, monkeypatch: pytest.MonkeyPatch, number: int
) -> None:
    def fail(*_: object, **__: object) -> None:
        raise OSError(number, os.strerror(number))

    with monkeypatch.context() as patch:
        patch.setattr(pool, "Connection", fail)  # as the kernel would, in the same call
        answer = chat(proxy)
    assert answer.status_code == 503
    assert answer.json()["error"]["code"] == "proxy_out_of_resources"
    assert "retry-after" in answer.headers
    assert all(replica.up for replica in proxy.gateway.fleet.replicas)
    assert chat(proxy).headers["x-backend"] == "vllm"
    assert 'outcome="out_of_resources"' in get(f"{proxy.url}/metrics").text


# what an engine was started without

NO_TOOLS = '"auto" tool choice requires --enable-auto-tool-choice and --tool-call-parser to be set'
TOOLS: dict[str, Any] = {"tools": [{"type": "function", "function": {"name": "f", "parameters": {}}}]}


def no_tools(message: str = NO_TOOLS) -> Script:
    async def script(talk: Talk) -> None:
        if "tools" in talk.json:
            await talk.answer(400, {"error": {"message": message, "type": "BadRequestError", "code": 400}})
        else:
            await good(talk)

    return script


def test_an_engine_without_a_capability_is_asked_once(
    proxy: RunningProxy, gpu: FakeUpstream, caplog: pytest.LogCaptureFixture
) -> None:
    gpu.default = no_tools()
    with caplog.at_level("WARNING", "xgen_proxy"):
        for attempts in ("2", "1", "1"):
            answer = chat(proxy, **TOOLS)
            assert (answer.status_code, answer.headers["x-backend"]) == (200, "llama_cpp")
            assert answer.headers["x-attempts"] == attempts
    assert len(gpu.talks) == 1
    [said] = [record.getMessage() for record in caplog.records if "runs without tools" in record.getMessage()]
    assert "--enable-auto-tool-choice" in said
    assert chat(proxy).headers["x-backend"] == "vllm"


def test_an_engine_that_restarts_may_have_what_it_lacked(proxy: RunningProxy, gpu: FakeUpstream) -> None:
    gpu.default = no_tools()
    assert chat(proxy, **TOOLS).headers["x-backend"] == "llama_cpp"
    gpu.default = good
    gpu.kill()
    wait_until(lambda: sum(replica.up for replica in proxy.gateway.fleet.replicas) == 1)
    gpu.start()
    proxy.until_up(2)
    assert chat(proxy, **TOOLS).headers["x-backend"] == "vllm"


def test_without_any_engine_that_can_the_client_is_told(start: Start, gpu: FakeUpstream) -> None:
    gpu.default = no_tools()
    proxy = start(backends={"vllm": backend(gpu)})
    for _ in range(2):  # by the engine, then by the plan
        answer = chat(proxy, **TOOLS)
        assert (answer.status_code, answer.json()["error"]["type"]) == (400, "invalid_request_error")
        assert "tools" in answer.json()["error"]["message"]
    assert len(gpu.talks) == 1


def only_embeds() -> Script:
    """An older llama-server with --embeddings."""
    message = "This server does not support completions. Start it without `--embeddings`"

    async def script(talk: Talk) -> None:
        if talk.path == "/v1/embeddings":
            await talk.answer(200, {"object": "list", "data": [], "model": "m"})
        else:
            await talk.answer(501, {"error": {"code": 501, "message": message, "type": "not_supported_error"}})

    return script


def test_an_engine_for_embeddings_is_asked_for_text_once(start: Start, gpu: FakeUpstream, cpu: FakeUpstream) -> None:
    gpu.default = only_embeds()
    both = {"a": backend(gpu, dialect="openai", embeddings=True), "b": backend(cpu, device_class="cpu")}
    proxy = start(backends=both)
    assert [chat(proxy).headers["x-attempts"] for _ in range(3)] == ["2", "1", "1"]
    answer = post(f"{proxy.url}/v1/completions", json={"model": "m", "prompt": "hi"})
    assert (answer.status_code, answer.headers["x-attempts"]) == (200, "1")
    answer = post(f"{proxy.url}/v1/embeddings", json={"model": "m", "input": "hi"})
    assert (answer.status_code, answer.headers["x-backend"]) == (200, "a")


def test_one_replica_without_a_capability_takes_it_from_no_other(
    start: Start, gpu: FakeUpstream, cpu: FakeUpstream
) -> None:
    gpu.default = no_tools()
    proxy = start(backends={"vllm": backend(gpu, cpu)})
    assert {chat(proxy, **TOOLS, session_id=f"s{n}").status_code for n in range(8)} == {200}
    assert cpu.talks


def test_a_confession_that_a_client_wrote_is_not_believed(proxy: RunningProxy, gpu: FakeUpstream) -> None:
    gpu.scripts.append(status(400, {"error": {"message": f"Unknown reasoning format: {NO_TOOLS}"}}))
    assert chat(proxy).status_code == 400
    gpu.scripts.append(status(400, {"error": {"message": NO_TOOLS}}))  # to a request without tools
    assert chat(proxy).headers["x-backend"] == "llama_cpp"
    assert chat(proxy, **TOOLS).headers["x-backend"] == "vllm"


@pytest.mark.parametrize("word", ["roles must alternate", "Conversation roles must alternate user/assistant/..."])
def test_a_template_that_refuses_the_roles_is_the_clients(
    proxy: RunningProxy, gpu: FakeUpstream, cpu: FakeUpstream, word: str
) -> None:
    message = f"\n------------\nWhile executing CallExpression at line 47 …\nError: Jinja Exception: {word}"
    gpu.default = poisoned(status(500, {"error": {"code": 500, "message": message, "type": "server_error"}}))
    for _ in range(4):
        answer = chat(proxy, **POISON)
        assert answer.status_code == 400
        assert answer.json()["error"]["type"] == "invalid_request_error"
        assert word in answer.json()["error"]["message"]
    assert cpu.talks == []
    assert chat(proxy).headers["x-backend"] == "vllm"
