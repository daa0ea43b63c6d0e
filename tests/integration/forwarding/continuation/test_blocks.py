"""Streams that break within a tool call, constrained output or reasoning."""

from __future__ import annotations

import asyncio
import json
from collections.abc import Callable
from typing import Any

import httpx
import pytest

from tests.support.commit_point import seen, until_seen
from tests.support.counting_upstream import PROMPT_TOKENS, STREAM_HEAD, chunked
from tests.support.fake_upstream import FakeUpstream, Script, Talk, status
from tests.support.running_proxy import CHAT, RunningProxy, backend, get
from tests.support.scripted_blocks import CALL, TOOL, Pieces, answering, dying, events_of, said, whole
from tests.support.waiting import wait_until
from xgen_proxy.fleet import circuit_breaker

Start = Callable[..., RunningProxy]
Json = dict[str, Any]

TEXT: Pieces = [("text", " I"), ("text", " look")]
OBJECT: Pieces = [("text", '{"n":'), ("text", " 12"), ("text", " }")]
THOUGHT: Pieces = [("reasoning", " So"), ("reasoning", " be"), ("reasoning", " it")]
SCHEMA: Json = {"response_format": {"type": "json_object"}}
USAGE: Json = {"stream_options": {"include_usage": True}}


@pytest.fixture(autouse=True)
def many_breaks(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(circuit_breaker, "FAILURES", 10**9)
    seen.clear()


@pytest.fixture
def pair(start: Start, gpu: FakeUpstream, cpu: FakeUpstream) -> Callable[..., RunningProxy]:
    """pair(dialect of the CPU): a vLLM that breaks, and the backend that takes over."""

    def make(dialect: str = "llama-server", **routing: Any) -> RunningProxy:
        other = {"llama_cpp": backend(cpu, dialect=dialect, device_class="cpu", slots=8, tools=True)}
        return start(backends={"vllm": backend(gpu), **other}, routing=routing)

    return make


def read(answer: httpx.Response, pieces: Pieces) -> Json | None:
    """Checks that the stream looks as if it had never broken. Returns the usage."""
    events = [line[6:] for line in answer.text.splitlines() if line.startswith("data: ")]
    assert events[-1] == "[DONE]", answer.text
    chunks = [json.loads(event) for event in events[:-1]]
    assert len({(chunk["id"], chunk["created"], chunk["object"]) for chunk in chunks}) == 1
    choices = [chunk["choices"][0] for chunk in chunks if chunk["choices"]]
    assert [choice["finish_reason"] for choice in choices if choice["finish_reason"]] == [
        "tool_calls" if said(pieces, "call") else "stop"
    ]
    deltas = [choice["delta"] for choice in choices]
    assert sum("role" in delta for delta in deltas) == 1
    assert "".join(delta.get("content") or "" for delta in deltas) == said(pieces, "text"), answer.text
    assert "".join(delta.get("reasoning") or "" for delta in deltas) == said(pieces, "reasoning"), answer.text
    calls = [call for delta in deltas for call in delta.get("tool_calls", ())]
    assert "".join(call["function"]["arguments"] for call in calls) == said(pieces, "call"), answer.text
    assert len([call for call in calls if "id" in call]) == bool(calls), "the beginning of two calls"
    usages: list[Json] = [chunk["usage"] for chunk in chunks if chunk.get("usage")]
    return usages[0] if usages else None


def ask(proxy: RunningProxy, client: httpx.Client | None = None, **fields: Any) -> httpx.Response:
    client = client or httpx.Client(verify=False, timeout=20)
    with client.stream("POST", proxy.url + "/v1/chat/completions", json={**CHAT, "stream": True, **fields}) as answer:
        parts = []
        for part in answer.iter_bytes():
            parts.append(part)
            seen.set()
        answer._content = b"".join(parts)
        return answer


KINDS: dict[str, tuple[str, Pieces, Json, Json]] = {
    "a tool call after text": ("llama-server", TEXT[:1] + CALL, {"tools": [TOOL]}, {}),
    "JSON, held": ("vllm", OBJECT, SCHEMA, {"hold_constrained": True}),
    "JSON, streamed": ("llama-server", OBJECT, SCHEMA, {}),
    "reasoning": ("llama-server", THOUGHT[:2] + TEXT, {}, {}),
}


@pytest.mark.parametrize(("dialect", "pieces", "fields", "routing"), KINDS.values(), ids=KINDS)
def test_a_break_at_every_byte_is_invisible(
    pair: Callable[..., RunningProxy],
    gpu: FakeUpstream,
    cpu: FakeUpstream,
    dialect: str,
    pieces: Pieces,
    fields: Json,
    routing: Json,
) -> None:
    proxy = pair(dialect, **routing)
    cpu.default = answering(pieces)
    body = {**CHAT, **fields, **USAGE}
    talk = Talk("/v1/chat/completions", {}, json.dumps(body).encode(), None, None)  # type: ignore[arg-type]
    with httpx.Client(verify=False, timeout=20) as client:
        for cut in range(len(whole(talk, pieces, "gpu")) - len(b"0\r\n\r\n")):
            gpu.scripts.append(dying(pieces, cut))
            while gpu.scripts:  # on a busy machine the GPU may miss a health check, and be passed over
                answer = client.post(proxy.url + talk.path, json={**body, "stream": True})
            usage = read(answer, pieces)
            assert usage is not None, f"cut after {cut} bytes"
            if pieces[-1] not in CALL:  # the tags around a call cannot be counted once it was sent
                assert usage["completion_tokens"] == len(pieces), f"cut after {cut} bytes: {answer.text}"


def cut_after(pieces: Pieces, count: int, then: Script | None = None) -> Script:
    """Sends the role and the first pieces, and resets the connection once the client has what is not held."""

    async def script(talk: Talk) -> None:
        await talk.send(STREAM_HEAD)
        for event in events_of(talk, pieces, "gpu")[: count + 1]:
            await talk.send(chunked(event))
        await until_seen()
        if then is not None:
            await then(talk)
        talk.reset()

    return script


def error_of(answer: httpx.Response) -> Json:
    assert "[DONE]" not in answer.text
    error: Json = json.loads(answer.text.rstrip().rpartition("data: ")[2])["error"]
    assert error["code"] == "stream_broken"
    return error


def test_half_a_tool_call_is_never_sent(
    pair: Callable[..., RunningProxy], gpu: FakeUpstream, cpu: FakeUpstream
) -> None:
    """Another replica continues the text before the call, with the tools, and the call comes whole."""
    proxy = pair()
    cpu.default = answering(TEXT + CALL)
    gpu.scripts.append(cut_after(TEXT + CALL, 4))
    answer = ask(proxy, tools=[TOOL])
    read(answer, TEXT + CALL)
    assert "of-gpu" not in answer.text
    [asked] = [talk.json for talk in cpu.talks if "tokenize" not in talk.path]
    assert asked["tools"] == [TOOL]
    assert asked["messages"][-1] == {"role": "assistant", "content": " I look"}
    assert_counted(proxy, "tool_call")


def assert_counted(proxy: RunningProxy, block: str, backend: str = "llama_cpp") -> None:
    line = f'xgen_continuations_total{{backend="{backend}",block="{block}"}} 1.0'
    wait_until(lambda: line in get(f"{proxy.url}/metrics").text, 10, line)


def test_a_call_without_text_is_asked_for_again(
    pair: Callable[..., RunningProxy], gpu: FakeUpstream, cpu: FakeUpstream
) -> None:
    proxy = pair()
    cpu.default = answering(CALL)
    gpu.scripts.append(cut_after(CALL, 2))
    read(ask(proxy, tools=[TOOL], tool_choice="required"), CALL)
    assert [talk.json["messages"] for talk in cpu.talks] == [CHAT["messages"]]


def test_who_opts_out_gets_tool_calls_as_they_come(
    pair: Callable[..., RunningProxy], gpu: FakeUpstream, cpu: FakeUpstream
) -> None:
    proxy = pair()
    gpu.scripts.append(cut_after(CALL, 2))
    answer = ask(proxy, tools=[TOOL], continuation="none")
    assert "of-gpu" in answer.text
    error_of(answer)
    assert cpu.talks == []


def test_streamed_json_must_come_again_where_the_engine_cannot_enter_its_grammar(
    pair: Callable[..., RunningProxy], gpu: FakeUpstream, cpu: FakeUpstream
) -> None:
    proxy = pair("vllm")
    cpu.default = answering(OBJECT)
    gpu.scripts.append(cut_after(OBJECT, 2))
    usage = read(ask(proxy, **SCHEMA, **USAGE), OBJECT)
    assert usage is not None
    assert usage["completion_tokens"] == len(OBJECT)
    assert_counted(proxy, "constrained")


def test_other_json_ends_with_an_error(pair: Callable[..., RunningProxy], gpu: FakeUpstream, cpu: FakeUpstream) -> None:
    proxy = pair("vllm")
    cpu.default = answering([("text", '{"m": 1}')])
    gpu.scripts.append(cut_after(OBJECT, 2))
    assert "begins differently from what was sent" in error_of(ask(proxy, **SCHEMA))["message"]
    assert_counted(proxy, "constrained", "none")
    page = get(f"{proxy.url}/metrics").text
    assert 'xgen_attempt_failures_total{backend="llama_cpp",outcome="different",replica="llama_cpp@' in page


def test_an_engine_that_refuses_a_grammar_in_the_middle_is_asked_again(
    pair: Callable[..., RunningProxy], gpu: FakeUpstream, cpu: FakeUpstream
) -> None:
    proxy = pair("llama-server")
    cpu.default = answering(OBJECT)

    async def tokenize_then_refuse(talk: Talk) -> None:
        await answering(OBJECT)(talk)
        cpu.scripts.insert(0, status(400))

    cpu.scripts.append(tokenize_then_refuse)
    gpu.scripts.append(cut_after(OBJECT, 2))
    read(ask(proxy, **SCHEMA), OBJECT)
    assert [len(talk.json["messages"]) for talk in cpu.talks if "tokenize" not in talk.path] == [2, 1]


@pytest.mark.parametrize("count", [2, 4], ids=["in the reasoning", "in the text"])
@pytest.mark.parametrize("dialect", ["llama-server", "vllm"])
def test_reasoning_is_continued_as_reasoning(
    pair: Callable[..., RunningProxy], gpu: FakeUpstream, cpu: FakeUpstream, dialect: str, count: int
) -> None:
    proxy = pair(dialect)
    cpu.default = answering(THOUGHT + TEXT)
    gpu.scripts.append(cut_after(THOUGHT + TEXT, count))
    answer = ask(proxy)
    read(answer, THOUGHT + TEXT)
    assert ": resumed on llama_cpp@" in answer.text
    assert_counted(proxy, "reasoning" if count == 2 else "text")


def test_reasoning_that_an_engine_takes_for_text_is_given_again(
    pair: Callable[..., RunningProxy], gpu: FakeUpstream, cpu: FakeUpstream
) -> None:
    """Nothing but reasoning was shown, so that the new answer's own is dropped."""
    proxy = pair("vllm")
    other: Pieces = [("reasoning", " Hm"), *TEXT]

    async def misunderstands(talk: Talk) -> None:
        if "tokenize" not in talk.path and len(talk.json["messages"]) > 1:
            talk.body = json.dumps({**talk.json, "messages": talk.json["messages"][:1]}).encode()
            await answering([("text", " be it</think> I look")])(talk)
        else:
            await answering(other)(talk)

    cpu.default = misunderstands
    gpu.scripts.append(cut_after(THOUGHT + TEXT, 1))
    read(ask(proxy), THOUGHT[:1] + TEXT)


def test_text_is_continued_by_an_engine_that_calls_it_reasoning(
    pair: Callable[..., RunningProxy], gpu: FakeUpstream, cpu: FakeUpstream
) -> None:
    """A vLLM whose template deletes the tags, as DeepSeek-R1's does: it refuses those that are written for it."""
    proxy = pair("vllm")

    async def without_tags(talk: Talk) -> None:
        if "tokenize" in talk.path:
            await answering(TEXT)(talk)
        elif "</think>" in talk.json["messages"][-1]["content"]:
            await status(400)(talk)
        else:
            *before, last = talk.json["messages"]
            shown = {"role": "assistant", "content": "", "reasoning": last["content"]}
            talk.body = json.dumps({**talk.json, "messages": [*before, shown]}).encode()
            await answering([("reasoning", token) for _, token in TEXT])(talk)

    cpu.default = without_tags
    gpu.scripts.append(cut_after(THOUGHT + TEXT, 4))
    usage = read(ask(proxy, **USAGE), THOUGHT + TEXT)
    assert usage is not None
    assert (usage["prompt_tokens"], usage["completion_tokens"]) == (PROMPT_TOKENS, len(THOUGHT + TEXT))


def hesitating(pieces: Pieces) -> Script:
    """First of all sends a chunk without output, as vLLM does while it holds back what may begin a stop string."""

    async def script(talk: Talk) -> None:
        if "tokenize" in talk.path:
            await answering(pieces)(talk)
            return
        await talk.send(STREAM_HEAD)
        role, *others = events_of(talk, pieces, "cpu")
        for event in (role, role.replace(b'"role":"assistant",', b""), *others):
            await talk.send(chunked(event))
            await asyncio.sleep(0.02)
        await talk.send(b"0\r\n\r\n")

    return script


@pytest.mark.parametrize("answers", [answering, hesitating])
def test_reasoning_never_becomes_text(
    pair: Callable[..., RunningProxy], gpu: FakeUpstream, cpu: FakeUpstream, answers: Callable[[Pieces], Script]
) -> None:
    """An engine without a parser of reasoning sends it as text, also when it is asked again."""
    proxy = pair("vllm")

    async def unparsed(talk: Talk) -> None:
        if "tokenize" not in talk.path:
            talk.body = json.dumps({**talk.json, "messages": talk.json["messages"][:1]}).encode()
        await answers([("text", "<think> So be it</think> I look")])(talk)

    cpu.default = unparsed
    gpu.scripts.append(cut_after(THOUGHT + TEXT, 1))
    assert "goes on with text" in error_of(ask(proxy))["message"]


def test_an_engine_without_reasoning_is_not_asked(
    pair: Callable[..., RunningProxy], gpu: FakeUpstream, cpu: FakeUpstream
) -> None:
    proxy = pair("llama-cpp-python")
    gpu.scripts.append(cut_after(THOUGHT + TEXT, 1))
    error_of(ask(proxy))
    assert cpu.talks == []


def test_a_call_after_reasoning_and_white_space_is_given_again(
    pair: Callable[..., RunningProxy], gpu: FakeUpstream, cpu: FakeUpstream
) -> None:
    """Models write line breaks between their thoughts and a call. llama-server takes a message without text for one
    whose reasoning goes on, and when asked again, it writes the call at once."""
    proxy = pair("llama-server")
    blank: Pieces = [("text", "\n\n")]

    async def without_blank(talk: Talk) -> None:
        again = [("reasoning", " Hm"), *CALL]
        if "tokenize" not in talk.path:
            talk.body = json.dumps({**talk.json, "messages": talk.json["messages"][:1]}).encode()
        await answering(again)(talk)

    cpu.default = without_blank
    gpu.scripts.append(cut_after(THOUGHT + blank + CALL, 5))
    read(ask(proxy, tools=[TOOL]), THOUGHT + blank + CALL)


def test_a_call_that_breaks_twice_goes_back_to_the_first_replica(
    pair: Callable[..., RunningProxy], gpu: FakeUpstream, cpu: FakeUpstream
) -> None:
    """As in a rolling restart: the client has got no further, but the second replica did go on."""
    proxy = pair("vllm")

    async def breaks_in_the_call(talk: Talk) -> None:
        if "tokenize" in talk.path:
            await answering(CALL)(talk)
            return
        await talk.send(STREAM_HEAD + b"".join(map(chunked, events_of(talk, TEXT + CALL, "cpu")[:3])))
        await asyncio.sleep(0.2)
        talk.reset()

    cpu.default = breaks_in_the_call
    gpu.default = answering(TEXT + CALL, "gpu")
    gpu.scripts.append(cut_after(TEXT + CALL, 4))
    read(ask(proxy, tools=[TOOL]), TEXT + CALL)
    asked = [len([talk for talk in each.talks if "tokenize" not in talk.path]) for each in (gpu, cpu)]
    assert asked == [2, 1]


@pytest.mark.parametrize("kind", ["a tool call after text", "reasoning"])
def test_a_complete_answer_needs_only_its_usage(
    pair: Callable[..., RunningProxy], gpu: FakeUpstream, cpu: FakeUpstream, kind: str
) -> None:
    dialect, pieces, fields, _ = KINDS[kind]
    proxy = pair(dialect)
    cpu.default = answering(pieces)
    gpu.scripts.append(cut_after(pieces, len(pieces) + 1))
    usage = read(ask(proxy, **fields, **USAGE), pieces)
    assert usage is not None
    assert usage["prompt_tokens"] == 7
    assert cpu.talks[-1].json["max_tokens"] == 1
