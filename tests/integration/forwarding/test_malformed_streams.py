"""What is neither a good event nor a known error is a broken stream, on each engine, streamed and collected."""

from __future__ import annotations

import json
from collections.abc import Callable, Iterator
from typing import Any

import httpx
import pytest

from tests.support.commit_point import seen, until_seen
from tests.support.fake_upstream import FakeUpstream, Script, Talk, delta
from tests.support.running_proxy import CHAT, RunningProxy, backend, chat, running_proxy, text_of
from xgen_proxy.fleet import circuit_breaker

DIALECTS = ["vllm", "llama-server", "llama-cpp-python", "openai"]
Start = Callable[..., RunningProxy]


def with_choice(**fields: Any) -> dict[str, Any]:
    chunk = delta("x")
    chunk["choices"][0].update(fields)
    return chunk


def nested(depth: int) -> Any:
    value: Any = 1
    for _ in range(depth):
        value = [value]
    return value


BAD: dict[str, Any] = {
    "content is a number": with_choice(delta={"content": 5}),
    "content is a list": with_choice(delta={"content": [{"type": "text", "text": "x"}]}),
    "reasoning is a number": with_choice(delta={"reasoning_content": 5}),
    "delta is a number": with_choice(delta=5),
    "tool_calls is a number": with_choice(delta={"tool_calls": 5}),
    "tool_calls of numbers": with_choice(delta={"tool_calls": [5]}),
    "arguments are an object": with_choice(delta={"tool_calls": [{"index": 0, "function": {"arguments": {}}}]}),
    "function is a string": with_choice(delta={"tool_calls": [{"index": 0, "function": "f"}]}),
    "function_call is a list": with_choice(delta={"function_call": [1]}),
    "text is a number": {**delta("x"), "choices": [{"index": 0, "text": 5, "finish_reason": None}]},
    "finish_reason is a number": with_choice(finish_reason=7),
    "index is a string": with_choice(index="x"),
    "index is an object": with_choice(index={}),
    "logprobs is a string": with_choice(logprobs="x"),
    "a choice is null": {**delta("x"), "choices": [None]},
    "a choice is a number": {**delta("x"), "choices": [5]},
    "choices is an object": {**delta("x"), "choices": {"a": 1}},
    "usage is a number": {**delta("x"), "usage": 5},
    "counts are strings": {**delta("x"), "usage": {"prompt_tokens": "5", "completion_tokens": []}},
    "too deep to be written": {**delta("x"), "timings": nested(400)},
    "an array": [delta("x")],
    "a string": '"data"',
    "not JSON": "{",
    "an error line": b'error: {"code":500,"message":"m"}\n\n',
    "a chunk and an error line": b'data: %b\n\nerror: {"code":500}\n\n' % json.dumps(delta("x")).encode(),
    "an abort with a space": b'data: {"choices": [{"index": 0, "delta": {}, "finish_reason": "abort"}]}\n\n',
}


@pytest.fixture(autouse=True)
def nothing_seen() -> None:
    seen.clear()


def streamed(proxy: RunningProxy, client: httpx.Client | None = None, **fields: Any) -> str:
    """The whole stream."""
    seen.clear()
    client = client or httpx.Client(verify=False, timeout=20)
    parts = []
    body = {**CHAT, "stream": True, **fields}
    with client.stream("POST", f"{proxy.url}/v1/chat/completions", json=body) as answer:
        for part in answer.iter_text():
            parts.append(part)
            seen.set()
    return "".join(parts)


def assert_broken(stream: str) -> None:
    last = json.loads(stream.rstrip().rpartition("\ndata: ")[2])
    assert last["error"]["code"] == "stream_broken"
    assert "[DONE]" not in stream


@pytest.fixture(scope="module")
def proxy(fakes: tuple[FakeUpstream, FakeUpstream]) -> Iterator[RunningProxy]:
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(circuit_breaker, "FAILURES", 10**9)
        backends = {name: backend(fakes[0], dialect=name, context=2048, tools=True) for name in DIALECTS}
        backends["renaming"] = backend(fakes[0], models={"m": "served"})
        with running_proxy(backends=backends) as proxy:
            yield proxy


