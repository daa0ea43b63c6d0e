"""Anthropic's API, over scripted backends."""

from __future__ import annotations

import asyncio
import json
from collections.abc import Callable, Iterator
from typing import Any

import httpx
import pytest

from tests.support.commit_point import seen, until_seen
from tests.support.fake_upstream import FakeUpstream, Script, Talk, delta, silent, status, whole
from tests.support.running_proxy import RunningProxy, backend, get, post, running_proxy
from tests.support.waiting import wait_until
from xgen_proxy.api.api_keys import new_key
from xgen_proxy.api.messages import model_info, models_page
from xgen_proxy.forwarding.continuation import hold

Json = dict[str, Any]
Start = Callable[..., RunningProxy]
HI: Json = {"model": "m", "max_tokens": 20, "messages": [{"role": "user", "content": "Hi"}]}
VERSION = {"anthropic-version": "2023-06-01"}
READ = {"name": "read", "input_schema": {"type": "object", "properties": {"path": {"type": "string"}}}}


@pytest.fixture(scope="module")
def proxy(fake: FakeUpstream) -> Iterator[RunningProxy]:
    with running_proxy(backends={"vllm": backend(fake)}) as running:
        yield running


@pytest.fixture(autouse=True)
def fresh(fake: FakeUpstream) -> None:
    fake.talks.clear()
    fake.scripts.clear()


def ask(proxy: RunningProxy, path: str = "/v1/messages", headers: Json | None = None, **fields: Any) -> httpx.Response:
    return post(proxy.url + path, json={**HI, **fields}, headers={**VERSION, **(headers or {})})


def events(answer: httpx.Response) -> list[Json]:
    """The data of each event, whose name is its type."""
    assert answer.headers["content-type"].startswith("text/event-stream")
    found = []
    for each in answer.text.split("\n\n"):
        if each and not each.startswith(":"):
            name, data = each.split("\n")
            found.append(json.loads(data.removeprefix("data: ")))
            assert name == f"event: {found[-1]['type']}"
    return found


def text_of(found: list[Json]) -> str:
    return "".join(each["delta"].get("text", "") for each in found if each["type"] == "content_block_delta")


def tool_delta(index: int, arguments: str = "", finish: str | None = None, **head: str) -> Json:
    function = {"arguments": arguments, **({"name": head["name"]} if "name" in head else {})}
    call = {"index": index, "function": function, **({"id": head["id"]} if "id" in head else {})}
    chunk = delta(finish=finish)
    chunk["choices"][0]["delta"] = {"tool_calls": [call]}
    return chunk


def streams(*chunks: Json) -> Callable[[Talk], Any]:
    async def script(talk: Talk) -> None:
        await talk.start_stream()
        for chunk in chunks:
            await talk.event(chunk)
        await talk.end()

    return script


def answers(body: Json) -> Callable[[Talk], Any]:
    async def script(talk: Talk) -> None:
        await talk.answer(200, body)

    return script


# -- messages ----------------------------------------------------------------------------------------------------------


def test_a_whole_answer(proxy: RunningProxy, fake: FakeUpstream) -> None:
    answer = ask(proxy, "/v1/messages?beta=true", system="Be brief.", headers={"x-request-id": "find-me"})
    assert answer.status_code == 200, answer.text
    assert answer.headers["request-id"] == answer.headers["x-request-id"] == "find-me"
    assert answer.headers["x-backend"] == "vllm"
    assert "x-dropped" not in answer.headers
    found = answer.json()
    assert (found["id"], found["type"], found["model"]) == ("msg_find-me", "message", "m")
    assert found["stop_reason"] == "end_turn"
    assert found["content"] == [{"type": "text", "text": "hello"}]
    assert (found["usage"]["input_tokens"], found["usage"]["output_tokens"]) == (3, 1)
    [talk] = fake.talks
    assert talk.path == "/v1/chat/completions"
    assert talk.json["messages"] == [{"role": "system", "content": "Be brief."}, {"role": "user", "content": "Hi"}]


