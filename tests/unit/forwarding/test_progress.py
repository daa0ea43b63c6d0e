from __future__ import annotations

import re
import time

import pytest

from tests.support.requests import make_call, make_target
from xgen_proxy.downstream.response_writer import ResponseWriter
from xgen_proxy.errors import BadGatewayError, UpstreamTimeoutError
from xgen_proxy.forwarding.outcome import Failure
from xgen_proxy.forwarding.progress import Progress, Stopwatch


async def send(message: object) -> None:
    raise AssertionError("nothing is sent")


def test_a_stopwatch_adds_up_blocks(monkeypatch: pytest.MonkeyPatch) -> None:
    now = iter([10.0, 12.5, 20.0, 20.5])
    monkeypatch.setattr(time, "perf_counter", lambda: next(now))
    stopwatch = Stopwatch()
    for _ in range(2):
        with stopwatch:
            pass
    assert stopwatch.seconds == 3.0


def test_a_stopwatch_counts_a_block_that_raises(monkeypatch: pytest.MonkeyPatch) -> None:
    now = iter([1.0, 4.0])
    monkeypatch.setattr(time, "perf_counter", lambda: next(now))
    stopwatch = Stopwatch()
    with pytest.raises(ValueError, match="x"), stopwatch:
        raise ValueError("x")
    assert stopwatch.seconds == 3.0


def test_headers_of_a_request_without_a_plan_have_only_its_id() -> None:
    assert Progress(make_call()).response_headers() == [(b"x-request-id", b"id-1")]


def test_headers_of_a_request_without_a_slot_have_its_attempts() -> None:
    progress = Progress(make_call())
    progress.first_choice = make_target()
    assert progress.response_headers() == [(b"x-request-id", b"id-1"), (b"x-attempts", b"0")]


def test_headers_explain_the_target() -> None:
    progress = Progress(make_call())
    progress.first_choice = progress.target = make_target(reason="default: GPU load 0.10 < 1 …")
    progress.attempts = 1
    headers = dict(progress.response_headers())
    assert float(headers.pop(b"x-overhead-ms")) >= 0
    assert headers == {
        b"x-request-id": b"id-1",
        b"x-attempts": b"1",
        b"x-backend": b"vllm",
        b"x-replica": b"vllm@gpu:8000",
        b"x-route-reason": b"default: GPU load 0.10 < 1 ?",
    }


def test_the_reason_names_the_last_failure() -> None:
    progress = Progress(make_call())
    assert progress.reason == ""
    progress.target = make_target(reason="only: no CPU backend")
    assert progress.reason == "only: no CPU backend"
    progress.failures.append(Failure(progress.target, UpstreamTimeoutError("silent")))
    assert progress.reason == "fallback: vllm@gpu:8000 timed_out"


def test_the_outcome_has_what_happened() -> None:
    progress, writer = Progress(make_call()), ResponseWriter(send, None)
    progress.first_choice = progress.target = make_target()
    progress.attempts, progress.resumed = 2, 1
    progress.tail = b'{"usage": {"prompt_tokens": 3, "completion_tokens": 5}}'.replace(b'": {', b'":{')
    error = BadGatewayError("failed")
    outcome = progress.outcome(502, writer, error)
    assert (outcome.status, outcome.error, outcome.attempts, outcome.resumed) == (502, error, 2, 1)
    assert (outcome.first_choice, outcome.target) == (progress.target, progress.target)
    assert (outcome.usage, outcome.completed, outcome.bytes_sent) == ((3, 5), True, None)
    assert 0 < outcome.finished <= time.perf_counter()


def test_without_a_tail_the_response_is_not_complete() -> None:
    outcome = Progress(make_call()).outcome(499, ResponseWriter(send, None))
    assert (outcome.usage, outcome.completed, outcome.first_choice) == (None, False, None)


def test_each_attempt_has_an_id_for_its_backend() -> None:
    progress = Progress(make_call())
    progress.attempts = 2
    ids = {progress.backend_request_id for _ in range(100)}
    assert len(ids) == 100
    assert all(re.fullmatch(r"id-1-2-[0-9a-f]{8}", each) for each in ids)
