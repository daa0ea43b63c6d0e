from __future__ import annotations

import json
from collections.abc import Callable

import pytest

from tests.support.fake_upstream import FakeUpstream, Talk, delta, status, whole
from tests.support.running_proxy import RunningProxy, backend, chat, text_of
from xgen_proxy.errors import StreamInterruptedError, UpstreamError
from xgen_proxy.forwarding.failover import Failover, Work

Start = Callable[..., RunningProxy]


def test_a_whole_response_passes_byte_for_byte(proxy: RunningProxy, gpu: FakeUpstream) -> None:
    body = b'{"id": "x",  "choices":[{"finish_reason":"stop"}], "usage":null}\n'

    async def answer(talk: Talk) -> None:
        await talk.answer(200, body)

    gpu.scripts.append(answer)
    assert chat(proxy).content == body


def test_a_stream_passes_byte_for_byte(proxy: RunningProxy, gpu: FakeUpstream) -> None:
    events = [b": comment\n\n", b'data: {"choices": [{"delta": {"content": "a"}, "finish_reason":null}]}\n\n']
    events.append(b'data: {"choices":[{"delta":{},"finish_reason":"stop"}]}\n\n')

    async def stream(talk: Talk) -> None:
        await talk.start_stream()
        for event in events:
            await talk.chunk(event)
        await talk.end()

    gpu.scripts.append(stream)
    assert chat(proxy, stream=True).content == b"".join(events) + b"data: [DONE]\n\n"


def test_a_stream_is_collected_for_a_client_that_wants_it_whole(start: Start, gpu: FakeUpstream) -> None:
    proxy = start(backends={"llama_cpp": backend(gpu, dialect="llama-server")})
    answer = chat(proxy)
    assert gpu.talks[-1].json["stream"] is True
    assert answer.headers["content-type"] == "application/json"
    assert answer.json()["choices"][0]["message"]["content"] == "hello"


def test_a_whole_response_becomes_events_for_a_client_that_wants_a_stream(start: Start, gpu: FakeUpstream) -> None:
    proxy = start(backends={"llama_cpp": backend(gpu, dialect="llama-cpp-python", context=2048)})

    async def answer(talk: Talk) -> None:
        assert talk.json["stream"] is False
        await talk.answer(200, whole())

    gpu.scripts.append(answer)
    response = chat(proxy, stream=True, logprobs=True)
    assert response.headers["content-type"].startswith("text/event-stream")
    assert text_of(response) == "hello"


def test_a_late_rejection_is_the_last_event(proxy: RunningProxy, gpu: FakeUpstream, cpu: FakeUpstream) -> None:
    async def reject(talk: Talk) -> None:
        await talk.start_stream()
        await talk.event(delta("hel"))
        await talk.event({"error": {"message": "maximum context length", "type": "t", "code": 400}})
        await talk.end()

    gpu.scripts.append(reject)
    answer = chat(proxy, stream=True)
    last = answer.text.rstrip().rpartition("data: ")[2]
    assert json.loads(last)["error"]["code"] == "context_length_exceeded"
    assert cpu.talks == []


@pytest.mark.parametrize("sent", [False, True], ids=["before the commit", "after the commit"])
def test_only_a_failure_after_the_commit_interrupts_the_stream(
    proxy: RunningProxy, gpu: FakeUpstream, monkeypatch: pytest.MonkeyPatch, sent: bool
) -> None:
    raised: list[type[Exception]] = []
    run = Failover.run

    async def recording(self: Failover, work: Work) -> None:
        async def recorded(*arguments: object) -> None:
            try:
                await work(*arguments)  # type: ignore[arg-type]
            except (UpstreamError, StreamInterruptedError) as error:
                raised.append(type(error))
                raise

        await run(self, recorded)

    async def breaks(talk: Talk) -> None:
        await talk.start_stream()
        if sent:
            await talk.event(delta("hel"))
        talk.reset()

    monkeypatch.setattr(Failover, "run", recording)
    gpu.scripts.append(breaks)
    assert chat(proxy, stream=True).status_code == 200
    assert len(raised) == 1
    assert (raised[0] is StreamInterruptedError) == sent


def test_a_failed_request_names_the_failures(proxy: RunningProxy, gpu: FakeUpstream, cpu: FakeUpstream) -> None:
    gpu.scripts.append(status(500))
    cpu.scripts.append(status(502))
    message = chat(proxy).json()["error"]["message"]
    assert f"vllm@127.0.0.1:{gpu.port}: says 500" in message
    assert f"llama_cpp@127.0.0.1:{cpu.port}: says 502" in message
