"""/v1/responses as its clients see it, in front of scripted engines."""

from __future__ import annotations

import asyncio
import json
import threading
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from typing import Any

import httpx
import openai
import pytest
from pydantic import BaseModel

from tests.support.counting_upstream import PROMPT_TOKENS, counter
from tests.support.counting_upstream import events_of as counted
from tests.support.documents import ROOT
from tests.support.fake_upstream import FakeUpstream, Script, Talk, delta, good, status, whole
from tests.support.running_proxy import RunningProxy, backend, get, post
from tests.support.waiting import wait_until
from xgen_proxy.api.api_keys import hash_key

CODEX = json.loads((ROOT / "tests" / "fixtures" / "codex_request.json").read_text())
ASK = {"model": "m", "input": "Hi"}
TOOL = {"type": "function", "name": "read", "parameters": {"type": "object", "properties": {}}, "strict": False}
USAGE = {
    "prompt_tokens": 9, "completion_tokens": 4, "total_tokens": 13, "prompt_tokens_details": {"cached_tokens": 8},
}  # fmt: skip


@pytest.fixture
def client(proxy: RunningProxy) -> Iterator[openai.OpenAI]:
    with openai.OpenAI(base_url=f"{proxy.url}/v1", api_key="none", max_retries=0) as client:
        yield client


def piece(finish: str | None = None, **content: Any) -> dict[str, Any]:
    chunk = delta(finish=finish)
    chunk["choices"][0]["delta"] = content
    return chunk


def call(index: int, arguments: str, **head: str) -> dict[str, Any]:
    function = {"arguments": arguments, **({"name": head["name"]} if head else {})}
    return piece(
        tool_calls=[{"index": index, **({"id": head["id"], "type": "function"} if head else {}), "function": function}]
    )


def streaming(*chunks: dict[str, Any]) -> Script:
    async def script(talk: Talk) -> None:
        await talk.start_stream()
        for chunk in chunks:
            await talk.event(chunk)
        await talk.event({**delta(), "choices": [], "usage": USAGE})
        await talk.end()

    return script


async def ending_early(talk: Talk) -> None:
    """A count to 6 that ends after 3."""
    await talk.start_stream()
    for event in counted(talk, 6, True, "gpu")[:4]:
        await talk.chunk(event)
    await talk.end(done=False)


THINKS_AND_CALLS = streaming(
    piece(role="assistant", content=""),
    piece(reasoning="I look "),
    piece(reasoning="first."),
    piece(content="\n\n"),
    call(0, "", id="call_a", name="exec_command"),
    call(0, '{"cmd":'),
    call(0, '"ls"}'),
    call(1, '{"input": "*** Begin', id="call_b", name="apply_patch"),
    call(1, ' Patch\\n"}'),
    call(2, "{}", id="call_c", name="mcp__git__git_status"),
    piece("tool_calls"),
)


def respond(proxy: RunningProxy, **fields: Any) -> httpx.Response:
    return post(f"{proxy.url}/v1/responses", json={**ASK, **fields})


def events_of(answer: httpx.Response) -> list[dict[str, Any]]:
    assert answer.headers["content-type"].startswith("text/event-stream")
    events = [json.loads(line[6:]) for line in answer.text.splitlines() if line.startswith("data: ")]
    assert [event["sequence_number"] for event in events] == list(range(len(events)))
    return events


def test_a_whole_response(client: openai.OpenAI, gpu: FakeUpstream) -> None:
    response = client.responses.create(model="m", input="Hi", instructions="Be brief.", max_output_tokens=50)
    assert response.output_text == "hello"
    assert (response.status, response.model, response.to_dict()["store"]) == ("completed", "m", False)
    assert response.usage is not None
    assert (response.usage.input_tokens, response.usage.total_tokens) == (3, 4)
    assert gpu.talks[-1].path == "/v1/chat/completions"
    assert gpu.talks[-1].json["max_completion_tokens"] == 50
    assert gpu.talks[-1].json["messages"] == [
        {"role": "system", "content": "Be brief."},
        {"role": "user", "content": "Hi"},
    ]


def test_a_stream(client: openai.OpenAI) -> None:
    with client.responses.stream(model="m", input="Hi") as stream:
        kinds = [event.type for event in stream]
        assert stream.get_final_response().output_text == "hello"
    assert kinds[:2] == ["response.created", "response.in_progress"]
    assert kinds[-1] == "response.completed"
    assert kinds.count("response.output_text.delta") == 2


async def test_an_asynchronous_stream(proxy: RunningProxy) -> None:
    async with openai.AsyncOpenAI(base_url=f"{proxy.url}/v1", api_key="none", max_retries=0) as client:
        stream = await client.responses.create(model="m", input="Hi", stream=True)
        text = "".join([event.delta async for event in stream if event.type == "response.output_text.delta"])
    assert text == "hello"


class City(BaseModel):
    name: str


