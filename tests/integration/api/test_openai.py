"""/v1/models, and what all inference routes have in common."""

from __future__ import annotations

import json
from collections.abc import Callable, Iterator
from typing import Any

import httpx
import orjson
import pytest

from tests.support.fake_upstream import FakeUpstream, Talk
from tests.support.running_proxy import CHAT, RunningProxy, backend, chat, get, post, running_proxy
from xgen_proxy.forwarding.delivery import Delivery


@pytest.fixture(scope="module")
def proxy(fake: FakeUpstream) -> Iterator[RunningProxy]:
    backends = {
        "vllm": backend(fake, models={"org/big": "m", "shared": "m"}),
        "llama_cpp": backend(fake, device_class="cpu", models={"shared": "m"}, embeddings=True, context=512),
    }
    with running_proxy(backends=backends) as running:
        yield running


def test_models_are_listed(proxy: RunningProxy) -> None:
    listed = get(f"{proxy.url}/v1/models").json()
    both = {"object": "model", "created": proxy.gateway.started, "owned_by": "xgen-proxy"}
    capabilities = [card.pop("capabilities") for card in listed["data"]]
    assert listed == {
        "object": "list",
        "data": [
            {"id": "org/big", **both, "backends": ["vllm"], "max_model_len": 2048, "context_length": 2048},
            {"id": "shared", **both, "backends": ["llama_cpp", "vllm"], "max_model_len": 512, "context_length": 512},
        ],
    }
    vllm, llama_cpp = (backend.capabilities for backend in reversed(proxy.gateway.fleet.backends))
    assert capabilities == [sorted(vllm), sorted(vllm | llama_cpp)]


def test_an_unknown_context_is_left_out(proxy: RunningProxy, monkeypatch: pytest.MonkeyPatch) -> None:
    for each in proxy.gateway.fleet.backends:
        monkeypatch.setattr(each, "context", None)
    card = get(f"{proxy.url}/v1/models/shared").json()
    assert card["id"] == "shared"
    assert card.keys().isdisjoint({"max_model_len", "context_length"})


@pytest.mark.parametrize("name", ["org/big", "shared"])
def test_a_model_has_a_card(proxy: RunningProxy, name: str) -> None:
    assert get(f"{proxy.url}/v1/models/{name}").json()["id"] == name


def test_an_unknown_model_is_404(proxy: RunningProxy) -> None:
    answers = [get(f"{proxy.url}/v1/models/none"), chat(proxy, model="none")]
    for answer in answers:
        assert answer.status_code == 404
        error = answer.json()["error"]
        assert (error["code"], error["param"]) == ("model_not_found", "model")
        assert "known models: org/big, shared" in error["message"]


def test_before_any_backend_was_reached_models_are_unknown(
    start: Callable[..., RunningProxy], gpu: FakeUpstream
) -> None:
    gpu.kill()
    proxy = start(up=0, backends={"vllm": backend(gpu)})
    assert get(f"{proxy.url}/v1/models").json() == {"object": "list", "data": []}
    assert "none yet" in get(f"{proxy.url}/v1/models/m").json()["error"]["message"]
    for fields in ({"model": None}, {"model": "m"}):
        answer = chat(proxy, **fields)
        assert answer.status_code == 503
        assert "reached yet" in answer.json()["error"]["message"]
        assert answer.headers["retry-after"] == "5"


def test_models_stay_known_while_their_backend_is_down(start: Callable[..., RunningProxy], gpu: FakeUpstream) -> None:
    proxy = start(backends={"vllm": backend(gpu)})
    gpu.kill()
    assert chat(proxy).status_code == 503
    assert [each["id"] for each in get(f"{proxy.url}/v1/models").json()["data"]] == ["m"]
    assert chat(proxy, model="none").status_code == 404
    down = chat(proxy)
    assert (down.status_code, down.headers["x-should-retry"]) == (503, "false")
    assert "is up now" in down.json()["error"]["message"]


def test_public_names_become_the_backends_own(proxy: RunningProxy, fake: FakeUpstream) -> None:
    fake.talks.clear()
    answer = chat(proxy, model="org/big")
    assert answer.json()["model"] == "org/big"
    assert fake.talks[-1].json["model"] == "m"
    assert chat(proxy, model=None).json()["model"] == "org/big"


def test_embeddings_go_to_a_backend_that_supports_them(proxy: RunningProxy, fake: FakeUpstream) -> None:
    async def embed(talk: Talk) -> None:
        assert talk.path == "/v1/embeddings"
        await talk.answer(200, {"object": "list", "model": "m", "data": [], "usage": {"prompt_tokens": 1}})

    fake.scripts.append(embed)
    answer = post(f"{proxy.url}/v1/embeddings", json={"model": "shared", "input": "x"})
    assert (answer.status_code, answer.headers["x-backend"]) == (200, "llama_cpp")
    assert answer.json()["model"] == "shared"
    refused = post(f"{proxy.url}/v1/embeddings", json={"model": "org/big", "input": "x"})
    assert refused.status_code == 400
    assert "cannot do embeddings" in refused.json()["error"]["message"]


