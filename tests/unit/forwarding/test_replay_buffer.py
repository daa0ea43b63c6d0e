from __future__ import annotations

from hypothesis import given
from hypothesis import strategies as st

from xgen_proxy.forwarding import replay_buffer
from xgen_proxy.forwarding.replay_buffer import FOLD, ReplayBuffer


@given(st.lists(st.binary(max_size=FOLD // 2)))
def test_gives_back_what_it_was_given(blocks: list[bytes]) -> None:
    kept = ReplayBuffer()
    for block in blocks:
        kept.add(block)
    assert kept.all() == b"".join(blocks)
    assert kept.all() == b"".join(blocks), "and again"
    assert not kept.over


def test_events_that_are_much_alike_take_little() -> None:
    kept = ReplayBuffer()
    event = b'data: {"id":"chatcmpl-1","choices":[{"index":0,"delta":{"content":" %d"},"finish_reason":null}]}\n\n'
    for number in range(10_000):
        kept.add(event % number)
    assert len(kept.all()) > 900_000
    assert sum(map(len, kept._folded)) + sum(map(len, kept._blocks)) < 200_000


def test_too_much_is_let_go(monkeypatch) -> None:
    monkeypatch.setattr(replay_buffer, "MOST", 3 * FOLD)
    kept = ReplayBuffer()
    for _ in range(8):
        kept.add(b"x" * FOLD)
    assert kept.over
    assert kept._folded == []
