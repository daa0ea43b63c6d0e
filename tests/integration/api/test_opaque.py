"""The opaque endpoints, from the client's bytes to the backend's and back."""

from __future__ import annotations

import re
import socket
from collections.abc import Callable, Iterator
from typing import Any

import httpx
import openai
import pytest

from tests.support.fake_upstream import FakeUpstream, Talk, status
from tests.support.forms import AUDIO, BOUNDARY, FORM, field, file, form
from tests.support.running_proxy import RunningProxy, backend, get, post, running_proxy, wait_until
from xgen_proxy.api.api_keys import hash_key
from xgen_proxy.request.opaque.endpoints import OPAQUE

Start = Callable[..., RunningProxy]
RERANK = {"model": "public", "query": "a", "documents": ["b", "c"]}
AUDIO_PATH = "/v1/audio/transcriptions"
LIMIT = 12 * 1024 * 1024
MODEL = field("model", b"public")


async def echo(talk: Talk) -> None:
    await talk.answer(200, {"object": "list", "model": "m", "results": [], "usage": {"total_tokens": 3}})


@pytest.fixture(scope="module")
def proxy(fake: FakeUpstream) -> Iterator[RunningProxy]:
    fake.default = echo
    only = backend(fake, models={"public": "m"}, first_byte_timeout_s=20)
    with running_proxy(backends={"vllm": only}, limits={"upload_bytes": LIMIT}) as running:
        yield running


@pytest.fixture(autouse=True)
def forget(fake: FakeUpstream) -> None:
    fake.talks.clear()


def send(proxy: RunningProxy, raw: bytes, path: str = AUDIO_PATH, **headers: str) -> httpx.Response:
    return post(proxy.url + path, content=raw, headers={"content-type": FORM, **headers})


# JSON


@pytest.mark.parametrize(
    ("path", "at_the_backend"),
    [
        ("/v1/rerank", "/v1/rerank"), ("/rerank", "/v1/rerank"), ("/v2/rerank", "/v1/rerank"),
        ("/v1/reranking", "/v1/rerank"), ("/v1/score", "/v1/score"), ("/score", "/v1/score"),
        ("/v1/classify", "/classify"), ("/classify", "/classify"), ("/tokenize", "/tokenize"),
        ("/v1/tokenize/", "/tokenize"), ("/detokenize", "/detokenize"),
    ],
)  # fmt: skip
def test_json_passes_with_the_name_that_the_backend_knows(
    proxy: RunningProxy, fake: FakeUpstream, path: str, at_the_backend: str
) -> None:
    body = {**RERANK, "top_n": 1, "priority": -5, "temperature": "none of our business"}
    answer = post(proxy.url + path, json=body, headers={"x-request-id": "mine"})
    assert answer.status_code == 200, answer.text
    assert answer.json() == {"object": "list", "model": "public", "results": [], "usage": {"total_tokens": 3}}
    [talk] = fake.talks
    assert talk.path == at_the_backend
    assert talk.headers["content-type"] == "application/json"
    sent = {name: value for name, value in body.items() if name != "priority"}
    assert talk.json == {**sent, "model": "m"}
    assert answer.headers["x-request-id"] == "mine"
    assert (answer.headers["x-backend"], answer.headers["x-attempts"]) == ("vllm", "1")
    assert answer.headers["x-route-reason"].startswith("only:")


def test_a_body_that_needs_no_change_is_sent_as_it_came(start: Start, gpu: FakeUpstream) -> None:
    gpu.default = echo
    proxy = start(backends={"vllm": backend(gpu)})
    raw = b'{ "model" : "m", "query": "\\u00e9", "documents": [] }'
    assert post(f"{proxy.url}/v1/rerank", content=raw, headers={"content-type": "application/json"}).is_success
    assert gpu.talks[0].body == raw


@pytest.mark.parametrize(
    ("body", "words"),
    [
        (b"", "empty"), (b"[]", "JSON object"), (b"{", "not valid JSON"), (b'{"model": 5}', "model must be a string"),
        (b'{"documents": [' + b'"a",' * 3000 + b'"a"]}', "documents has 3001 texts"),
        (b'{"messages": [' + b"{}," * 10_000 + b"{}]}", "messages has more than 10000 entries"),
    ],
)  # fmt: skip
def test_bad_json_is_refused(proxy: RunningProxy, fake: FakeUpstream, body: bytes, words: str) -> None:
    answer = post(f"{proxy.url}/v1/rerank", content=body, headers={"content-type": "application/json"})
    assert answer.status_code == 400
    assert words in answer.json()["error"]["message"]
    assert fake.talks == []


def test_an_unknown_model_is_404(proxy: RunningProxy) -> None:
    for answer in (
        post(f"{proxy.url}/tokenize", json={"model": "none", "prompt": "a"}),
        send(proxy, form(field("model", b"none"), file())),
    ):
        assert (answer.status_code, answer.json()["error"]["code"]) == (404, "model_not_found")