def test_a_stream(proxy: RunningProxy, fake: FakeUpstream) -> None:
    usage = {"prompt_tokens": 30, "completion_tokens": 2, "prompt_tokens_details": {"cached_tokens": 16}}
    end = {**delta(), "choices": [], "usage": usage}
    fake.scripts.append(streams(delta("hel"), delta("lo"), delta(finish="stop"), end))
    answer = ask(proxy, stream=True)
    assert "[DONE]" not in answer.text
    assert answer.headers["request-id"] == answer.headers["x-request-id"]
    found = events(answer)
    assert [each["type"] for each in found] == [
        "message_start", "content_block_start", "content_block_delta", "content_block_delta", "content_block_stop",
        "message_delta", "message_stop",
    ]  # fmt: skip
    assert text_of(found) == "hello"
    assert found[0]["message"]["usage"]["input_tokens"] > 0
    assert found[-2]["usage"]["input_tokens"] == 14
    assert found[-2]["usage"]["cache_read_input_tokens"] == 16
    assert fake.talks[0].json["stream_options"] == {"include_usage": True}


def test_tools(proxy: RunningProxy, fake: FakeUpstream) -> None:
    """Two calls at once, and a tool that no engine has."""
    fake.scripts.append(
        streams(
            tool_delta(0, name="read", id="a"),
            tool_delta(1, name="read", id="b"),
            tool_delta(0, '{"path":"x"}'),
            tool_delta(1, '{"path":"y"}'),
            delta(finish="tool_calls"),
        )
    )
    search = {"type": "web_search_20250305", "name": "web_search"}
    answer = ask(proxy, stream=True, tools=[READ, search], tool_choice={"type": "any"})
    assert answer.headers["x-dropped"] == "web_search_20250305"
    found = events(answer)
    blocks = [each["content_block"] for each in found if each["type"] == "content_block_start"]
    inputs = [each["delta"]["partial_json"] for each in found if each["type"] == "content_block_delta"]
    assert [(block["id"], block["name"]) for block in blocks] == [("a", "read"), ("b", "read")]
    assert inputs == ['{"path":"x"}', '{"path":"y"}']
    assert found[-2]["delta"]["stop_reason"] == "tool_use"
    assert fake.talks[0].json["tool_choice"] == "required"
    assert [tool["function"]["name"] for tool in fake.talks[0].json["tools"]] == ["read"]


def test_arguments_that_are_no_json(proxy: RunningProxy, fake: FakeUpstream) -> None:
    call = {"id": "a", "type": "function", "function": {"name": "read", "arguments": '{"path":'}}
    body = whole(finish="tool_calls")
    body["choices"][0]["message"] = {"role": "assistant", "content": None, "tool_calls": [call]}
    fake.scripts.append(answers(body))
    answer = ask(proxy, tools=[READ])
    assert answer.status_code == 200
    assert answer.json()["content"] == [
        {"type": "tool_use", "id": "a", "name": "read", "input": {"INVALID_JSON": '{"path":'}}
    ]


def test_an_alias_of_claude(start: Start, gpu: FakeUpstream) -> None:
    proxy = start(backends={"vllm": backend(gpu)}, models={"aliases": {"claude-*": "m"}})
    for stream in (False, True):
        answer = ask(proxy, model="claude-sonnet-4-5", stream=stream)
        assert (answer.status_code, gpu.talks[-1].json["model"]) == (200, "m")
        assert '"model":"claude-sonnet-4-5"' in answer.text
    listed = get(f"{proxy.url}/v1/models", headers=VERSION).json()["data"]
    assert [each["id"] for each in listed] == ["m", "claude-xgen-m"]
    assert count(proxy, model="claude-opus-4-1").status_code == 200


def test_a_conversation_is_a_session(proxy: RunningProxy, fake: FakeUpstream) -> None:
    assert ask(proxy, metadata={"user_id": "user_a_account_b_session_c"}).status_code == 200
    assert "session_id" not in fake.talks[0].json


@pytest.mark.parametrize("strip", [True, False])
def test_the_attribution(start: Start, gpu: FakeUpstream, strip: bool) -> None:
    header = "x-anthropic-billing-header: cc_version=2.1.37.0d9; cc_entrypoint=cli; cch=fa690;"
    proxy = start(backends={"vllm": backend(gpu)}, strip_attribution=strip)
    system = [{"type": "text", "text": header}, {"type": "text", "text": "You are Claude Code."}]
    assert ask(proxy, system=system).status_code == 200
    assert gpu.talks[0].json["messages"][0]["content"].startswith("You are" if strip else header)


