"""/generate and /generate/stream."""

from __future__ import annotations

import json
from collections.abc import Callable, Iterator
from typing import Any

import httpx
import pytest

from tests.support.fake_upstream import FakeUpstream, Script, Talk, status
from tests.support.running_proxy import RunningProxy, backend, get, post, running_proxy


def piece(text: str = "", finish: str | None = None) -> dict[str, Any]:
    choice = {"index": 0, "text": text, "logprobs": None, "finish_reason": finish}
    return {"id": "cmpl-1", "object": "text_completion", "created": 1, "model": "m", "choices": [choice]}


def completion(text: str = "hello", **fields: Any) -> dict[str, Any]:
    usage = {"prompt_tokens": 3, "completion_tokens": 5, "total_tokens": 8}
    return {**piece(text, "stop"), "usage": usage, **fields}


async def completes(talk: Talk) -> None:
    assert talk.path == "/v1/completions"
    if not talk.json["stream"]:
        await talk.answer(200, completion())
        return
    await talk.start_stream()
    for text in ("hel", "lo"):
        await talk.event(piece(text))
    await talk.event(piece(finish="stop"))
    await talk.end()


@pytest.fixture(scope="module")
def fakes() -> Iterator[tuple[FakeUpstream, FakeUpstream]]:
    gpu, cpu = FakeUpstream(default=completes), FakeUpstream(default=completes)
    yield gpu, cpu
    gpu.close()
    cpu.close()


@pytest.fixture(scope="module")
def proxy(fakes: tuple[FakeUpstream, FakeUpstream]) -> Iterator[RunningProxy]:
    gpu, cpu = fakes
    backends = {"vllm": backend(gpu), "llama_cpp": backend(cpu, device_class="cpu")}
    with running_proxy(backends=backends) as running:
        yield running


@pytest.fixture(autouse=True)
def fresh(fakes: tuple[FakeUpstream, FakeUpstream], proxy: RunningProxy) -> None:
    for fake in fakes:
        fake.talks.clear()
        fake.scripts.clear()
    for replica in proxy.gateway.fleet.replicas:
        replica.succeeded()


def generate(proxy: RunningProxy, path: str = "/generate", **fields: Any) -> httpx.Response:
    return post(proxy.url + path, json={"prompt": "Say hello", **fields})


def tokens(answer: httpx.Response) -> list[dict[str, Any]]:
    assert answer.headers["content-type"] == "text/event-stream; charset=utf-8"
    return [json.loads(line.removeprefix("data: ")) for line in answer.text.split("\n\n") if line]


def test_a_whole_answer(proxy: RunningProxy, fakes: tuple[FakeUpstream, FakeUpstream]) -> None:
    answer = generate(proxy)
    found = answer.json()
    assert answer.status_code == 200
    assert int(answer.headers["content-length"]) == len(answer.content)
    assert list(found) == ["text", "backend_used", "generation_time", "tokens_per_second"]
    assert (found["text"], found["backend_used"]) == ("hello", "vllm")
    assert 0 < found["generation_time"] < 20
    assert found["tokens_per_second"] == pytest.approx(5 / found["generation_time"], rel=0.5)
    assert answer.headers["x-backend"] == "vllm"
    sent = fakes[0].talks[0].json
    assert sent == {"prompt": "Say hello", "max_tokens": 1024, "stream": False, "model": "m"}


def test_the_backend_gets_a_completion_request(proxy: RunningProxy, fakes: tuple[FakeUpstream, FakeUpstream]) -> None:
    answer = generate(
        proxy, max_tokens=7, temperature=0.5, top_p=0.4, backend="llama_cpp", urgency="low", task_type="code_generation"
    )
    assert answer.json()["backend_used"] == "llama_cpp"
    sent = fakes[1].talks[0].json
    assert (sent["max_tokens"], sent["temperature"], sent["top_p"], sent["top_k"]) == (7, 0.5, 0.4, 20)
    assert not {"backend", "urgency", "task_type"} & set(sent)


def test_a_long_answer_goes_to_the_gpu(proxy: RunningProxy) -> None:
    answer = generate(proxy, max_tokens=1025)
    assert answer.headers["x-route-reason"].startswith("long_output")


@pytest.mark.parametrize(
    ("path", "fields"),
    [("/generate/stream", {}), ("/generate/stream", {"stream": False}), ("/generate", {"stream": True})],
)
def test_a_stream_of_tokens(proxy: RunningProxy, path: str, fields: dict[str, Any]) -> None:
    answer = generate(proxy, path, **fields)
    assert answer.status_code == 200
    assert tokens(answer) == [{"token": "hel"}, {"token": "lo"}, {"done": True}]
    assert answer.headers["x-backend"] == "vllm"


def test_failover(proxy: RunningProxy, fakes: tuple[FakeUpstream, FakeUpstream]) -> None:
    for path in ("/generate", "/generate/stream"):
        fakes[0].scripts.append(status(500))
        answer = generate(proxy, path)
        assert answer.status_code == 200
        assert answer.headers["x-backend"] == "llama_cpp"


def test_all_targets_failing_is_an_error(proxy: RunningProxy, fakes: tuple[FakeUpstream, FakeUpstream]) -> None:
    for path in ("/generate", "/generate/stream"):
        for fake in fakes:
            fake.scripts.append(status(500))
        answer = generate(proxy, path)
        assert answer.status_code == 502
        assert answer.json()["error"]["code"] == "all_backends_failed"