def test_a_model_of_pydantic(client: openai.OpenAI, gpu: FakeUpstream) -> None:
    async def script(talk: Talk) -> None:
        await talk.answer(200, whole('{"name": "Paris"}'))

    gpu.scripts.append(script)
    response = client.responses.parse(model="m", input="Where?", text_format=City)
    assert response.output_parsed == City(name="Paris")
    schema = gpu.talks[-1].json["response_format"]
    assert schema["type"] == "json_schema"
    assert schema["json_schema"]["schema"]["required"] == ["name"]


def test_what_codex_sends_and_gets(proxy: RunningProxy, gpu: FakeUpstream) -> None:
    gpu.scripts.append(THINKS_AND_CALLS)
    answer = post(f"{proxy.url}/v1/responses", json=CODEX)
    assert answer.headers["x-dropped"] == "web_search"
    events = events_of(answer)
    done = [event["item"] for event in events if event["type"] == "response.output_item.done"]
    assert [item["type"] for item in done] == ["reasoning", "function_call", "custom_tool_call", "function_call"]
    assert done[0]["content"] == [{"type": "reasoning_text", "text": "I look first."}]
    assert (done[1]["name"], done[1]["arguments"], done[1]["call_id"]) == ("exec_command", '{"cmd":"ls"}', "call_a")
    assert (done[2]["name"], done[2]["input"]) == ("apply_patch", "*** Begin Patch\n")
    assert (done[3]["name"], done[3]["namespace"]) == ("git_status", "mcp__git")
    assert events[-1]["type"] == "response.completed"
    assert events[-1]["response"]["output"] == done
    assert events[-1]["response"]["usage"]["input_tokens_details"]["cached_tokens"] == 8


@pytest.mark.parametrize("originator", ["codex_exec", ""])
def test_codex_waits_for_a_full_queue(start: Callable[..., RunningProxy], gpu: FakeUpstream, originator: str) -> None:
    """It waits as long as a failed response says, but gives up at a 429, after which OpenAI's SDKs try again."""
    release = threading.Event()

    async def slow(talk: Talk) -> None:
        await asyncio.to_thread(release.wait, 10)
        await good(talk)

    gpu.default = slow
    proxy = start(backends={"llama": backend(gpu, dialect="llama-server", slots=1)}, limits={"queue": 0})
    with ThreadPoolExecutor(1) as pool:
        running = pool.submit(respond, proxy)
        wait_until(lambda: any(replica.in_flight for replica in proxy.gateway.fleet.replicas))
        headers = {"originator": originator} if originator else {}
        refused = post(proxy.url + "/v1/responses", json={**ASK, "stream": True}, headers=headers)
        release.set()
        assert running.result(20).status_code == 200
    if not originator:
        assert (refused.status_code, refused.json()["error"]["code"]) == (429, "queue_full")
        return
    *_, last = events_of(refused)
    assert (refused.status_code, last["type"]) == (200, "response.failed")
    assert last["response"]["error"]["code"] == "rate_limit_exceeded"
    assert "try again in" in last["response"]["error"]["message"]


def test_a_round_trip_with_a_tool(client: openai.OpenAI, gpu: FakeUpstream) -> None:
    gpu.scripts.append(streaming(call(0, "{}", id="call_a", name="read"), piece("tool_calls")))
    conversation: list[Any] = [{"role": "user", "content": "Read it"}]
    with client.responses.stream(model="m", input=conversation, tools=[TOOL]) as stream:  # type: ignore[list-item]
        output = stream.get_final_response().output
    assert [item.type for item in output] == ["function_call"]
    conversation += [item.to_dict() for item in output]
    conversation.append({"type": "function_call_output", "call_id": "call_a", "output": "42"})
    assert client.responses.create(model="m", input=conversation, tools=[TOOL]).output_text == "hello"  # type: ignore[list-item]
    called, result = gpu.talks[-1].json["messages"][1:]
    assert called["tool_calls"] == [
        {"id": "call_a", "type": "function", "function": {"name": "read", "arguments": "{}"}}
    ]
    assert result == {"role": "tool", "tool_call_id": "call_a", "content": "42"}


def test_a_broken_stream_is_resumed_within_the_same_response(
    client: openai.OpenAI, gpu: FakeUpstream, cpu: FakeUpstream
) -> None:
    gpu.scripts.append(ending_early)
    cpu.default = counter(6)
    with client.responses.stream(model="m", input="Count") as stream:
        kinds = [event.type for event in stream]
        response = stream.get_final_response()
    assert response.output_text == " 1 2 3 4 5 6"
    assert response.usage is not None
    assert (response.usage.input_tokens, response.usage.output_tokens) == (PROMPT_TOKENS, 6)
    assert (kinds.count("response.created"), kinds.count("response.output_item.added")) == (1, 1)
    assert kinds[-1] == "response.completed"


def test_a_stream_that_nothing_can_resume_fails_with_a_code(
    proxy: RunningProxy, gpu: FakeUpstream, cpu: FakeUpstream
) -> None:
    gpu.scripts.append(ending_early)
    last = events_of(respond(proxy, stream=True, continuation="none"))[-1]
    assert last["type"] == "response.failed"
    assert last["response"]["status"] == "failed"
    assert last["response"]["error"]["code"] == "server_error"
    assert last["response"]["output"] == []


