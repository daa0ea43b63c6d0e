"""Engines are asked for their memory when somebody asks for the status, once a second at most."""

from __future__ import annotations

from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import httpx
import pytest

from tests.support.fake_upstream import FakeUpstream, Talk
from tests.support.running_proxy import RunningProxy, backend

PAGE = (Path(__file__).parents[2] / "fixtures" / "metrics" / "vllm-0.32.0-metrics-loaded.txt").read_bytes()


def engine_of(proxy: RunningProxy) -> Any:
    [found] = httpx.get(f"{proxy.url}/models/status", timeout=20).json()["backends"]
    return found["replicas"][0]["engine"]


def test_the_memory_of_a_vllm(
    start: Callable[..., RunningProxy], gpu: FakeUpstream, monkeypatch: pytest.MonkeyPatch
) -> None:
    proxy = start(backends={"vllm": backend(gpu)}, scrape_interval_s=3600)
    asked: list[str] = []

    async def answer(talk: Talk) -> None:
        asked.append(talk.path)
        await talk.answer(200, PAGE)

    monkeypatch.setattr(gpu, "answer_check", answer)
    with ThreadPoolExecutor(8) as pool:
        found = list(pool.map(lambda _: engine_of(proxy), range(24)))
    assert found == [found[0]] * 24
    assert found[0]["kv_blocks"] == 728
    assert 1 <= len(asked) < 12, "a page is kept for a second"


def test_an_engine_that_does_not_answer_has_no_status(
    start: Callable[..., RunningProxy], gpu: FakeUpstream, monkeypatch: pytest.MonkeyPatch
) -> None:
    proxy = start(backends={"vllm": backend(gpu)}, scrape_interval_s=3600)

    async def broken(talk: Talk) -> None:
        talk.reset()

    monkeypatch.setattr(gpu, "answer_check", broken)
    assert engine_of(proxy) is None
