"""Token counts and finish reasons, found at the end of an answer."""

from __future__ import annotations

import json

import pytest

from tests.support.chunks import delta, events
from xgen_proxy.forwarding.usage import TAIL, finish_reasons, usage_at_end

COUNTS = {"prompt_tokens": 12, "total_tokens": 46, "completion_tokens": 34}


@pytest.mark.parametrize("separators", [(",", ":"), (", ", ": ")])
@pytest.mark.parametrize("after", [{}, {"prompt_logprobs": None, "kv_transfer_params": None}])
def test_of_a_whole_answer(separators: tuple[str, str], after: dict[str, None]) -> None:
    answer = {"choices": [{"message": {"content": "x" * 5000}}], "usage": COUNTS, **after}
    assert usage_at_end(json.dumps(answer, separators=separators).encode()) == (12, 34)


def test_of_embeddings() -> None:
    usage = {"prompt_tokens": 5, "total_tokens": 5}
    assert usage_at_end(json.dumps({"data": [{"embedding": [0.5] * 1000}], "usage": usage}).encode()) == (5, 0)


def test_of_a_streams_last_events() -> None:
    assert usage_at_end(events(delta("stop"), {"choices": [], "usage": COUNTS})) == (12, 34)


@pytest.mark.parametrize(
    "data",
    [b"", b"{}", b'{"usage":null}', b'{"usage":{}}', json.dumps({"text": json.dumps({"usage": COUNTS})}).encode(),
     json.dumps({"usage": COUNTS, "more": "x" * TAIL}).encode()],
    ids=["nothing", "empty", "null", "no counts", "what the model wrote", "far from the end"],
)  # fmt: skip
def test_none(data: bytes) -> None:
    assert usage_at_end(data) is None


def test_finish_reasons() -> None:
    said = json.dumps({"finish_reason": "said"})
    choices = [{"text": said, "finish_reason": reason} for reason in ("stop", "length")]
    assert finish_reasons(json.dumps({"choices": choices, "usage": COUNTS}).encode()) == ["stop", "length"]
    assert finish_reasons(events(delta("stop"))) == ["stop"]
    assert finish_reasons(events(delta())) == []
