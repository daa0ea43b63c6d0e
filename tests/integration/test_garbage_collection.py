"""A finished request leaves no reference cycles, so its memory is freed at once.

Cycles wait for the garbage collector, which runs rarely (garbage_collection.py): by the thousand they look like a leak.
"""

from __future__ import annotations

import gc
from collections.abc import Callable, Iterator

import httpx
import pytest

from tests.support.counting_upstream import counter, dying
from tests.support.fake_upstream import FakeUpstream, Talk, delta, status
from tests.support.running_proxy import CHAT, RunningProxy, backend, chat, post
from tests.support.waiting import wait_until
from xgen_proxy.garbage_collection import freeze_loaded_objects

OURS = ("xgen_proxy.", "uvicorn.", "uvloop.", "httptools.")


async def endless(talk: Talk) -> None:
    await talk.start_stream()
    await talk.event(delta("hel"))
    await talk.until_client_leaves()


def whole(proxy: RunningProxy, gpu: FakeUpstream) -> None:
    assert chat(proxy).headers["x-backend"] == "vllm"


def stream(proxy: RunningProxy, gpu: FakeUpstream) -> None:
    assert chat(proxy, stream=True).text.endswith("data: [DONE]\n\n")


def response(proxy: RunningProxy, gpu: FakeUpstream) -> None:
    body = {"model": "m", "input": [{"role": "user", "content": "Hi"}], "stream": True}
    assert "event: response.completed" in post(f"{proxy.url}/v1/responses", json=body).text


def disconnect(proxy: RunningProxy, gpu: FakeUpstream) -> None:
    gpu.scripts.append(endless)
    with httpx.stream("POST", f"{proxy.url}/v1/chat/completions", json={**CHAT, "stream": True}) as response:
        next(response.iter_raw())


def failover(proxy: RunningProxy, gpu: FakeUpstream) -> None:
    gpu.scripts.append(status(500))
    assert chat(proxy, stream=True).headers["x-backend"] == "llama_cpp"


def too_long(proxy: RunningProxy, gpu: FakeUpstream) -> None:
    message = "This model's maximum context length is 8 tokens. However, your prompt contains 9 input tokens."
    gpu.scripts.append(status(400, {"error": {"message": message}}))
    answer = chat(proxy, fallback="none", backend="vllm")
    assert answer.json()["error"]["code"] == "context_length_exceeded"


def resume(proxy: RunningProxy, gpu: FakeUpstream) -> None:
    gpu.scripts.append(dying(6, 700))
    assert ": resumed on llama_cpp" in chat(proxy, stream=True).text


def invalid(proxy: RunningProxy, gpu: FakeUpstream) -> None:
    assert post(f"{proxy.url}/v1/chat/completions", content=b"{").status_code == 400


def invalid_response(proxy: RunningProxy, gpu: FakeUpstream) -> None:
    body = {"model": "m", "input": "Hi", "temperature": 5}
    assert post(f"{proxy.url}/v1/responses", json=body).status_code == 400


def not_found(proxy: RunningProxy, gpu: FakeUpstream) -> None:
    assert post(f"{proxy.url}/v1/nothing").status_code == 404


@pytest.fixture
def garbage() -> Iterator[Callable[[], set[str]]]:
    """Call it to get the types of the proxy's objects that only the collector could free."""
    gc.collect()
    gc.set_debug(gc.DEBUG_SAVEALL)

    def kinds() -> set[str]:
        gc.collect()
        names = {f"{type(each).__module__}.{type(each).__qualname__}" for each in gc.garbage}
        return {name for name in names if name.startswith(OURS)}

    yield kinds
    gc.set_debug(0)
    gc.garbage.clear()


def test_loaded_objects_are_frozen() -> None:
    threshold = gc.get_threshold()
    try:
        freeze_loaded_objects()
        assert gc.get_freeze_count() > 10_000
        assert gc.get_threshold()[0] > threshold[0]
    finally:
        gc.unfreeze()
        gc.set_threshold(*threshold)


@pytest.mark.parametrize(
    "request_",
    [whole, stream, response, disconnect, failover, too_long, resume, invalid, invalid_response, not_found],
)
def test_requests_leave_no_reference_cycles(
    request_: Callable[[RunningProxy, FakeUpstream], None],
    start: Callable[..., RunningProxy],
    gpu: FakeUpstream,
    cpu: FakeUpstream,
    garbage: Callable[[], set[str]],
) -> None:
    cpu.default = counter(6)
    proxy = start(
        backends={"vllm": backend(gpu), "llama_cpp": backend(cpu, device_class="cpu", dialect="llama-server")}
    )
    for _ in range(3):
        request_(proxy, gpu)
        wait_until(lambda: not any(replica.in_flight for replica in proxy.gateway.fleet.replicas))
        assert garbage() == set()