def test_while_it_waits_the_stream_pings_and_a_late_error_is_a_failed_response(
    start: Callable[..., RunningProxy], gpu: FakeUpstream
) -> None:
    pings = threading.Event()

    async def script(talk: Talk) -> None:
        await asyncio.to_thread(pings.wait, 20)
        await talk.answer(400, {"error": {"message": "bad schema", "type": "BadRequestError", "code": 400}})

    gpu.scripts.append(script)
    proxy = start(backends={"vllm": backend(gpu)}, sse_keepalive_s=0.05)
    events = []
    with httpx.stream("POST", f"{proxy.url}/v1/responses", json={**ASK, "stream": True}, timeout=20) as answer:
        for line in answer.iter_lines():
            if line.startswith("data: "):
                events.append(json.loads(line[6:]))
                if len(events) == 4:
                    pings.set()
    kinds = [event["type"] for event in events]
    assert kinds[:3] == ["response.created", "response.in_progress", "response.in_progress"]
    assert kinds[-1] == "response.failed"
    assert events[-1]["response"]["error"] == {"code": "invalid_prompt", "message": "bad schema"}


@pytest.mark.parametrize(
    ("fields", "code", "param"),
    [
        ({"previous_response_id": "resp_1"}, None, "previous_response_id"),
        ({"background": True}, None, "background"),
        ({"input": "word " * 40_000}, "context_length_exceeded", "input"),
        ({"input": "Hi", "tools": [{"type": "function"}]}, None, "tools.0.name"),
    ],
)
def test_errors_have_openais_envelope(
    start: Callable[..., RunningProxy], gpu: FakeUpstream, fields: dict[str, Any], code: str | None, param: str | None
) -> None:
    proxy = start(backends={"vllm": backend(gpu, context=2048)})
    answer = respond(proxy, **fields)
    error = answer.json()["error"]
    assert (answer.status_code, error["type"], error["code"]) == (400, "invalid_request_error", code)
    assert error["param"] == param
    assert "x-request-id" in answer.headers


def test_a_prompt_that_is_too_long_fails_in_the_stream(start: Callable[..., RunningProxy], gpu: FakeUpstream) -> None:
    """Codex drops history at this code, which it reads from events only; a 400 ends its conversation."""
    proxy = start(backends={"vllm": backend(gpu, context=2048)})
    answer = respond(proxy, input="word " * 40_000, stream=True)
    assert (answer.status_code, answer.headers["content-type"].partition(";")[0]) == (200, "text/event-stream")
    assert {"x-request-id", "request-id"} <= answer.headers.keys()
    events = [json.loads(line[6:]) for line in answer.text.splitlines() if line.startswith("data: ")]
    assert [event["type"] for event in events] == ["response.created", "response.in_progress", "response.failed"]
    assert events[-1]["response"]["error"]["code"] == "context_length_exceeded"


def test_an_engines_refusal_names_this_apis_field(proxy: RunningProxy, gpu: FakeUpstream, cpu: FakeUpstream) -> None:
    refusal = {"error": {"message": "no", "type": "BadRequestError", "param": "response_format", "code": 400}}
    gpu.scripts.append(status(400, refusal))
    cpu.scripts.append(status(400, refusal))
    answer = respond(proxy, text={"format": {"type": "json_object"}})
    assert (answer.status_code, answer.json()["error"]["param"]) == (400, "text.format")


def test_no_response_is_kept(client: openai.OpenAI, proxy: RunningProxy) -> None:
    asked: list[Callable[[], Any]] = [
        lambda: client.responses.retrieve("resp_1"),
        lambda: client.responses.cancel("resp_1"),
        lambda: client.responses.delete("resp_1"),
        lambda: client.responses.input_items.list("resp_1"),
    ]
    for ask in asked:
        with pytest.raises(openai.NotFoundError, match="keeps no responses"):
            ask()
    assert get(f"{proxy.url}/v1/responses").status_code == 405


def test_tokens_of_an_input_are_counted(client: openai.OpenAI, gpu: FakeUpstream) -> None:
    asked = len(gpu.talks)
    short = client.responses.input_tokens.count(model="m", input="Hi")
    long = client.responses.input_tokens.count(model="m", input="Hi " * 1000, tools=[TOOL])  # type: ignore[list-item]
    assert short.object == "response.input_tokens"
    assert 0 < short.input_tokens < long.input_tokens
    assert len(gpu.talks) == asked
    with pytest.raises(openai.BadRequestError, match="input is missing"):
        client.responses.input_tokens.count(model="m")


def test_a_key_is_asked_for(start: Callable[..., RunningProxy], gpu: FakeUpstream) -> None:
    proxy = start(backends={"vllm": backend(gpu)}, api_keys=[hash_key("sk-mine")])
    for method, path in [("POST", ""), ("GET", "/resp_1"), ("POST", "/input_tokens")]:
        answer = httpx.request(method, f"{proxy.url}/v1/responses{path}", json=ASK if method == "POST" else None)
        assert answer.status_code == 401, path
    answer = post(f"{proxy.url}/responses", json=ASK, headers={"authorization": "Bearer sk-mine"})
    assert answer.json()["output"][0]["content"][0]["text"] == "hello"
