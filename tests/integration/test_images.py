"""A request with media goes to an engine that said it reads them, whole, and to no other."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest

from tests.support.fake_upstream import FakeUpstream, Talk, delta, status, whole
from tests.support.images import BLUE, RED, about, data_url, image, png_bytes
from tests.support.running_proxy import RunningProxy, backend, chat, get, post, text_of
from tests.support.waiting import wait_until

Start = Callable[..., RunningProxy]
AUDIO = {"type": "input_audio", "input_audio": {"data": "UklGRgAAAABXQVZF", "format": "wav"}}
PICTURE = about(image())


def of_engine(proxy: RunningProxy, name: str) -> set[str]:
    backends = get(f"{proxy.url}/models/status").json()["backends"]
    [found] = [each["capabilities"] for each in backends if each["name"] == name]
    return set(found)


@pytest.fixture
def proxy(start: Start, gpu: FakeUpstream, cpu: FakeUpstream) -> RunningProxy:
    """Two vLLMs under one model name; the one on the CPU cannot see."""
    gpu.sees, cpu.sees = True, False
    return start(backends={"gpu": backend(gpu), "cpu": backend(cpu, device_class="cpu")})


def test_what_an_engine_reads_is_learnt_from_it(proxy: RunningProxy) -> None:
    media = {"images", "video", "audio"}
    assert of_engine(proxy, "gpu") & media == {"images", "video"}
    assert of_engine(proxy, "cpu") & media == set()


def test_an_image_goes_where_it_is_seen(proxy: RunningProxy, gpu: FakeUpstream, cpu: FakeUpstream) -> None:
    hints: list[dict[str, Any]] = [{}, {"backend": "auto", "urgency": "low"}, {"stream": True}]
    for fields in hints:
        answer = chat(proxy, messages=PICTURE, **fields)
        assert (answer.status_code, answer.headers["x-backend"]) == (200, "gpu"), answer.text
    assert gpu.talks[-1].json["messages"] == PICTURE, "the image arrives as it was sent"
    gpu.running = 1000
    wait_until(lambda: chat(proxy).headers["x-backend"] == "cpu", what="text to spill")
    assert chat(proxy, messages=PICTURE).headers["x-backend"] == "gpu"
    assert all(b"image_url" not in talk.body for talk in cpu.talks)


def test_a_chosen_backend_that_cannot_see_is_the_clients_mistake(proxy: RunningProxy, cpu: FakeUpstream) -> None:
    answer = chat(proxy, messages=PICTURE, backend="cpu")
    assert answer.status_code == 400
    assert answer.json()["error"]["message"] == "backend cpu cannot do images"
    assert cpu.talks == []


def test_no_engine_that_sees(proxy: RunningProxy, gpu: FakeUpstream, cpu: FakeUpstream) -> None:
    """While the one that sees is down, the other is not asked: it would not know what the request is about."""
    gpu.kill()
    wait_until(lambda: not of_state(proxy, "gpu"))
    answer = chat(proxy, messages=PICTURE)
    assert answer.status_code == 503
    assert "no backend that can do this request is up" in answer.json()["error"]["message"]
    assert chat(proxy).status_code == 200
    assert all(b"image_url" not in talk.body for talk in cpu.talks)


def of_state(proxy: RunningProxy, name: str) -> bool:
    return any(replica.up for replica in proxy.gateway.fleet.backends_by_name[name].replicas)


def test_no_engine_could_ever_see(start: Start, cpu: FakeUpstream) -> None:
    cpu.sees = False
    proxy = start(backends={"cpu": backend(cpu)})
    for parts, need in (([image()], "images"), ([AUDIO], "audio"), ([AUDIO, image()], "audio, images")):
        answer = chat(proxy, messages=about(*parts))
        assert answer.status_code == 400
        assert f"cpu cannot do {need}" in answer.json()["error"]["message"]
    assert cpu.talks == []


def test_an_engine_is_asked_once_for_each_of_its_lives(start: Start, gpu: FakeUpstream) -> None:
    gpu.sees = False
    proxy = start(backends={"gpu": backend(gpu)})
    assert chat(proxy, messages=PICTURE).status_code == 400
    seen = gpu.scrapes
    wait_until(lambda: gpu.scrapes >= seen + 2, what="a whole health check and the beginning of the next")
    assert gpu.looks == 2, "one image, one sound"
    gpu.kill()
    wait_until(lambda: not of_state(proxy, "gpu"))
    gpu.sees = True  # started again with another model
    gpu.start()
    wait_until(lambda: of_state(proxy, "gpu"))
    assert gpu.looks == 4
    assert chat(proxy, messages=PICTURE).status_code == 200


async def nonsense(talk: Talk) -> None:
    await talk.answer(200, b"<html>")


async def hangs_up(talk: Talk) -> None:
    talk.reset()


async def is_silent(talk: Talk) -> None:
    await talk.until_client_leaves()


ODD = {"no JSON": nonsense, "no answer": hangs_up, "silence": is_silent, "500": status(500), "503": status(503),
       "a list": status(200, [1]), "another refusal": status(400)}  # fmt: skip


@pytest.mark.parametrize("script", ODD.values(), ids=ODD)
def test_an_engine_that_does_not_tell_says_it_when_it_refuses(
    start: Start, gpu: FakeUpstream, monkeypatch: pytest.MonkeyPatch, script: Any
) -> None:
    monkeypatch.setattr(gpu, "answer_media_probe", script)
    proxy = start(backends={"gpu": backend(gpu)}, scrape_timeout_s=0.3)
    assert "images" in of_engine(proxy, "gpu")
    gpu.scripts = [status(400, {"error": {"message": "m is not a multimodal model", "code": 400}})]
    answer = chat(proxy, messages=PICTURE)
    assert (answer.status_code, len(gpu.talks)) == (400, 1)
    assert "images" not in of_engine(proxy, "gpu")
    assert "gpu cannot do images" in chat(proxy, messages=PICTURE).json()["error"]["message"]
    assert len(gpu.talks) == 1, "it is not asked again"


def test_an_engine_that_costs_money_is_asked_nothing(start: Start, gpu: FakeUpstream) -> None:
    proxy = start(backends={"gpu": backend(gpu, dialect="openai")})
    assert chat(proxy, messages=PICTURE).status_code == 200
    assert gpu.looks == 0


def test_another_engine_that_sees_takes_over(start: Start, gpu: FakeUpstream, cpu: FakeUpstream) -> None:
    gpu.sees = cpu.sees = True
    proxy = start(backends={"gpu": backend(gpu), "cpu": backend(cpu, device_class="cpu")})
    gpu.scripts = [status(500)]
    answer = chat(proxy, messages=PICTURE)
    assert (answer.status_code, answer.headers["x-backend"]) == (200, "cpu")
    assert cpu.talks[0].json["messages"] == PICTURE


async def breaks(talk: Talk) -> None:
    await talk.start_stream()
    await talk.event(delta("A red "))
    await talk.event(delta("square"))
    talk.writer.close()


async def goes_on(talk: Talk) -> None:
    if talk.path == "/tokenize":
        return await talk.answer(200, {"tokens": [1, 2, 3]})
    await talk.start_stream()
    await talk.event(delta(" on a"))
    await talk.event(delta(" wall"))
    await talk.event(delta(finish="stop"))
    return await talk.end()


def test_a_stream_about_an_image_is_resumed_by_one_that_sees(
    start: Start, gpu: FakeUpstream, cpu: FakeUpstream, fake: FakeUpstream
) -> None:
    gpu.sees = cpu.sees = True
    fake.sees = False
    proxy = start(
        backends={
            "gpu": backend(gpu),
            "seeing": backend(cpu, device_class="cpu"),
            "blind": backend(fake, device_class="cpu"),
        }
    )
    gpu.scripts, cpu.default = [breaks], goes_on
    answer = chat(proxy, messages=PICTURE, stream=True)
    assert text_of(answer) == "A red square on a wall"
    [resumed] = [talk.json for talk in cpu.talks if talk.path != "/tokenize"]
    assert resumed["messages"] == [*PICTURE, {"role": "assistant", "content": "A red square"}]
    assert fake.talks == []


@pytest.mark.parametrize(
    "url", ["http://169.254.169.254/latest/", "file:///etc/passwd", "https://images.example.org/a"]
)
def test_no_engine_fetches_what_a_client_names(proxy: RunningProxy, gpu: FakeUpstream, url: str) -> None:
    answer = chat(proxy, messages=about(image(url)))
    error = answer.json()["error"]
    assert (answer.status_code, error["param"]) == (400, "messages.0.content.1.image_url.url")
    assert "must be a data URL" in error["message"]
    assert gpu.talks == []


@pytest.mark.parametrize("path", ["/v1/score", "/v1/rerank", "/tokenize"])
def test_no_engine_fetches_what_an_opaque_request_names(proxy: RunningProxy, gpu: FakeUpstream, path: str) -> None:
    part = image("http://169.254.169.254/latest/")
    body = {"model": "m", "documents": [{"content": [part]}], "messages": about(part), "query": "x"}
    answer = post(proxy.url + path, json=body)
    assert (answer.status_code, gpu.talks) == (400, [])
    assert "must be a data URL" in answer.json()["error"]["message"]


def test_an_engine_fetches_what_the_operator_allows(start: Start, gpu: FakeUpstream) -> None:
    proxy = start(backends={"gpu": backend(gpu)}, limits={"media_origins": ["https://*.example.org"]})
    allowed = about(image("https://images.example.org/a.png"))
    assert chat(proxy, messages=allowed).status_code == 200
    assert gpu.talks[0].json["messages"] == allowed
    assert chat(proxy, messages=about(image("https://example.org/a.png"))).status_code == 400


def test_a_request_without_room_for_its_images(start: Start, gpu: FakeUpstream) -> None:
    """Each counts as some tokens; the fake's context is 2,048."""
    proxy = start(backends={"gpu": backend(gpu)})
    answer = chat(proxy, messages=about(*[image(each) for each in (RED, BLUE) * 8]))
    assert answer.status_code == 400
    assert answer.json()["error"]["code"] == "context_length_exceeded"
    assert gpu.talks == []


def test_a_large_image_passes_whole(start: Start, gpu: FakeUpstream) -> None:
    async def counts(talk: Talk) -> None:
        await talk.answer(200, whole(str(len(talk.json["messages"][0]["content"][1]["image_url"]["url"]))))

    gpu.default = counts
    proxy = start(backends={"gpu": backend(gpu)})
    url = data_url(png_bytes(16, 16) + bytes(4_500_000))  # what follows the end of a PNG is ignored
    answer = chat(proxy, messages=about(image(url)))
    assert answer.json()["choices"][0]["message"]["content"] == str(len(url))
