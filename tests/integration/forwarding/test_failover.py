from __future__ import annotations

import threading
from collections.abc import Callable

import httpx
import pytest

from tests.support.fake_upstream import FakeUpstream, Script, Talk, good, status, whole
from tests.support.running_proxy import RunningProxy, backend, chat, text_of
from tests.support.waiting import wait_until

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
