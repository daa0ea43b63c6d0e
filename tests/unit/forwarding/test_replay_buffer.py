from __future__ import annotations

import tracemalloc
from collections.abc import Iterable

import pytest
from hypothesis import given
from hypothesis import strategies as st

from xgen_proxy.forwarding import replay_buffer
from xgen_proxy.forwarding.replay_buffer import FOLD, ReplayBuffer

EVENT = b'data: {"id":"chatcmpl-1","choices":[{"index":0,"delta":{"content":" %d"},"finish_reason":null}]}\n\n'


def filled(blocks: Iterable[bytes]) -> ReplayBuffer:
    buffer = ReplayBuffer()
    for block in blocks:
        buffer.add(block)
    return buffer


@given(st.lists(st.binary(max_size=FOLD // 2)))
def test_all_returns_what_was_added(blocks: list[bytes]) -> None:
    buffer = filled(blocks)
    assert buffer.all() == b"".join(blocks)
    assert buffer.all() == b"".join(blocks), "all() changes nothing"
    assert (buffer.count, buffer.size) == (len(blocks), sum(map(len, blocks)))
    assert not buffer.overflowed


def test_similar_events_take_little_memory() -> None:
    tracemalloc.start()
    try:
        buffer = filled(EVENT % number for number in range(10_000))
        held, _ = tracemalloc.get_traced_memory()
    finally:
        tracemalloc.stop()
    assert buffer.size > 900_000
    assert held < 600_000, "the last 64 KiB are kept as they are, the rest compressed, beside zlib's own 256 KiB"


def test_an_overflow_frees_the_memory(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(replay_buffer, "LIMIT", 3 * FOLD)
    tracemalloc.start()
    try:
        buffer = filled(bytes([number]) * FOLD for number in range(200))
        held, _ = tracemalloc.get_traced_memory()
    finally:
        tracemalloc.stop()
    assert buffer.overflowed
    assert (buffer.count, buffer.size) == (200, 200 * FOLD)
    assert held < 10 * FOLD
