"""Backends that serve the same model name with different tokenizers are found when they come up."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest

from tests.support.fake_upstream import FakeUpstream, Talk, status
from tests.support.running_proxy import RunningProxy, backend, chat, get
from tests.support.waiting import wait_until
from xgen_proxy.fleet.identity import tokenizers

Start = Callable[..., RunningProxy]
ERROR = status(500)


def both(gpu: FakeUpstream, cpu: FakeUpstream) -> dict[str, Any]:
    return {"vllm": backend(gpu), "llama_cpp": backend(cpu, device_class="cpu")}


def pairs(proxy: RunningProxy) -> list[dict[str, Any]]:
    found: list[dict[str, Any]] = get(f"{proxy.url}/models/status").json()["model_pairs"]
    return found


def alike(proxy: RunningProxy) -> bool | None:
    [pair] = wait_until(lambda: pairs(proxy))
    assert (pair["model"], pair["backends"], pair["top1"]) == ("m", ["vllm", "llama_cpp"], None)
    answer: bool | None = pair["same_tokenizer"]
    return answer


def mismatch(proxy: RunningProxy) -> str | None:
    """The value of the metric."""
    lines = get(f"{proxy.url}/metrics").text.splitlines()
    return next((line.rpartition(" ")[2] for line in lines if line.startswith("xgen_model_mismatch{")), None)


def warnings(caplog: pytest.LogCaptureFixture) -> list[str]:
    return [r.getMessage() for r in caplog.records if r.levelname == "WARNING" and "min_top1" not in r.getMessage()]


def test_different_tokenizers_are_shown_and_warned_about_once(
    start: Start, gpu: FakeUpstream, cpu: FakeUpstream, caplog: pytest.LogCaptureFixture
) -> None:
    gpu.tokens, cpu.tokens = [1, 2, 3], [1, 2, 4]
    proxy = start(backends=both(gpu, cpu))
    wait_until(lambda: mismatch(proxy) == "1.0")
    assert alike(proxy) is False
    proxy.gateway.configure(proxy.gateway.settings)
    wait_until(lambda: alike(proxy) is False)
    [warning] = warnings(caplog)
    assert warning.startswith("vllm and llama_cpp both serve m, but split a text into different tokens")
    gpu.scripts.append(ERROR)
    answer = chat(proxy)
    assert (answer.headers["x-backend"], answer.headers["x-model-distance"]) == ("llama_cpp", "different model")


def test_a_different_model_is_no_fallback_where_a_distance_is_asked_for(
    start: Start, gpu: FakeUpstream, cpu: FakeUpstream
) -> None:
    gpu.tokens, cpu.tokens = [1, 2, 3], [1, 2, 4]
    proxy = start(backends=both(gpu, cpu), fallback={"min_top1": 0.1})
    wait_until(lambda: mismatch(proxy) == "1.0")
    gpu.kill()
    answer = wait_until(lambda: found if (found := chat(proxy)).status_code == 503 else None)
    wait_until(lambda: chat(proxy).json()["error"]["code"] == "model_too_far")
    assert "x-model-distance" not in answer.headers


def test_the_same_tokenizer(start: Start, gpu: FakeUpstream, cpu: FakeUpstream) -> None:
    gpu.tokens = cpu.tokens = [1, 2, 3]
    proxy = start(backends=both(gpu, cpu))
    wait_until(lambda: mismatch(proxy) == "0.0")
    assert alike(proxy) is True
    gpu.scripts.append(ERROR)
    assert "x-model-distance" not in chat(proxy).headers


def test_an_engine_that_cannot_tell_is_unknown(start: Start, gpu: FakeUpstream, cpu: FakeUpstream) -> None:
    gpu.tokens = [1, 2, 3]
    proxy = start(backends=both(gpu, cpu))
    assert alike(proxy) is None
    assert mismatch(proxy) is None


def test_a_replica_that_comes_back_is_asked_again(start: Start, gpu: FakeUpstream, cpu: FakeUpstream) -> None:
    gpu.tokens = cpu.tokens = [1, 2, 3]
    proxy = start(backends=both(gpu, cpu))
    wait_until(lambda: alike(proxy) is True)
    cpu.kill()
    wait_until(lambda: any(replica.state == "down" for replica in proxy.gateway.fleet.replicas))
    cpu.tokens = [7]
    cpu.start()
    wait_until(lambda: alike(proxy) is False)


def test_one_wrong_replica_is_enough(start: Start, gpu: FakeUpstream, cpu: FakeUpstream) -> None:
    other = FakeUpstream()
    gpu.tokens, cpu.tokens, other.tokens = [1], [1], [2]
    proxy = start(backends={"vllm": backend(gpu), "llama_cpp": backend(cpu, other, device_class="cpu")})
    wait_until(lambda: alike(proxy) is False)
    other.close()


class Busy(FakeUpstream):
    busy = True

    async def answer_probe(self, talk: Talk) -> None:
        if not self.busy:
            await super().answer_probe(talk)
            return
        self.busy = False
        await talk.answer(503, {})


def test_an_engine_that_is_busy_is_asked_again(
    start: Start, gpu: FakeUpstream, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(tokenizers, "RETRY_S", 0.05)
    cpu = Busy(tokens=[1])
    gpu.tokens = [1]
    proxy = start(backends=both(gpu, cpu))
    wait_until(lambda: alike(proxy) is True)
    cpu.close()


def test_backends_of_different_names_are_not_asked(start: Start, gpu: FakeUpstream, cpu: FakeUpstream) -> None:
    gpu.tokens = cpu.tokens = [1]
    cpu.models = ["other"]
    proxy = start(backends=both(gpu, cpu))
    assert pairs(proxy) == []


def test_a_pair_without_a_measurement_is_warned_about(
    start: Start, gpu: FakeUpstream, cpu: FakeUpstream, caplog: pytest.LogCaptureFixture
) -> None:
    gpu.tokens = cpu.tokens = [1]
    start(backends=both(gpu, cpu), fallback={"min_top1": 0.9})
    wait_until(lambda: "no file in fallback.distances measures vllm and llama_cpp for m" in caplog.text)
