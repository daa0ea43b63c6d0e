"""A canary is asked on a route that the replica serves; where there is none, its health checks decide."""

from __future__ import annotations

import asyncio
import threading
from collections.abc import Callable, Iterator

import pytest

from tests.support.fake_upstream import FakeUpstream, Script, Talk, good, status, whole
from tests.support.running_proxy import RunningProxy, backend, chat, get, post
from tests.support.waiting import wait_until
from xgen_proxy.fleet import circuit_breaker
from xgen_proxy.fleet.replica import Replica

Start = Callable[..., RunningProxy]
ROUTES = ["/v1/completions", "/v1/chat/completions", "/v1/embeddings"]
VECTOR = {"object": "list", "data": [{"object": "embedding", "index": 0, "embedding": [0.5]}], "model": "m"}

NOT_SERVED: dict[str, Script] = {
    "404, JSON": status(404),
    "404, HTML": status(404, b"<html>not found</html>"),
    "405": status(405, {"detail": "Method Not Allowed"}),
    "501, as llama-server with --embeddings": status(501),
    "501, HTML": status(501, b"<html>"),
    "HTML with 200": status(200, b"<html>welcome</html>"),
    "an empty line": status(200, b"\n"),
    "a redirect": status(302, b"<html>"),
}


@pytest.fixture(autouse=True)
def _short(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(circuit_breaker, "OPEN_S", 0.05)


@pytest.fixture
def gpu() -> Iterator[FakeUpstream]:
    fake = FakeUpstream()
    yield fake
    fake.close()


def only(proxy: RunningProxy) -> Replica:
    [replica] = proxy.gateway.fleet.replicas
    return replica


def serving(fake: FakeUpstream, routes: list[str], otherwise: Script) -> None:
    """`fake` answers on `routes` only."""

    async def script(talk: Talk) -> None:
        if talk.path not in routes:
            await otherwise(talk)
        elif talk.path == "/v1/embeddings":
            await talk.answer(200, VECTOR)
        else:
            await talk.answer(200, whole())

    fake.default = script


async def breaks(talk: Talk) -> None:
    await talk.send(b"HTTP/1.1 200 OK\r\ncontent-length: 9\r\n\r\n{")
    talk.writer.close()


def make_suspect(proxy: RunningProxy, fake: FakeUpstream) -> None:
    fake.scripts += [breaks] * 3
    for _ in range(3):
        chat(proxy)


@pytest.mark.parametrize("served", [["/v1/chat/completions"], ["/v1/embeddings"], []], ids=["chat", "embed", "none"])
@pytest.mark.parametrize("otherwise", NOT_SERVED.values(), ids=NOT_SERVED.keys())
@pytest.mark.parametrize("dialect", ["vllm", "llama-server"])
def test_replica_that_serves_only_this_comes_back(
    start: Start, gpu: FakeUpstream, served: list[str], otherwise: Script, dialect: str
) -> None:
    serving(gpu, served, otherwise)
    proxy = start(backends={"b": backend(gpu, dialect=dialect, embeddings=True)})
    make_suspect(proxy, gpu)
    wait_until(lambda: only(proxy).up and only(proxy).reason != "healthy")
    asked = [talk.path for talk in gpu.talks[3:]]
    assert (
        asked[: 1 + ROUTES.index(served[0]) if served else 3] == ROUTES[: 1 + ROUTES.index(served[0]) if served else 3]
    )


@pytest.mark.parametrize("served", [["/v1/chat/completions"], ["/v1/embeddings"], []], ids=["chat", "embed", "none"])
def test_silent_vllm_that_serves_only_this_stays_up(start: Start, gpu: FakeUpstream, served: list[str]) -> None:
    serving(gpu, served, status(404, b"<html>not found</html>"))
    proxy = start(backends={"b": backend(gpu)}, canary_interval_s=0.05)
    wait_until(lambda: len(gpu.talks) > 9)
    assert (only(proxy).state, only(proxy).breaker.state) == ("up", "closed")


def test_embeddings_server_serves_after_it_was_suspect(start: Start, gpu: FakeUpstream) -> None:
    serving(gpu, ["/v1/embeddings"], status(501))
    proxy = start(backends={"b": backend(gpu, dialect="llama-server", embeddings=True)})
    make_suspect(proxy, gpu)
    wait_until(lambda: only(proxy).up)
    answer = post(f"{proxy.url}/v1/embeddings", json={"model": "m", "input": "one"})
    assert (answer.status_code, answer.json()["data"][0]["embedding"]) == (200, [0.5])


@pytest.mark.parametrize("script", [status(500), status(502, b"<html>"), status(504)])
def test_failing_canary_is_a_failure_whatever_its_body(start: Start, gpu: FakeUpstream, script: Script) -> None:
    proxy = start(backends={"b": backend(gpu)}, canary_interval_s=0.05)
    gpu.default = script
    wait_until(lambda: only(proxy).state == "suspect")
    assert only(proxy).reason.startswith("canary failed: /v1/completions returned 50")


# panic mode


def test_suspect_replica_is_tried_when_nothing_else_is_up(
    start: Start, gpu: FakeUpstream, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Three requests that a backend cannot do must not refuse everybody else's."""
    monkeypatch.setattr(circuit_breaker, "OPEN_S", 3600)
    proxy = start(backends={"b": backend(gpu)})
    make_suspect(proxy, gpu)
    assert only(proxy).state == "suspect"
    assert get(f"{proxy.url}/ready").status_code == 200
    answer = chat(proxy)
    assert (answer.status_code, answer.headers["x-route-reason"].partition(":")[0]) == (200, "panic")
    plan = post(f"{proxy.url}/route", json={"model": "m", "messages": [{"role": "user", "content": "hi"}]}).json()
    assert [candidate["replica"] for candidate in plan["candidates"]] == [only(proxy).name]
    wait_until(lambda: 'reason="panic"' in get(f"{proxy.url}/metrics").text)


def test_suspect_replica_is_not_tried_while_another_is_up(
    start: Start, gpu: FakeUpstream, cpu: FakeUpstream, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(circuit_breaker, "OPEN_S", 3600)
    proxy = start(backends={"a": backend(gpu), "b": backend(cpu, device_class="cpu")})
    gpu.default = breaks
    for _ in range(3):
        assert chat(proxy).status_code == 200
    asked = len(gpu.talks)
    answer = chat(proxy)
    assert (answer.headers["x-backend"], answer.headers["x-route-reason"].partition(":")[0]) == ("b", "only")
    assert len(gpu.talks) == asked


def test_replica_that_does_not_answer_is_not_tried(start: Start, gpu: FakeUpstream) -> None:
    proxy = start(backends={"b": backend(gpu)}, canary_interval_s=0)
    make_suspect(proxy, gpu)
    gpu.kill()
    wait_until(lambda: only(proxy).state == "down")
    assert chat(proxy).status_code == 503


def test_replica_that_answers_but_refuses_to_say_what_it_serves_is_tried(start: Start, gpu: FakeUpstream) -> None:
    async def answer_check(talk: Talk) -> None:
        await talk.answer(200 if talk.path == "/metrics" else 503, {})

    gpu.answer_check = answer_check  # type: ignore[method-assign]
    proxy = start(up=0, backends={"b": backend(gpu, models={"m": "m"})})
    wait_until(lambda: only(proxy).answers)
    answer = chat(proxy)
    assert (answer.status_code, answer.headers["x-route-reason"].partition(":")[0]) == (200, "panic")


def test_queued_requests_are_tried_when_their_last_replica_becomes_suspect(
    start: Start, gpu: FakeUpstream, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(circuit_breaker, "OPEN_S", 3600)
    fail = threading.Event()

    async def fails_later(talk: Talk) -> None:
        await asyncio.to_thread(fail.wait, 10)
        await breaks(talk)

    proxy = start(backends={"b": backend(gpu, dialect="openai", slots=1)})
    only(proxy).breaker.failures = 2
    gpu.scripts.append(fails_later)
    gpu.default = good
    answers: list[int] = []
    threads = [threading.Thread(target=lambda: answers.append(chat(proxy).status_code)) for _ in range(4)]
    for thread in threads:
        thread.start()
    wait_until(lambda: len(proxy.gateway.admission.queue) == 3)
    fail.set()
    for thread in threads:
        thread.join(20)
    assert sorted(answers) == [200, 200, 200, 502]