def sends(bad: Any, *, good: bool = True) -> Script:
    async def script(talk: Talk) -> None:
        if not talk.json.get("stream"):  # a question about tokens
            await talk.answer(404, {"error": {"message": "no such route"}})
            return
        await talk.start_stream()
        if good:
            await talk.event(delta("hel"))
        if "seed" in talk.json:  # the client streams
            await until_seen()
        await (talk.chunk(bad) if isinstance(bad, bytes) else talk.event(bad))
        talk.reset()

    return script


@pytest.mark.parametrize("name", [*DIALECTS, "renaming"])
@pytest.mark.parametrize("bad", BAD.values(), ids=BAD.keys())
def test_a_stream_that_is_malformed_is_broken(
    proxy: RunningProxy, fakes: tuple[FakeUpstream, FakeUpstream], name: str, bad: Any
) -> None:
    fakes[0].default = sends(bad)
    assert_broken(streamed(proxy, backend=name, fallback="none", seed=1))


@pytest.mark.parametrize("name", DIALECTS)
@pytest.mark.parametrize("bad", BAD.values(), ids=BAD.keys())
def test_a_collected_response_that_is_malformed_fails(
    proxy: RunningProxy, fakes: tuple[FakeUpstream, FakeUpstream], name: str, bad: Any
) -> None:
    fakes[0].default = sends(bad)
    answer = chat(proxy, backend=name, fallback="none")
    assert answer.status_code in (502, 503)
    assert answer.json()["error"]["code"] == "all_backends_failed"


@pytest.mark.parametrize("dialect", ["vllm", "llama-server"])
@pytest.mark.parametrize("bad", BAD.values(), ids=BAD.keys())
def test_a_resuming_stream_that_is_malformed_is_broken(dialect: str, bad: Any) -> None:
    first, second = FakeUpstream(), FakeUpstream()
    try:
        with running_proxy(
            backends={"vllm": backend(first), "cpu": backend(second, dialect=dialect, device_class="cpu")}
        ) as proxy:
            first.default = sends(b": nothing\n\n")
            second.default = sends(bad, good=False)
            assert_broken(streamed(proxy, seed=1))
    finally:
        first.close()
        second.close()


def events(*chunks: Any) -> bytes:
    return b"".join(b"data: " + json.dumps(chunk, separators=(",", ":")).encode() + b"\n\n" for chunk in chunks)


ERROR = {"error": {"message": "m", "type": "t", "code": 500}}
USAGE = {"prompt_tokens": 1, "completion_tokens": 1, "total_tokens": 2}
EDITED_TO_NOTHING = {
    "text that may begin a stop string": ("llama-cpp-python", {"stop": ["STOP"]}, events(delta("ST"), ERROR)),
    "usage that is held": ("llama-server", {"n": 2}, events({**delta(), "choices": [], "usage": USAGE}, ERROR)),
}


@pytest.mark.parametrize(("name", "fields", "last"), EDITED_TO_NOTHING.values(), ids=EDITED_TO_NOTHING.keys())
def test_an_event_edited_to_nothing_is_not_sent(
    proxy: RunningProxy, fakes: tuple[FakeUpstream, FakeUpstream], name: str, fields: dict[str, Any], last: bytes
) -> None:
    """An empty chunk would end the response, and the error would be read as the next one."""

    async def script(talk: Talk) -> None:
        await talk.start_stream()
        await talk.event(delta("Hello"))
        await until_seen()
        await talk.chunk(last)
        await talk.end(done=False)

    fakes[0].default = script
    with httpx.Client(verify=False, timeout=20) as client:
        for _ in range(2):  # the second answer on the connection shows where the first one ended
            assert_broken(streamed(proxy, client, backend=name, fallback="none", **fields))