async def breaks(talk: Talk) -> None:
    await talk.start_stream()
    await talk.event(delta("hel"))
    talk.reset()


def goes_on(*chunks: Json) -> Script:
    """It also tells the proxy how many tokens were sent."""

    async def script(talk: Talk) -> None:
        if "stream" in talk.json:
            await streams(*chunks)(talk)
        else:
            await talk.answer(200, {"tokens": [1]})

    return script


def test_a_stream_that_breaks_is_resumed(start: Start, gpu: FakeUpstream, cpu: FakeUpstream) -> None:
    gpu.default, cpu.default = breaks, goes_on(delta("lo"), delta(finish="stop"))
    proxy = start(backends={"vllm": backend(gpu), "llama_cpp": backend(cpu, device_class="cpu")})
    answer = ask(proxy, stream=True, backend="auto")
    found = events(answer)
    assert text_of(found) == "hello"
    assert [each["type"] for each in found].count("message_start") == 1
    assert found[-1]["type"] == "message_stop"
    assert ": resumed on " in answer.text


def test_the_stop_sequence_that_ended_a_resumed_answer(start: Start, gpu: FakeUpstream, cpu: FakeUpstream) -> None:
    """vLLM names it in a field of its own."""
    ending = delta(finish="stop")
    ending["choices"][0]["stop_reason"] = "END"
    gpu.default, cpu.default = breaks, goes_on(delta("lo"), ending)
    proxy = start(backends={"one": backend(gpu), "two": backend(cpu, device_class="cpu")})
    found = events(ask(proxy, stream=True, stop_sequences=["END"], backend="one"))
    [end] = [each["delta"] for each in found if each["type"] == "message_delta"]
    assert end == {"stop_reason": "stop_sequence", "stop_sequence": "END"}
    assert text_of(found) == "hello"


def test_pings_while_a_call_is_held(proxy: RunningProxy, fake: FakeUpstream, monkeypatch: pytest.MonkeyPatch) -> None:
    """The call comes in one piece at its end; until then the client sees that the stream is alive."""
    monkeypatch.setattr(hold, "COMMENT_S", 0.0)

    async def script(talk: Talk) -> None:
        await talk.start_stream()
        await talk.event(tool_delta(0, "", id="call_1", name="read"))
        for piece in ('{"path"', ": ", '"a"}'):
            await talk.event(tool_delta(0, piece))
            await asyncio.sleep(0.05)
        await talk.event(tool_delta(0, finish="tool_calls"))
        await talk.end()

    fake.scripts.append(script)
    found = [each["type"] for each in events(ask(proxy, tools=[READ], stream=True))]
    assert found[:2] == ["message_start", "ping"]
    at = found.index("content_block_start")
    assert set(found[1:at]) == {"ping"}
    assert found[-3:] == ["content_block_stop", "message_delta", "message_stop"]


def test_pings_while_it_waits(start: Start, gpu: FakeUpstream) -> None:
    proxy = start(backends={"vllm": backend(gpu)}, sse_keepalive_s=0.05)
    gpu.default = silent
    with httpx.stream(
        "POST", f"{proxy.url}/v1/messages", json={**HI, "stream": True}, verify=False, timeout=20
    ) as answer:
        assert answer.headers["request-id"]
        lines = answer.iter_lines()
        first = [next(lines) for _ in range(8)]
    assert first[0] == "event: message_start"
    assert first[3:5] == ["event: ping", 'data: {"type":"ping"}']


# -- errors ------------------------------------------------------------------------------------------------------------


def assert_error(answer: httpx.Response, code: int, kind: str) -> str:
    """Returns the message."""
    assert answer.status_code == code, answer.text
    found = answer.json()
    assert list(found) == ["type", "error", "request_id"]
    assert (found["type"], found["error"]["type"]) == ("error", kind)
    assert answer.headers["request-id"] == answer.headers["x-request-id"] == found["request_id"]
    message: str = found["error"]["message"]
    return message