def test_keys_are_checked(start: Start, gpu: FakeUpstream) -> None:
    proxy = start(backends={"vllm": backend(gpu)}, api_keys=[hash_key("sk-mine")])
    for endpoint in OPAQUE.values():
        assert post(proxy.url + endpoint.path, content=b"{not json").status_code == 401
    assert gpu.talks == []


def test_metrics_and_methods(proxy: RunningProxy) -> None:
    assert send(proxy, form(MODEL, file())).is_success
    assert get(f"{proxy.url}/v1/rerank").status_code == 405
    page = get(f"{proxy.url}/metrics").text
    assert re.search(r'xgen_requests_total\{.*endpoint="transcriptions".*\} ', page)
    assert re.search(r'xgen_refused_requests_total\{.*endpoint="rerank".*\} ', page)


def test_aliases_hold(start: Start, gpu: FakeUpstream) -> None:
    gpu.default = echo
    proxy = start(backends={"vllm": backend(gpu)}, models={"aliases": {"rerank-*": {"model": "m", "urgency": "low"}}})
    answer = post(f"{proxy.url}/v1/rerank", json={**RERANK, "model": "rerank-v3.5"})
    assert (answer.status_code, answer.json()["model"]) == (200, "rerank-v3.5")
    assert send(proxy, form(field("model", b"rerank-x"), file())).json()["model"] == "rerank-x"
    assert gpu.talks[0].json["model"] == "m"
    assert gpu.talks[1].body == form(field("model", b"m"), file())


# a backend that has it


def test_a_request_goes_to_the_backend_that_has_its_route(start: Start, gpu: FakeUpstream, cpu: FakeUpstream) -> None:
    gpu.routes, cpu.routes = ["/tokenize", "/detokenize", "/v1/chat/completions"], ["/v1/rerank", "/v1/score"]
    gpu.default = cpu.default = echo
    proxy = start(backends={"big": backend(gpu), "small": backend(cpu, device_class="cpu")})
    for path, name in (("/v1/rerank", "small"), ("/v1/score", "small"), ("/tokenize", "big"), ("/detokenize", "big")):
        answer = post(proxy.url + path, json={"model": "m"})
        assert (answer.headers["x-backend"], answer.headers["x-attempts"]) == (name, "1")
    refused = [post(f"{proxy.url}/classify", json={"model": "m"}), send(proxy, form(field("model", b"m"), file()))]
    for answer, what in zip(refused, ("classify", "transcriptions"), strict=True):
        assert answer.status_code == 400
        message = answer.json()["error"]["message"]
        assert "with the model 'm'" in message
        assert f"big cannot do {what}; small cannot do {what}" in message
    cards = get(f"{proxy.url}/v1/models").json()["data"]
    assert {"rerank", "score", "tokenize"} <= set(cards[0]["capabilities"])
    assert not {"classify", "transcriptions"} & set(cards[0]["capabilities"])


@pytest.mark.parametrize("reranks", [True, False])
def test_llama_server_is_asked_whether_it_reranks(start: Start, cpu: FakeUpstream, reranks: bool) -> None:
    cpu.reranks, cpu.default = reranks, echo
    proxy = start(backends={"cpu": backend(cpu, dialect="llama-server")})
    answer = post(f"{proxy.url}/rerank", json={**RERANK, "model": "m"})
    assert answer.status_code == (200 if reranks else 400)
    assert len(cpu.talks) == int(reranks)


@pytest.mark.parametrize("detail", ["Not Found", "Method Not Allowed"])
def test_an_engine_that_does_not_tell_its_routes_is_asked_once(
    start: Start, gpu: FakeUpstream, cpu: FakeUpstream, detail: str
) -> None:
    gpu.default, cpu.default = status(404 if "Found" in detail else 405, {"detail": detail}), echo
    proxy = start(backends={"vllm": backend(gpu), "other": backend(cpu, dialect="openai", device_class="cpu")})
    answers = [post(f"{proxy.url}/v1/rerank", json={**RERANK, "model": "m"}) for _ in range(2)]
    assert [answer.status_code for answer in answers] == [200, 200]
    assert [answer.headers["x-attempts"] for answer in answers] == ["2", "1"]
    assert all(replica.up for replica in proxy.gateway.fleet.replicas)


def test_a_missing_route_of_the_only_backend_is_400(start: Start, gpu: FakeUpstream) -> None:
    gpu.default = status(404, {"detail": "Not Found"})
    proxy = start(backends={"vllm": backend(gpu)})
    for _ in range(2):
        answer = post(f"{proxy.url}/score", json={"model": "m", "text_1": "a", "text_2": "b"})
        assert answer.status_code == 400
        assert "with the model 'm'" in answer.json()["error"]["message"]
    assert len(gpu.talks) == 1