@pytest.mark.parametrize("stream", [False, True])
def test_an_internal_error_has_openais_shape(
    proxy: RunningProxy, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture, stream: bool
) -> None:
    async def fault(*_: object) -> None:
        raise ZeroDivisionError("SECRET")

    monkeypatch.setattr(Delivery, "deliver", fault)
    answer = chat(proxy, model="shared", stream=stream, headers={"x-request-id": "find-me"})
    assert answer.status_code == 500
    assert answer.json()["error"]["type"] == "api_error"
    assert "find-me" in answer.json()["error"]["message"]
    assert "SECRET" not in answer.text
    assert any("find-me" in record.getMessage() for record in caplog.records)


def test_an_internal_error_in_a_stream_is_its_last_event(proxy: RunningProxy, monkeypatch: pytest.MonkeyPatch) -> None:
    async def fault(self: Delivery, *_: object) -> None:
        await self.writer.send(b"data: {}\n\n")
        raise ZeroDivisionError

    monkeypatch.setattr(Delivery, "relay", fault)
    answer = chat(proxy, model="shared", stream=True)
    assert answer.status_code == 200
    *_, last = answer.text.removesuffix("\n\n").split("\n\n")
    assert orjson.loads(last.removeprefix("data: "))["error"]["type"] == "api_error"
    assert "[DONE]" not in answer.text


def error_of(answer: httpx.Response) -> dict[str, Any]:
    """Of a whole answer, or in the last event of a stream."""
    error: dict[str, Any] = json.loads(answer.text.rstrip().removeprefix("data: "))["error"]
    return error


async def nonsense(talk: Talk) -> None:
    await talk.start_stream()
    await talk.event("{not json")
    await talk.end()


async def no_choices(talk: Talk) -> None:
    await talk.start_stream()
    await talk.event({"id": "x", "object": "chat.completion.chunk"})
    await talk.end()


async def no_chunk(talk: Talk) -> None:
    await talk.start_stream()
    await talk.event([1])
    await talk.end()


@pytest.mark.parametrize("dialect", ["llama-server", "llama-cpp-python"])
def test_a_malformed_stream_is_not_an_internal_error(
    start: Callable[..., RunningProxy], gpu: FakeUpstream, dialect: str, caplog: pytest.LogCaptureFixture
) -> None:
    proxy = start(backends={"cpu": backend(gpu, dialect=dialect)})
    for script in (nonsense, no_choices, no_chunk):
        gpu.default = script
        whole = chat(proxy)
        assert (whole.status_code, whole.json()["error"]["code"]) == (502, "all_backends_failed")
        [replica] = proxy.gateway.fleet.replicas
        replica.set_state("up", "for the next try")
        stream = chat(proxy, stream=True)
        expected = (502, "all_backends_failed") if script is no_chunk else (200, "stream_broken")
        assert (stream.status_code, error_of(stream)["code"]) == expected
        replica.set_state("up", "for the next try")
    assert [record for record in caplog.records if record.levelname == "ERROR"] == []


# aliases

ALIASES = {
    "gpt-4o": "org/big",
    "claude-*": {"model": "org/big", "route": "gpu"},
    "claude-*haiku*": {"model": "shared", "route": "cpu", "urgency": "low"},
    "lost-*": "gone",
}


@pytest.fixture(scope="module")
def aliased(fake: FakeUpstream) -> Iterator[RunningProxy]:
    backends = {
        "vllm": backend(fake, models={"org/big": "m", "shared": "m"}),
        "llama_cpp": backend(fake, device_class="cpu", models={"shared": "m"}, embeddings=True),
    }
    with running_proxy(backends=backends, models={"aliases": ALIASES}, default_model="gpt-4o") as running:
        yield running


@pytest.mark.parametrize("stream", [False, True])
@pytest.mark.parametrize(
    ("name", "first", "reason"),
    [
        ("gpt-4o", "vllm", "only: no CPU backend is up that can do it"),
        ("claude-opus-4-1", "vllm", "only: no CPU backend is up that can do it"),
        ("claude-haiku-4-5", "llama_cpp", "alias: claude-*haiku* goes to the CPU first"),
        ("shared", "vllm", "default: GPU load 0.00 < 1"),
    ],
)
def test_the_answer_carries_the_name_that_the_client_sent(
    aliased: RunningProxy, fake: FakeUpstream, name: str, first: str, reason: str, stream: bool
) -> None:
    fake.talks.clear()
    answer = chat(aliased, model=name, stream=stream)
    assert (answer.status_code, answer.headers["x-backend"], answer.headers["x-route-reason"]) == (200, first, reason)
    assert f'"model":"{name}"' in answer.text.replace(": ", ":")
    assert '"model":"m"' not in answer.text.replace(": ", ":")
    assert fake.talks[-1].json["model"] == "m"