@pytest.mark.parametrize(
    ("fields", "said"),
    [
        ({"max_tokens": None}, "max_tokens is missing"),
        ({"messages": [{"role": "user", "content": [{"type": "text"}]}]}, "messages.0.content.0.text is missing"),
        ({"temperature": "hot"}, "temperature must be"),
        ({"stop_sequences": ["x"] * 20}, "stop_sequences has 20 entries"),
        ({"tools": [{"name": "x"}]}, "tools.0.input_schema is missing"),
        ({"model": 5}, "model must be a string"),
    ],
)
@pytest.mark.parametrize("stream", [True, False])
def test_bad_input(proxy: RunningProxy, fields: Json, said: str, stream: bool) -> None:
    assert said in assert_error(ask(proxy, stream=stream, **fields), 400, "invalid_request_error")


def test_errors_before_an_answer(proxy: RunningProxy, fake: FakeUpstream) -> None:
    url = f"{proxy.url}/v1/messages"
    assert "JSON" in assert_error(post(url, content=b"{"), 400, "invalid_request_error")
    assert_error(get(url), 405, "invalid_request_error")
    assert "'none'" in assert_error(ask(proxy, model="none"), 404, "not_found_error")
    too_long = ask(proxy, messages=[{"role": "user", "content": "word " * 10_000}])
    assert assert_error(too_long, 400, "invalid_request_error").startswith("prompt is too long: ")
    fake.scripts += [status(500)] * 4
    assert_error(ask(proxy), 502, "api_error")


def test_no_backend_is_an_overload(start: Start, gpu: FakeUpstream) -> None:
    proxy = start(backends={"vllm": backend(gpu)})
    gpu.default = status(503)
    assert_error(ask(proxy), 529, "overloaded_error")
    gpu.kill()
    assert_error(ask(proxy, stream=True), 529, "overloaded_error")


def test_an_error_in_the_stream_is_its_last_event(proxy: RunningProxy, fake: FakeUpstream) -> None:
    async def breaks(talk: Talk) -> None:
        await talk.start_stream()
        await talk.event(delta("hel"))
        await until_seen()
        await talk.event({"error": {"message": "gone", "type": "InternalServerError", "code": 500}})
        await talk.end()

    fake.scripts.append(breaks)
    seen.clear()
    body = {**HI, "stream": True, "continuation": "none"}
    with httpx.stream("POST", f"{proxy.url}/v1/messages", json=body, verify=False, timeout=20) as answer:
        lines = answer.iter_lines()
        first = [next(lines), next(lines)]
        seen.set()
        rest = list(lines)
    assert first[0] == "event: message_start"
    assert "event: message_stop" not in rest
    error = json.loads(rest[-2].removeprefix("data: "))
    assert rest[-3] == "event: error"
    assert (error["type"], error["error"]["type"]) == ("error", "api_error")
    assert "gone" in error["error"]["message"]


# -- keys --------------------------------------------------------------------------------------------------------------


def test_a_key_may_be_in_either_header(start: Start, gpu: FakeUpstream) -> None:
    key, hash = new_key()
    proxy = start(backends={"vllm": backend(gpu)}, api_keys=[hash])
    good_keys: list[Json] = [{"x-api-key": key}, {"authorization": f"Bearer {key}"}]
    for headers in [*good_keys, {"x-api-key": "sk-ant-other", "authorization": f"Bearer {key}"}]:
        assert ask(proxy, headers=headers).status_code == 200
        assert ask(proxy, "/v1/messages/count_tokens", headers=headers).status_code == 200
    for headers in ({}, {"x-api-key": "sk-ant-other"}, {"x-api-key": ""}, {"x-api-key": hash}):
        assert_error(ask(proxy, headers=headers), 401, "authentication_error")
        assert_error(ask(proxy, "/v1/messages/count_tokens", headers=headers), 401, "authentication_error")
        assert_error(get(f"{proxy.url}/v1/models", headers={**VERSION, **headers}), 401, "authentication_error")


# -- counting ----------------------------------------------------------------------------------------------------------