def test_an_unknown_lora_is_not_taken_for_a_missing_route(start: Start, gpu: FakeUpstream) -> None:
    gpu.default = status(404, {"error": {"message": "The model `m` does not exist.", "code": 404}})
    proxy = start(backends={"vllm": backend(gpu)})
    for _ in range(2):
        assert post(f"{proxy.url}/tokenize", json={"model": "m", "prompt": "a"}).status_code == 503
    assert len(gpu.talks) == 2


# forms


@pytest.mark.parametrize("path", [AUDIO_PATH, "/audio/transcriptions", "/v1/audio/translations"])
def test_a_form_passes_with_the_name_that_the_backend_knows(proxy: RunningProxy, fake: FakeUpstream, path: str) -> None:
    answer = send(
        proxy, form(file(), MODEL, field("language", b"en"), field("priority", b"-5"), field("backend", b"vllm")), path
    )
    assert answer.status_code == 200, answer.text
    [talk] = fake.talks
    assert talk.path == f"/v1{path.removeprefix('/v1')}"
    assert talk.headers["content-type"] == FORM
    assert talk.body == form(field("model", b"m"), file(), field("language", b"en"))


def test_the_openai_sdks_form_passes(start: Start, gpu: FakeUpstream) -> None:
    async def transcribe(talk: Talk) -> None:
        assert AUDIO in talk.body
        await talk.answer(200, {"text": "hello"})

    gpu.default = transcribe
    proxy = start(backends={"vllm": backend(gpu, models={"whisper": "m"})})
    with openai.OpenAI(base_url=f"{proxy.url}/v1", api_key="none", max_retries=0) as client:
        answer = client.audio.transcriptions.create(model="whisper", file=("a.wav", AUDIO), language="en")
    assert answer.text == "hello"


def test_a_form_of_any_framing_passes(proxy: RunningProxy, fake: FakeUpstream) -> None:
    raw = form(file(AUDIO.ljust(300_000, b"\0")), MODEL)

    def pieces() -> Iterator[bytes]:  # chunked
        for at in range(0, len(raw), 50_000):
            yield raw[at : at + 50_000]

    answer = post(proxy.url + AUDIO_PATH, content=pieces(), headers={"content-type": FORM})
    assert answer.status_code == 200
    assert fake.talks[0].body == form(field("model", b"m"), file(AUDIO.ljust(300_000, b"\0")))


def test_the_default_model_is_put_into_a_form_without_one(proxy: RunningProxy, fake: FakeUpstream) -> None:
    assert send(proxy, form(file())).status_code == 200
    assert fake.talks[0].body == form(field("model", b"m"), file())


@pytest.mark.parametrize("framing", ["length", "chunked"])
def test_ten_megabytes_pass_and_more_than_the_limit_does_not(
    proxy: RunningProxy, fake: FakeUpstream, framing: str
) -> None:
    def sent(size: int) -> httpx.Response:
        raw = form(MODEL, file(AUDIO.ljust(size, b"\0")))
        content: Any = raw if framing == "length" else iter([raw[:-10], raw[-10:]])
        return post(proxy.url + AUDIO_PATH, content=content, headers={"content-type": FORM})

    assert sent(10 * 1024 * 1024).status_code == 200
    assert len(fake.talks[0].body) > 10 * 1024 * 1024
    answer = sent(LIMIT)
    assert (answer.status_code, answer.json()["error"]["code"]) == (413, "request_too_large")
    assert str(LIMIT) in answer.json()["error"]["message"]
    assert len(fake.talks) == 1


HOSTILE = {
    "broken": (form(MODEL, file())[:-8], 400, "cut short"),
    "two models": (form(MODEL, MODEL, file()), 400, "2 fields named model"),
    "a huge header": (form(MODEL, b"X: %b\r\n%b" % (b"y" * 1_000_000, file())), 400, "4096 bytes"),
    "no form": (b"\0" * 1000, 400, "begin with its boundary"),
    "JSON": (b"{}", 400, "begin with its boundary"),
    "nothing": (b"", 400, "begin with its boundary"),
    "no fields": (b"--%b--\r\n" % BOUNDARY, 200, ""),
    "no file": (form(MODEL), 200, ""),
}


@pytest.mark.parametrize(("raw", "code", "words"), HOSTILE.values(), ids=HOSTILE)
def test_hostile_forms(proxy: RunningProxy, fake: FakeUpstream, raw: bytes, code: int, words: str) -> None:
    """What is missing in a well-formed form is for the engine to say."""
    answer = send(proxy, raw)
    assert answer.status_code == code, answer.text
    assert words in answer.text
    assert len(fake.talks) == (code == 200)