def test_aliases_hold_on_every_endpoint(aliased: RunningProxy, fake: FakeUpstream) -> None:
    async def completes(talk: Talk) -> None:
        choice = {"index": 0, "text": "hello", "logprobs": None, "finish_reason": "stop"}
        await talk.answer(200, {"id": "c", "object": "text_completion", "model": "m", "choices": [choice]})

    async def embeds(talk: Talk) -> None:
        await talk.answer(200, {"object": "list", "model": "m", "data": [], "usage": {"prompt_tokens": 1}})

    fake.scripts += [completes, embeds, completes]
    haiku = "claude-3-5-haiku-20241022"
    completion = post(f"{aliased.url}/v1/completions", json={"model": haiku, "prompt": "Hi"})
    embedding = post(f"{aliased.url}/v1/embeddings", json={"model": haiku, "input": "Hi"})
    generated = post(f"{aliased.url}/generate", json={"model": haiku, "prompt": "Hi"})
    assert completion.json()["model"] == embedding.json()["model"] == haiku
    assert generated.json()["backend_used"] == "llama_cpp"
    for answer in (completion, generated):
        assert answer.headers["x-route-reason"] == "alias: claude-*haiku* goes to the CPU first"
    assert {talk.json["model"] for talk in fake.talks[-3:]} == {"m"}


def test_the_dry_run_shows_the_alias(aliased: RunningProxy) -> None:
    body = {"model": "claude-haiku-4-5", "messages": [{"role": "user", "content": "Hi"}]}
    shown = post(f"{aliased.url}/route", json=body).json()
    assert shown["candidates"][0]["backend"] == "llama_cpp"
    assert shown["features"]["model"] == "shared"
    assert shown["features"]["urgency"] == "low"
    assert shown["features"]["alias"] == {"asked": "claude-haiku-4-5", "pattern": "claude-*haiku*", "route": "cpu"}


def test_an_alias_of_a_model_that_is_gone_is_a_404_with_both_names(aliased: RunningProxy) -> None:
    for answer in (chat(aliased, model="lost-one"), chat(aliased, model="lost-one", stream=True)):
        assert answer.status_code == 404
        error = answer.json()["error"]
        assert (error["code"], error["param"]) == ("model_not_found", "model")
        assert "'gone', for which 'lost-one' stands (models.aliases, lost-*), does not exist" in error["message"]
    assert get(f"{aliased.url}/v1/models/lost-one").status_code == 404


def test_aliases_are_listed_with_an_example_of_each_pattern(aliased: RunningProxy) -> None:
    cards = {card["id"]: card for card in get(f"{aliased.url}/v1/models").json()["data"]}
    assert list(cards) == ["org/big", "shared", "gpt-4o", "claude-xgen-org-big", "claude-haiku-xgen-shared"]
    assert cards["claude-xgen-org-big"] == {**cards["org/big"], "id": "claude-xgen-org-big", "alias_of": "org/big"}
    for name in ("gpt-4o", "claude-xgen-org-big", "claude-anything"):
        card = get(f"{aliased.url}/v1/models/{name}").json()
        assert (card["id"], card["alias_of"]) == (name, "org/big")
        assert chat(aliased, model=name).status_code == 200


def test_metrics_and_status_name_the_model_and_never_the_clients_word(aliased: RunningProxy) -> None:
    assert chat(aliased, model="claude-secret-word").status_code == 200
    page = get(f"{aliased.url}/metrics").text
    assert 'model="org/big"' in page
    assert "claude" not in page
    status = get(f"{aliased.url}/models/status").json()["aliases"]
    assert status["lost-*"] == {"model": "gone", "route": None, "urgency": None, "served": False}
    assert status["claude-*haiku*"] == {"model": "shared", "route": "cpu", "urgency": "low", "served": True}


def test_new_aliases_hold_from_the_next_request_on(fake: FakeUpstream) -> None:
    with running_proxy(backends={"vllm": backend(fake)}) as proxy:
        assert chat(proxy, model="gpt-4o").status_code == 404
        models = proxy.gateway.settings.models.model_validate({"aliases": {"gpt-4o": "m"}})
        settings = proxy.gateway.settings.model_copy(update={"models": models})
        proxy.gateway.configure(settings)
        assert chat(proxy, model="gpt-4o").json()["model"] == "gpt-4o"


def test_a_large_max_tokens_does_not_make_work_long(proxy: RunningProxy) -> None:
    for tokens, word in ((4096, "long_output"), (32_000, "default")):
        answer = post(f"{proxy.url}/route", json={**CHAT, "model": "shared", "max_tokens": tokens})
        assert answer.json()["candidates"][0]["reason"].partition(":")[0] == word