def count(proxy: RunningProxy, **fields: Any) -> httpx.Response:
    body = {"model": "m", "messages": HI["messages"], **fields}
    return post(f"{proxy.url}/v1/messages/count_tokens", json=body, headers=VERSION)


def test_a_replica_counts(proxy: RunningProxy, fake: FakeUpstream) -> None:
    fake.scripts.append(answers({"count": 3, "tokens": [1, 2, 3]}))
    answer = count(proxy, system="Be brief.", tools=[READ])
    assert (answer.status_code, answer.json()) == (200, {"input_tokens": 3})
    [talk] = fake.talks
    assert talk.path == "/tokenize"
    assert talk.json["messages"][0] == {"role": "system", "content": "Be brief."}
    assert list(talk.json) == ["model", "messages", "tools"]


@pytest.mark.parametrize("script", [status(404), answers({}), status(500)])
def test_where_none_can_it_is_an_estimate(proxy: RunningProxy, fake: FakeUpstream, script: Callable[..., Any]) -> None:
    fake.scripts.append(script)
    answer = count(proxy, system="word " * 100)
    assert answer.status_code == 200
    assert 80 < answer.json()["input_tokens"] < 160


def test_a_prompt_that_is_too_long_is_counted(proxy: RunningProxy, fake: FakeUpstream) -> None:
    """Clients count in order to know that."""
    fake.scripts.append(answers({"tokens": [1] * 5000}))
    assert count(proxy, system="word " * 5000).json() == {"input_tokens": 5000}


def test_counting_errors(proxy: RunningProxy) -> None:
    assert "messages" in assert_error(count(proxy, messages=[]), 400, "invalid_request_error")
    assert_error(count(proxy, model="none"), 404, "not_found_error")
    assert_error(get(f"{proxy.url}/v1/messages/count_tokens", headers=VERSION), 405, "invalid_request_error")


def test_without_a_backend_it_is_an_estimate(start: Start, gpu: FakeUpstream) -> None:
    proxy = start(backends={"vllm": backend(gpu)})
    gpu.kill()
    wait_until(lambda: not any(replica.up for replica in proxy.gateway.fleet.replicas))
    assert count(proxy).json()["input_tokens"] > 0


# -- models ------------------------------------------------------------------------------------------------------------


def card(name: str) -> Json:
    return {"id": name, "created": 1_700_000_000, "context_length": 2048}


def test_models_in_anthropics_shape(proxy: RunningProxy) -> None:
    listed = get(f"{proxy.url}/v1/models?limit=1000", headers=VERSION).json()
    assert [each["id"] for each in listed["data"]] == ["m"]
    assert (listed["has_more"], listed["first_id"], listed["last_id"]) == (False, "m", "m")
    one = get(f"{proxy.url}/v1/models/m", headers=VERSION).json()
    assert one == listed["data"][0]
    assert (one["type"], one["display_name"], one["max_input_tokens"]) == ("model", "m", 2048)
    assert "object" in get(f"{proxy.url}/v1/models").json()


def test_an_unknown_model_and_a_bad_limit(proxy: RunningProxy) -> None:
    assert_error(get(f"{proxy.url}/v1/models/none", headers=VERSION), 404, "not_found_error")
    for limit in ("0", "1001", "x", "-1", "²"):
        url = f"{proxy.url}/v1/models?limit={limit}"
        assert "limit" in assert_error(get(url, headers=VERSION), 400, "invalid_request_error")


def test_pages() -> None:
    cards = [card(name) for name in "abcde"]
    seen: list[str] = []
    page = models_page(cards, {"limit": "2"})
    while True:
        seen += [each["id"] for each in page["data"]]
        if not page["has_more"]:
            break
        page = models_page(cards, {"limit": "2", "after_id": page["last_id"]})
    assert seen == list("abcde")
    assert models_page([], {})["first_id"] is None
    assert [each["id"] for each in models_page(cards, {"after_id": "gone"})["data"]] == seen
    assert model_info(card("a"))["created_at"] == "2023-11-14T22:13:20Z"


def test_the_root_answers_a_probe(proxy: RunningProxy) -> None:
    assert httpx.head(f"{proxy.url}/", verify=False, timeout=20).status_code == 200
    assert "/v1/messages" in get(f"{proxy.url}/").json()["api"]
