from __future__ import annotations

import asyncio
import json
from collections.abc import Callable
from typing import Any

import pytest

from tests.support.fake_upstream import FakeUpstream, Talk, delta, good, status
from tests.support.running_proxy import RunningProxy, backend, chat, text_of

Start = Callable[..., RunningProxy]
KEEPALIVE_S = 0.1
TOOLS = {"tools": [{"type": "function", "function": {"name": "f", "parameters": {}}}]}


@pytest.fixture
def proxy(start: Start, gpu: FakeUpstream, cpu: FakeUpstream) -> RunningProxy:
    backends = {"vllm": backend(gpu), "llama_cpp": backend(cpu, device_class="cpu", dialect="vllm")}
    return start(backends=backends, sse_keepalive_s=KEEPALIVE_S)


async def slow(talk: Talk) -> None:
    await asyncio.sleep(6 * KEEPALIVE_S)
    await good(talk)


async def pausing(talk: Talk) -> None:
    await talk.start_stream()
    await talk.event(delta("hel"))
    await asyncio.sleep(6 * KEEPALIVE_S)
    await talk.event(delta("lo"))
    await talk.event(delta(finish="stop"))
    await talk.end()


@pytest.mark.parametrize("fields", [{}, TOOLS], ids=["resumable", "not resumable"])
def test_a_stream_that_waits_for_its_first_output_gets_comments(
    proxy: RunningProxy, gpu: FakeUpstream, fields: dict[str, Any]
) -> None:
    gpu.scripts.append(slow)
    answer = chat(proxy, stream=True, **fields)
    assert answer.text.startswith(": waiting\n\n")
    assert answer.headers["x-request-id"]
    assert "x-replica" not in answer.headers
    assert f": from vllm@127.0.0.1:{gpu.port}; " in answer.text
    assert text_of(answer) == "hello"


@pytest.mark.parametrize("fields", [{}, TOOLS], ids=["resumable", "not resumable"])
def test_silence_between_two_events_gets_comments(
    proxy: RunningProxy, gpu: FakeUpstream, fields: dict[str, Any]
) -> None:
    gpu.scripts.append(pausing)
    answer = chat(proxy, stream=True, **fields)
    assert answer.headers["x-replica"]
    assert ": waiting" in answer.text.partition("hel")[2].partition('"lo"')[0]
    assert text_of(answer) == "hello"


def test_failover_goes_on_until_the_first_output(proxy: RunningProxy, gpu: FakeUpstream, cpu: FakeUpstream) -> None:
    async def breaks(talk: Talk) -> None:
        await asyncio.sleep(4 * KEEPALIVE_S)
        talk.reset()

    gpu.scripts.append(breaks)
    answer = chat(proxy, stream=True)
    assert text_of(answer) == "hello"
    assert f": from llama_cpp@127.0.0.1:{cpu.port}; fallback" in answer.text


def test_an_error_after_a_comment_is_the_last_event(start: Start, gpu: FakeUpstream) -> None:
    async def fails(talk: Talk) -> None:
        await asyncio.sleep(4 * KEEPALIVE_S)
        await status(400)(talk)

    gpu.scripts.append(fails)
    proxy = start(backends={"vllm": backend(gpu)}, sse_keepalive_s=KEEPALIVE_S)
    answer = chat(proxy, stream=True)
    assert answer.status_code == 200
    assert json.loads(answer.text.rstrip().rpartition("\ndata: ")[2])["error"]["message"] == "no 400"
    assert "[DONE]" not in answer.text


def test_nothing_is_added_to_a_whole_response_or_a_quick_stream(proxy: RunningProxy, gpu: FakeUpstream) -> None:
    gpu.scripts.append(slow)
    assert chat(proxy).json()["choices"]
    assert "waiting" not in chat(proxy, stream=True).text


def test_it_is_off_by_default(start: Start, gpu: FakeUpstream) -> None:
    gpu.scripts.append(slow)
    assert "waiting" not in chat(start(backends={"vllm": backend(gpu)}), stream=True).text
