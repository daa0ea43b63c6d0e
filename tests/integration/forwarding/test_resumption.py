"""A broken stream is resumed from its next character: nothing is lost or repeated, and it is one response."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import httpx
import pytest

from tests.support.commit_point import seen, until_seen
from tests.support.counting_upstream import (
    PROMPT_TOKENS,
    TEMPLATE,
    Chunks,
    chunked,
    counter,
    dying,
    events_of,
    numbers,
    size_of_answer,
)
from tests.support.fake_upstream import FakeUpstream, Script, Talk, delta, status
from tests.support.running_proxy import CHAT, RunningProxy, backend, get
from xgen_proxy.config.fallback import FORMAT
from xgen_proxy.fleet import circuit_breaker
from xgen_proxy.forwarding import resumption

Start = Callable[..., RunningProxy]
LAST = 6
TEXT = {"model": "m", "prompt": "count <assistant>", "max_tokens": 50}
EACH_DIALECT = ["vllm", "llama-server", "llama-cpp-python"]


@pytest.fixture(autouse=True)
def nothing_seen() -> None:
    seen.clear()


@pytest.fixture(autouse=True)
def never_opens(monkeypatch: pytest.MonkeyPatch) -> None:
    """Each of these tests breaks the same replica many times."""
    monkeypatch.setattr(circuit_breaker, "FAILURES", 10**9)


@pytest.fixture
def template(tmp_path: Path) -> Path:
    path = tmp_path / "tokenizer_config.json"
    path.write_text(json.dumps(TEMPLATE))
    return path


@pytest.fixture
def pair(start: Start, gpu: FakeUpstream, cpu: FakeUpstream, template: Path) -> Callable[[str], RunningProxy]:
    """pair(dialect of the CPU): a vLLM that breaks, and the backend that resumes."""

    def make(dialect: str, **values: Any) -> RunningProxy:
        extra = {"chat_template": template} if dialect == "llama-cpp-python" else {}
        backends = {
            "vllm": backend(gpu, **values),
            "llama_cpp": backend(cpu, dialect=dialect, device_class="cpu", slots=8, **extra),
        }
        return start(backends=backends)

    return make


def read(answer: httpx.Response) -> tuple[str, dict[str, Any] | None]:
    """(text, usage) of a stream, which must look as if it had never broken."""
    assert answer.status_code == 200, answer.text
    events = [line[6:] for line in answer.text.splitlines() if line.startswith("data: ")]
    assert events[-1] == "[DONE]", answer.text
    assert events.count("[DONE]") == 1
    chunks = [json.loads(event) for event in events[:-1]]
    assert not any("error" in chunk for chunk in chunks), answer.text
    assert len({(chunk["id"], chunk["created"], chunk["model"], chunk["object"]) for chunk in chunks}) == 1
    choices = [chunk["choices"][0] for chunk in chunks if chunk["choices"]]
    finishes = [choice["finish_reason"] for choice in choices if choice["finish_reason"]]
    assert len(finishes) == 1, answer.text
    assert choices[-1]["finish_reason"], "something came after the end"
    if "delta" in choices[0]:
        assert sum("role" in choice["delta"] for choice in choices) == 1
        text = "".join(choice["delta"].get("content") or "" for choice in choices)
    else:
        text = "".join(choice["text"] for choice in choices)
    usages = [chunk["usage"] for chunk in chunks if chunk.get("usage")]
    assert len(usages) <= 1
    return text, usages[0] if usages else None


def stream(proxy: RunningProxy, path: str = "/v1/chat/completions", **fields: Any) -> httpx.Response:
    headers = fields.pop("headers", {})
    body = {**(CHAT if "chat" in path else TEXT), "stream": True, **fields}
    with httpx.stream("POST", proxy.url + path, json=body, headers=headers, timeout=20) as answer:
        parts = []
        for part in answer.iter_bytes():
            parts.append(part)
            seen.set()
        answer._content = b"".join(parts)
        return answer


def count(last: int = LAST, before: bool = True) -> str:
    return "".join(numbers(1, last, before))


def size(proxy_body: dict[str, Any], path: str, before: bool) -> int:
    talk = Talk(path, {}, json.dumps(proxy_body).encode(), None, None)  # type: ignore[arg-type]
    return size_of_answer(talk, LAST, before)


@pytest.mark.parametrize("before", [True, False], ids=["space before", "space after"])
@pytest.mark.parametrize("path", ["/v1/chat/completions", "/v1/completions"])
def test_a_break_at_every_byte_is_invisible(
    pair: Callable[..., RunningProxy], gpu: FakeUpstream, cpu: FakeUpstream, path: str, before: bool
) -> None:
    """Before and in the headers, between and within events, after the last token, before [DONE]."""
    proxy = pair("llama-server")
    cpu.default = counter(LAST, before=before)
    options = {"stream_options": {"include_usage": True}}
    whole = size({**(CHAT if "chat" in path else TEXT), **options}, path, before)
    with httpx.Client(verify=False, timeout=20) as client:
        for cut in range(whole):
            gpu.scripts.append(dying(LAST, cut, before=before))
            body = {**(CHAT if "chat" in path else TEXT), "stream": True, **options}
            while gpu.scripts:  # on a busy machine the GPU may miss a health check, and be passed over
                text, usage = read(client.post(proxy.url + path, json=body))
            assert text == count(before=before), f"cut after {cut} bytes"
            assert usage is not None, f"cut after {cut} bytes"
            assert usage["prompt_tokens"] == PROMPT_TOKENS
            assert usage["completion_tokens"] == LAST
            assert usage["total_tokens"] == PROMPT_TOKENS + LAST
    assert len(gpu.talks) >= whole


def cut_after(tokens: int, then: Script, last: int = LAST) -> Script:
    """Sends the first tokens of the count and then runs `then`."""

    async def script(talk: Talk) -> None:
        events = events_of(talk, last, True, "gpu")
        start = 1 if "chat" in talk.path else 0
        await talk.start_stream()
        for event in events[: start + tokens]:
            await talk.chunk(event)
        if tokens:
            await until_seen()
        await then(talk)

    return script


async def reset(talk: Talk) -> None:
    talk.reset()


async def ends_early(talk: Talk) -> None:
    await talk.end(done=False)


async def done_without_finish(talk: Talk) -> None:
    await talk.end()


async def error_event(talk: Talk) -> None:
    """vLLM when its engine dies: an error, [DONE], a clean end."""
    await talk.event({"error": {"message": "EngineCore encountered an issue.", "type": "T", "code": 500}})
    await talk.end()


async def abort(talk: Talk) -> None:
    await talk.chunk(Chunks(talk.path, talk.json, "gpu").event(finish="abort"))
    await talk.end()


async def stall(talk: Talk) -> None:
    await talk.until_client_leaves()


async def half_an_event(talk: Talk) -> None:
    await talk.send(chunked(b'data: {"id":"chatcmpl-gpu","choices":[{"index":0,"delta":{"content":" 4'))
    talk.reset()


@pytest.mark.parametrize("then", [reset, ends_early, done_without_finish, error_event, abort, stall, half_an_event])
@pytest.mark.parametrize("dialect", EACH_DIALECT)
@pytest.mark.parametrize("path", ["/v1/chat/completions", "/v1/completions"])
def test_each_kind_of_break_is_resumed_on_each_engine(
    pair: Callable[..., RunningProxy], gpu: FakeUpstream, cpu: FakeUpstream, path: str, dialect: str, then: Script
) -> None:
    proxy = pair(dialect, idle_timeout_s=0.2)
    cpu.default = counter(LAST)
    gpu.scripts.append(cut_after(3, then))
    answer = stream(proxy, path, stream_options={"include_usage": True})
    text, usage = read(answer)
    assert text == count()
    assert usage is not None
    assert usage["completion_tokens"] == LAST
    assert f": resumed on llama_cpp@127.0.0.1:{cpu.port}; fallback: vllm@" in answer.text
    assert len([talk for talk in cpu.talks if "tokenize" not in talk.path]) == 1


def test_a_resumed_stream_that_breaks_is_resumed_again(start: Start, gpu: FakeUpstream, cpu: FakeUpstream) -> None:
    third = FakeUpstream(default=counter(LAST))
    try:
        backends = {"vllm": backend(gpu, cpu), "llama_cpp": backend(third, dialect="llama-server", device_class="cpu")}
        proxy = start(backends=backends)

        async def two_more(talk: Talk) -> None:
            if "tokenize" in talk.path:
                await counter(LAST)(talk)
                return
            await cut_after(2, reset)(talk)

        gpu.default = cpu.default = two_more
        answer = stream(proxy)
        assert read(answer)[0] == count()
        assert answer.text.count(": resumed on") == 2
    finally:
        third.close()


def test_a_failed_resumption_ends_with_one_error_event(
    pair: Callable[..., RunningProxy], gpu: FakeUpstream, cpu: FakeUpstream
) -> None:
    proxy = pair("llama-server")
    cpu.default = status(500)
    gpu.scripts.append(cut_after(3, reset))
    answer = stream(proxy)
    assert "[DONE]" not in answer.text
    error = json.loads(answer.text.rstrip().rpartition("data: ")[2])["error"]
    assert error["code"] == "stream_broken"
    assert "could not be resumed elsewhere" in error["message"]


@pytest.mark.parametrize(
    ("spent", "limit"), [(3, 4), (3, 3), (LAST, LAST), (1, 1)], ids=["one left", "none left", "all", "the first"]
)
@pytest.mark.parametrize("usage", [True, False])
def test_max_tokens_holds_for_the_whole_answer(
    pair: Callable[..., RunningProxy], gpu: FakeUpstream, cpu: FakeUpstream, spent: int, limit: int, usage: bool
) -> None:
    proxy = pair("llama-server")
    cpu.default = counter(LAST + 5)
    gpu.scripts.append(cut_after(spent, reset))
    answer = stream(proxy, max_tokens=limit, stream_options={"include_usage": usage})
    text, reported = read(answer)
    assert text == count(limit)
    assert '"finish_reason":"length"' in answer.text
    assert (reported is not None) == usage
    if reported:
        assert (reported["prompt_tokens"], reported["completion_tokens"]) == (PROMPT_TOKENS, limit)


@pytest.mark.parametrize("fields", [{}, {"logprobs": True}, {"continuation": "none"}], ids=str)
def test_a_complete_answer_whose_usage_cannot_be_counted_ends_normally(
    pair: Callable[..., RunningProxy], gpu: FakeUpstream, cpu: FakeUpstream, fields: dict[str, Any]
) -> None:
    """An error would make the client discard a complete answer."""
    proxy = pair("llama-server")
    cpu.default = status(500)

    async def script(talk: Talk) -> None:
        await talk.start_stream()
        for event in events_of(talk, LAST, True, "gpu")[:-2]:
            await talk.chunk(event)
        await until_seen()
        talk.reset()

    gpu.scripts.append(script)
    answer = stream(proxy, stream_options={"include_usage": True}, **fields)
    assert read(answer) == (count(), None)
    assert ": no usage: " in answer.text


def test_an_answer_as_long_as_it_may_be_needs_no_usage_to_end_normally(
    pair: Callable[[str], RunningProxy], gpu: FakeUpstream, cpu: FakeUpstream
) -> None:
    proxy = pair("llama-server")

    async def only_counts(talk: Talk) -> None:
        await (counter(LAST) if "tokenize" in talk.path else status(500))(talk)

    cpu.default = only_counts
    gpu.scripts.append(cut_after(3, reset))
    answer = stream(proxy, max_tokens=3, stream_options={"include_usage": True})
    assert read(answer) == (count(3), None)
    assert '"finish_reason":"length"' in answer.text
    assert ": no usage: " in answer.text


TOOL = {"type": "function", "function": {"name": "f", "parameters": {"type": "object"}}}
FINAL: dict[str, dict[str, Any]] = {
    "n": {"n": 2},
    "logprobs": {"logprobs": True},
    "opt-out in the body": {"continuation": "none"},
    "opt-out by header": {"headers": {"x-continuation": "none"}},
    "the client's prefill": {"messages": [*CHAT["messages"], {"role": "assistant", "content": "0"}]},
    "the client's flags": {"continue_final_message": False},
}


@pytest.mark.parametrize("fields", FINAL.values(), ids=FINAL.keys())
def test_a_stream_that_cannot_be_resumed_ends_with_an_error(
    pair: Callable[..., RunningProxy], gpu: FakeUpstream, cpu: FakeUpstream, fields: dict[str, Any]
) -> None:
    proxy = pair("vllm")

    async def script(talk: Talk) -> None:
        await talk.start_stream()
        await talk.event(delta("hel"))
        await until_seen()
        talk.reset()

    gpu.scripts.append(script)
    answer = stream(proxy, **fields)
    assert "[DONE]" not in answer.text
    assert json.loads(answer.text.rstrip().rpartition("data: ")[2])["error"]["code"] == "stream_broken"
    assert cpu.talks == []


@pytest.mark.parametrize("dialect", EACH_DIALECT)
def test_an_answer_that_went_on_after_the_clients_words_is_resumed(
    pair: Callable[..., RunningProxy], gpu: FakeUpstream, cpu: FakeUpstream, dialect: str
) -> None:
    proxy = pair(dialect)
    cpu.default = counter(LAST)
    gpu.scripts.append(cut_after(2, reset))
    messages = [*CHAT["messages"], {"role": "assistant", "content": " 1 2"}]
    flags: dict[str, Any] = {"continue_final_message": True, "add_generation_prompt": False}
    answer = stream(proxy, messages=messages, stream_options={"include_usage": True}, **flags)
    text, usage = read(answer)
    assert text == "".join(numbers(3, LAST, True))
    assert usage is not None
    assert usage["completion_tokens"] == LAST - 2
    assert ": resumed on llama_cpp@" in answer.text


def test_resumption_can_be_switched_off(start: Start, gpu: FakeUpstream, cpu: FakeUpstream) -> None:
    backends = {"vllm": backend(gpu), "llama_cpp": backend(cpu, device_class="cpu")}
    proxy = start(backends=backends, routing={"continuation": False})
    gpu.scripts.append(cut_after(2, reset))
    assert "stream_broken" in stream(proxy).text
    assert cpu.talks == []


def test_a_role_chunk_is_not_output(pair: Callable[..., RunningProxy], gpu: FakeUpstream, cpu: FakeUpstream) -> None:
    """A request that could not be resumed still fails over."""
    proxy = pair("vllm")
    cpu.default = counter(LAST)
    gpu.scripts.append(cut_after(0, reset))
    answer = stream(proxy, tools=[TOOL])
    assert read(answer)[0] == count()
    assert answer.headers["x-backend"] == "llama_cpp"


@pytest.mark.parametrize("in_a_thread", [False, True])
def test_a_long_answer_is_resumed(
    pair: Callable[..., RunningProxy],
    gpu: FakeUpstream,
    cpu: FakeUpstream,
    monkeypatch: pytest.MonkeyPatch,
    in_a_thread: bool,
) -> None:
    """Longer than what the replay buffer keeps uncompressed."""
    if in_a_thread:
        monkeypatch.setattr(resumption, "LONG", 0)
    proxy = pair("llama-server")
    last = 2500
    cpu.default = counter(last)

    async def script(talk: Talk) -> None:
        events = events_of(talk, last, True, "gpu")
        await talk.start_stream()
        await talk.send(b"".join(map(chunked, events[:2000])))
        await until_seen()
        talk.reset()

    gpu.scripts.append(script)
    assert read(stream(proxy))[0] == count(last)


def test_stop_strings_hold_across_the_break(
    pair: Callable[..., RunningProxy], gpu: FakeUpstream, cpu: FakeUpstream
) -> None:
    """llama-cpp-python is asked without stop strings; the proxy cuts its text where the whole answer would end."""
    proxy = pair("llama-cpp-python")
    cpu.default = counter(LAST)
    gpu.scripts.append(cut_after(3, reset))
    answer = stream(proxy, stop=["5 6"])
    assert read(answer)[0] == " 1 2 3 4 "
    assert '"finish_reason":"stop"' in answer.text


def distances(tmp_path: Path, top1: float) -> Path:
    """As the command writes it."""
    pair = {"model": "m", "reference": {"backend": "vllm"}, "other": {"backend": "llama_cpp"}, "all": {"top1": top1}}
    path = tmp_path / "distance.json"
    path.write_text(json.dumps({"format": FORMAT, "pairs": [pair]}))
    return path


def test_a_stream_is_not_resumed_by_a_model_that_is_too_far(
    start: Start, gpu: FakeUpstream, cpu: FakeUpstream, tmp_path: Path
) -> None:
    backends = {"vllm": backend(gpu), "llama_cpp": backend(cpu, dialect="llama-server", device_class="cpu")}
    proxy = start(backends=backends, fallback={"min_top1": 0.9, "distances": [distances(tmp_path, 0.6)]})
    gpu.scripts.append(dying(LAST, 400))
    cpu.default = counter(LAST)
    answer = stream(proxy)
    assert '"code":"stream_broken"' in answer.text
    assert not cpu.talks


def test_the_comment_of_a_resumed_stream_tells_the_distance(
    start: Start, gpu: FakeUpstream, cpu: FakeUpstream, tmp_path: Path
) -> None:
    backends = {"vllm": backend(gpu), "llama_cpp": backend(cpu, dialect="llama-server", device_class="cpu")}
    fallback = {"min_top1": 0.9, "far": "mark", "distances": [distances(tmp_path, 0.6)]}
    proxy = start(backends=backends, fallback=fallback)
    gpu.scripts.append(dying(LAST, 400))
    cpu.default = counter(LAST)
    answer = stream(proxy)
    assert read(answer)[0] == count()
    assert "model distance top1=0.6; far" in answer.text
    assert "x-model-distance" not in answer.headers, "the stream began on the reference"
    page = get(f"{proxy.url}/metrics").text
    assert 'xgen_distant_answers_total{backend="llama_cpp",distance="far"} 1.0' in page
    assert 'xgen_model_top1{backend="vllm",model="m",to="llama_cpp"} 0.6' in page