def test_a_seam_that_is_edited_to_nothing_is_not_sent(start: Start, gpu: FakeUpstream, cpu: FakeUpstream) -> None:
    async def breaks(talk: Talk) -> None:
        await talk.start_stream()
        await talk.event(delta("Hello "))
        await until_seen()
        talk.reset()

    async def repeats_the_space(talk: Talk) -> None:
        if not talk.json.get("stream"):
            await talk.answer(404, {})
            return
        await talk.start_stream()
        await talk.chunk(events(delta(" "), ERROR))
        await talk.end(done=False)

    gpu.default, cpu.default = breaks, repeats_the_space
    proxy = start(backends={"vllm": backend(gpu), "cpu": backend(cpu, device_class="cpu")})
    assert_broken(streamed(proxy))


SAID_OTHERWISE = {
    "no space": b"data:%b\n\n",
    "CRLF": b"data: %b\r\n\r\n",
    "CR": b"data: %b\r\r",
    "other fields": b"id: 7\nevent: message\nretry: 10\ndata:%b\n: comment\n\n",
    "no value": b"data\n\ndata:\n\ndata: %b\n\n",
}


@pytest.mark.parametrize("start", [b"", b"\xef\xbb\xbf"], ids=["no BOM", "BOM"])
@pytest.mark.parametrize("form", SAID_OTHERWISE.values(), ids=SAID_OTHERWISE.keys())
def test_any_form_of_events_is_read_from_other_servers(
    proxy: RunningProxy, fakes: tuple[FakeUpstream, FakeUpstream], form: bytes, start: bytes
) -> None:
    async def script(talk: Talk) -> None:
        await talk.start_stream()
        if start:
            await talk.chunk(start)
        for event in (delta("hel"), delta("lo"), delta(finish="stop")):
            await talk.chunk(form % json.dumps(event, indent=1).replace("\n", " ").encode())
        await talk.chunk(form % b"[DONE]")
        await talk.end(done=False)

    fakes[0].default = script
    answer = chat(proxy, stream=True, backend="openai")
    assert text_of(answer) == "hello"


LATE_ERRORS = [
    {"id": "x", "error": {"message": "m", "code": 500}, "choices": [{"index": 0, "delta": {}, "finish_reason": None}]},
    {"id": "x", "choices": [{"index": 0, "delta": {}, "finish_reason": "error"}]},
    {"id": "x", "choices": [{"index": 0, "delta": {}, "finish_reason": "abort"}]},
    {"error": "overloaded"},
]


@pytest.mark.parametrize("late", LATE_ERRORS)
@pytest.mark.parametrize("spaces", [(",", ":"), (" , ", " : ")])
def test_an_error_in_any_place_is_found_in_other_servers_events(
    proxy: RunningProxy, fakes: tuple[FakeUpstream, FakeUpstream], late: Any, spaces: tuple[str, str]
) -> None:
    async def script(talk: Talk) -> None:
        await talk.start_stream()
        await talk.event(delta("hel"))
        await until_seen()
        await talk.event(json.dumps(late, separators=spaces))
        await talk.end()

    fakes[0].default = script
    assert_broken(streamed(proxy, backend="openai", fallback="none"))


REASONING = [("vllm", "reasoning"), ("llama-server", "reasoning_content"), ("openai", "reasoning_content")]


@pytest.mark.parametrize(("name", "field"), REASONING)
@pytest.mark.parametrize("stream", [True, False])
def test_reasoning_has_one_name(
    proxy: RunningProxy, fakes: tuple[FakeUpstream, FakeUpstream], name: str, field: str, stream: bool
) -> None:
    async def script(talk: Talk) -> None:
        if not talk.json.get("stream"):
            message = {"role": "assistant", "content": "hi", field: "hm"}
            await talk.answer(200, {"choices": [{"index": 0, "message": message, "finish_reason": "stop"}]})
            return
        await talk.start_stream()
        await talk.event(with_choice(delta={"role": "assistant"}))
        await talk.event(with_choice(delta={field: "hm"}))
        await talk.event(delta("hi"))
        await talk.event(delta(finish="stop"))
        await talk.end()

    fakes[0].default = script
    answer = chat(proxy, stream=stream, backend=name)
    assert '"reasoning":"hm"' in answer.text
    assert "reasoning_content" not in answer.text