@pytest.mark.parametrize("content_type", ["application/json", "audio/wav", "multipart/mixed; boundary=a", ""])
def test_other_media_types_are_415(proxy: RunningProxy, content_type: str) -> None:
    answer = post(proxy.url + AUDIO_PATH, content=b"{}", headers={"content-type": content_type})
    assert answer.status_code == 415
    assert "multipart/form-data" in answer.json()["error"]["message"]


def test_a_boundary_that_would_write_headers_is_refused(proxy: RunningProxy, fake: FakeUpstream) -> None:
    answer = post(
        proxy.url + AUDIO_PATH, content=b"--a", headers={"content-type": "multipart/form-data; boundary=a; x=y"}
    )
    assert answer.status_code == 400
    assert "boundary" in answer.json()["error"]["message"]
    assert fake.talks == []


def test_a_client_that_leaves_in_the_middle_of_its_upload_holds_nothing(
    proxy: RunningProxy, fake: FakeUpstream
) -> None:
    head = f"POST {AUDIO_PATH} HTTP/1.1\r\nhost: x\r\ncontent-type: {FORM}\r\ncontent-length: 5000000\r\n\r\n"
    with socket.create_connection(("127.0.0.1", proxy.port), timeout=10) as client:
        client.sendall(head.encode() + form(MODEL, file(b"\0" * 1_000_000))[:900_000])
        wait_until(lambda: proxy.gateway.bodies.used > 0)
    wait_until(lambda: proxy.gateway.bodies.used == 0)
    assert fake.talks == []
    assert send(proxy, form(MODEL, file())).status_code == 200


def test_a_client_that_leaves_before_the_answer_frees_its_slot_once(proxy: RunningProxy, fake: FakeUpstream) -> None:
    left: list[bool] = []

    async def silent(talk: Talk) -> None:
        await talk.until_client_leaves()
        left.append(True)

    fake.scripts.append(silent)
    raw = form(MODEL, file())
    head = f"POST {AUDIO_PATH} HTTP/1.1\r\nhost: x\r\ncontent-type: {FORM}\r\ncontent-length: {len(raw)}\r\n\r\n"
    [replica] = proxy.gateway.fleet.replicas
    with socket.create_connection(("127.0.0.1", proxy.port), timeout=10) as client:
        client.sendall(head.encode() + raw)
        wait_until(lambda: fake.talks)
        assert replica.in_flight == 1
    wait_until(lambda: left and not replica.in_flight)
    assert proxy.gateway.bodies.used == 0


# failover


@pytest.mark.parametrize("size", [1000, 10 * 1024 * 1024])
def test_another_replica_takes_over_from_one_that_resets_in_the_middle_of_the_upload(
    start: Start, gpu: FakeUpstream, cpu: FakeUpstream, monkeypatch: pytest.MonkeyPatch, size: int
) -> None:
    raw = form(field("model", b"m"), file(AUDIO.ljust(size, b"\0")))
    gpu.default = cpu.default = echo
    proxy = start(backends={"vllm": backend(gpu), "other": backend(cpu, device_class="cpu")})
    serve = gpu._one

    async def reset_at_the_upload(reader: Any, writer: Any) -> bool:
        head = await reader.readuntil(b"\r\n\r\n")
        if not head.startswith(b"POST /v1/audio"):
            return await serve(Again(head, reader), writer)  # type: ignore[arg-type]
        await reader.read(500)
        writer.transport.abort()
        return False

    monkeypatch.setattr(gpu, "_one", reset_at_the_upload)
    answer = send(proxy, raw)
    assert answer.status_code == 200, answer.text
    assert (answer.headers["x-backend"], answer.headers["x-attempts"]) == ("other", "2")
    assert [talk.body for talk in cpu.talks] == [raw]
    assert gpu.talks == []


class Again:
    """A reader whose head was read before."""

    def __init__(self, head: bytes, reader: Any) -> None:
        self._head = head
        self._reader = reader
        self.readexactly = reader.readexactly
        self.read = reader.read

    async def readuntil(self, _: bytes) -> bytes:
        return self._head


def test_a_busy_replica_is_followed_by_the_next(start: Start, gpu: FakeUpstream, cpu: FakeUpstream) -> None:
    gpu.default, cpu.default = status(503), echo
    proxy = start(backends={"vllm": backend(gpu), "other": backend(cpu, device_class="cpu")})
    answer = post(f"{proxy.url}/v1/rerank", json={**RERANK, "model": "m"})
    assert (answer.status_code, answer.headers["x-backend"]) == (200, "other")


def test_a_rejection_is_the_clients(proxy: RunningProxy, fake: FakeUpstream) -> None:
    fake.scripts.append(status(400, {"error": {"message": "Invalid or unsupported audio file.", "code": 400}}))
    answer = send(proxy, form(MODEL, file()))
    assert answer.status_code == 400
    assert answer.json()["error"]["message"] == "Invalid or unsupported audio file."