async def breaks(talk: Talk) -> None:
    await talk.start_stream()
    await talk.event(piece("hel"))
    talk.reset()


def test_a_broken_stream_ends_with_an_error_and_without_done(
    proxy: RunningProxy, fakes: tuple[FakeUpstream, FakeUpstream]
) -> None:
    for fake in fakes:
        fake.scripts += [breaks, breaks]
    *_, last = tokens(generate(proxy, "/generate/stream"))
    assert "error" in last


WRONG: dict[str, tuple[dict[str, Any], str]] = {
    "no prompt": ({"prompt": None}, "prompt"),
    "an empty prompt": ({"prompt": ""}, "prompt"),
    "a list": ({"prompt": ["a"]}, "prompt"),
    "no tokens": ({"max_tokens": 0}, "max_tokens"),
    "hot": ({"temperature": 2.1}, "temperature"),
    "top_p": ({"top_p": 0}, "top_p"),
    "urgency": ({"urgency": "urgent"}, "urgency"),
    "an unknown backend": ({"backend": "tpu"}, "backend"),
    "stream": ({"stream": "often"}, "stream"),
}


@pytest.mark.parametrize("path", ["/generate", "/generate/stream"])
@pytest.mark.parametrize(("fields", "param"), WRONG.values(), ids=WRONG.keys())
def test_a_wrong_request_names_the_field(proxy: RunningProxy, path: str, fields: dict[str, Any], param: str) -> None:
    answer = generate(proxy, path, **fields)
    assert answer.status_code == 400
    error = answer.json()["error"]
    assert (error["type"], error["param"]) == ("invalid_request_error", param)
    assert param in error["message"]
    assert answer.headers["x-request-id"]


@pytest.mark.parametrize("path", ["/generate", "/generate/stream"])
def test_a_rejection_by_the_backend_is_passed_on(
    proxy: RunningProxy, fakes: tuple[FakeUpstream, FakeUpstream], path: str
) -> None:
    fakes[0].scripts.append(status(400))
    answer = generate(proxy, path)
    assert (answer.status_code, answer.json()["error"]["message"]) == (400, "no 400")


def answering(body: Any) -> Script:
    async def script(talk: Talk) -> None:
        await talk.answer(200, body)

    return script


def test_without_usage_the_speed_is_null(proxy: RunningProxy, fakes: tuple[FakeUpstream, FakeUpstream]) -> None:
    fakes[0].scripts.append(answering(completion(usage=None)))
    assert generate(proxy).json()["tokens_per_second"] is None


@pytest.mark.parametrize("body", [b"<html>", b"[]", b"{}"])
def test_what_is_no_answer_at_all_leads_to_the_next_candidate(
    proxy: RunningProxy, fakes: tuple[FakeUpstream, FakeUpstream], body: bytes
) -> None:
    fakes[0].scripts.append(answering(body))
    assert generate(proxy).json()["backend_used"] == "llama_cpp"


@pytest.mark.parametrize("body", [{"choices": []}, {"choices": None}])
def test_a_malformed_answer_is_502(
    proxy: RunningProxy, fakes: tuple[FakeUpstream, FakeUpstream], body: Any, caplog: pytest.LogCaptureFixture
) -> None:
    fakes[0].scripts.append(answering(body))
    answer = generate(proxy)
    assert answer.status_code == 502
    assert answer.json()["error"]["code"] == "bad_answer"
    assert int(answer.headers["content-length"]) == len(answer.content)
    assert [record for record in caplog.records if record.levelname == "ERROR"] == []


@pytest.mark.parametrize("chunk", [{"choices": [None]}, {"choices": [{}]}, {"choices": 5}, {}, []])
def test_a_malformed_chunk_is_an_error_event(
    proxy: RunningProxy, fakes: tuple[FakeUpstream, FakeUpstream], chunk: Any, caplog: pytest.LogCaptureFixture
) -> None:
    async def script(talk: Talk) -> None:
        await talk.start_stream()
        await talk.event(piece("hel"))
        await talk.event(chunk)
        await talk.event(piece("lo", "stop"))
        await talk.end()

    for fake in fakes:
        fake.scripts += [script, script]
    answer = generate(proxy, "/generate/stream", fallback="none")
    assert '"error"' in answer.text
    assert [record for record in caplog.records if record.levelname == "ERROR"] == []


def test_a_whole_answer_collected_from_a_stream(start: Callable[..., RunningProxy], cpu: FakeUpstream) -> None:
    """llama.cpp's servers are asked for streams only."""

    async def streams(talk: Talk) -> None:
        assert talk.json["stream"] is True
        await talk.start_stream()
        await talk.event(piece("hel"))
        await talk.event(piece("lo", "stop"))
        await talk.event({**piece(), "choices": [], "usage": completion()["usage"]})
        await talk.end()

    cpu.default = streams
    proxy = start(backends={"llama_cpp": backend(cpu, dialect="llama-server")})
    found = generate(proxy).json()
    assert (found["text"], found["backend_used"]) == ("hello", "llama_cpp")
    assert found["tokens_per_second"] > 0
    assert tokens(generate(proxy, "/generate/stream"))[-1] == {"done": True}
    assert get(f"{proxy.url}/health").status_code == 200
