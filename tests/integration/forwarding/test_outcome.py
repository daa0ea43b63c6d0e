"""What an observer sees of each kind of request."""

from __future__ import annotations

from collections.abc import Callable
from typing import NamedTuple

import pytest

from tests.support.fake_upstream import FakeUpstream, Talk, delta, silent, status
from tests.support.running_proxy import RunningProxy, ask, backend, chat
from tests.support.waiting import wait_until
from xgen_proxy.forwarding.delivery import Delivery
from xgen_proxy.forwarding.outcome import Observer, Outcome, Refusal
from xgen_proxy.request.call import Call
from xgen_proxy.routing.router import Target

Start = Callable[..., RunningProxy]


class Recorder(Observer):
    """An Observer that records what it sees, in order."""

    def __init__(self) -> None:
        self.events: list[str] = []
        self.open_requests: set[int] = set()
        self.open_attempts: set[int] = set()
        self.outcomes: list[Outcome] = []

    def request_refused(self, refusal: Refusal) -> None:
        self.events.append(f"refused {refusal.endpoint} {refusal.error.status}")

    def request_started(self, call: Call) -> None:
        assert id(call) not in self.open_requests
        self.open_requests.add(id(call))
        self.events.append("started")

    def attempt_started(self, call: Call, target: Target, number: int) -> bytes | None:
        assert id(call) in self.open_requests
        assert id(call) not in self.open_attempts
        assert target.replica.in_flight > 0, "the slot is held"
        self.open_attempts.add(id(call))
        self.events.append(f"attempt {number} on {target.backend.name}")
        return None

    def attempt_finished(self, call: Call, target: Target, error: BaseException | None, tail: bytes) -> None:
        self.open_attempts.remove(id(call))
        self.events.append(type(error).__name__ if error else "succeeded")

    def request_finished(self, call: Call, outcome: Outcome) -> None:
        assert id(call) not in self.open_attempts
        self.open_requests.remove(id(call))
        self.events.append(f"finished {outcome.status}")
        self.outcomes.append(outcome)


def watch(proxy: RunningProxy, monkeypatch: pytest.MonkeyPatch) -> Recorder:
    """A recorder in place of the proxy's observers."""
    recorder = Recorder()
    monkeypatch.setattr(proxy.gateway, "observer", recorder)
    monkeypatch.setattr(proxy.gateway.forwarder, "observer", recorder)
    return recorder


class Case(NamedTuple):
    """`request` sends one request; `events` are those that an observer must see."""

    request: Callable[[RunningProxy, FakeUpstream, pytest.MonkeyPatch], None]
    events: list[str]


async def breaks(talk: Talk) -> None:
    await talk.start_stream()
    await talk.event(delta("hel"))
    talk.reset()


def served(proxy: RunningProxy, gpu: FakeUpstream, patch: pytest.MonkeyPatch) -> None:
    assert chat(proxy).status_code == 200


def streamed(proxy: RunningProxy, gpu: FakeUpstream, patch: pytest.MonkeyPatch) -> None:
    assert chat(proxy, stream=True).status_code == 200


def failed_over(proxy: RunningProxy, gpu: FakeUpstream, patch: pytest.MonkeyPatch) -> None:
    gpu.scripts.append(status(500))
    assert chat(proxy).status_code == 200


def resumed(proxy: RunningProxy, gpu: FakeUpstream, patch: pytest.MonkeyPatch) -> None:
    gpu.scripts.append(breaks)
    assert chat(proxy, stream=True).text.endswith("[DONE]\n\n")


def interrupted(proxy: RunningProxy, gpu: FakeUpstream, patch: pytest.MonkeyPatch) -> None:
    gpu.scripts.append(breaks)
    assert "stream_broken" in chat(proxy, stream=True, continuation="none").text


def rejected(proxy: RunningProxy, gpu: FakeUpstream, patch: pytest.MonkeyPatch) -> None:
    gpu.scripts.append(status(400))
    assert chat(proxy).status_code == 400


def unparsable(proxy: RunningProxy, gpu: FakeUpstream, patch: pytest.MonkeyPatch) -> None:
    assert chat(proxy, messages=[]).status_code == 400


def unroutable(proxy: RunningProxy, gpu: FakeUpstream, patch: pytest.MonkeyPatch) -> None:
    assert chat(proxy, model="unknown").status_code == 404


def disconnected(proxy: RunningProxy, gpu: FakeUpstream, patch: pytest.MonkeyPatch) -> None:
    gpu.scripts.append(silent)
    with ask(proxy):
        wait_until(lambda: gpu.talks)


def faulty(proxy: RunningProxy, gpu: FakeUpstream, patch: pytest.MonkeyPatch) -> None:
    async def fault(*_: object) -> None:
        raise ZeroDivisionError

    patch.setattr(Delivery, "deliver", fault)
    assert chat(proxy).status_code == 500


CASES = [
    Case(served, ["started", "attempt 1 on vllm", "succeeded", "finished 200"]),
    Case(streamed, ["started", "attempt 1 on vllm", "succeeded", "finished 200"]),
    Case(
        failed_over,
        [
            "started",
            "attempt 1 on vllm",
            "UpstreamServerError",
            "attempt 2 on llama_cpp",
            "succeeded",
            "finished 200",
        ],
    ),
    Case(
        resumed,
        [
            "started",
            "attempt 1 on vllm",
            "UpstreamProtocolError",
            "attempt 2 on llama_cpp",
            "succeeded",
            "finished 200",
        ],
    ),
    Case(interrupted, ["started", "attempt 1 on vllm", "UpstreamProtocolError", "finished 200"]),
    Case(rejected, ["started", "attempt 1 on vllm", "RequestRejectedError", "finished 400"]),
    Case(unparsable, ["refused chat 400"]),
    Case(unroutable, ["started", "finished 404"]),
    Case(disconnected, ["started", "attempt 1 on vllm", "CancelledError", "finished 499"]),
    Case(faulty, ["started", "attempt 1 on vllm", "ZeroDivisionError", "finished 500"]),
]


@pytest.mark.parametrize("case", CASES, ids=lambda case: case.request.__name__)
def test_an_observer_sees_each_request_and_attempt_once(
    case: Case, proxy: RunningProxy, gpu: FakeUpstream, monkeypatch: pytest.MonkeyPatch
) -> None:
    recorder = watch(proxy, monkeypatch)
    case.request(proxy, gpu, monkeypatch)
    wait_until(lambda: len(recorder.events) >= len(case.events))
    assert recorder.events == case.events
    assert not recorder.open_requests
    assert not recorder.open_attempts


def outcome_of(
    request: Callable[[RunningProxy, FakeUpstream, pytest.MonkeyPatch], None],
    proxy: RunningProxy,
    gpu: FakeUpstream,
    monkeypatch: pytest.MonkeyPatch,
) -> Outcome:
    recorder = watch(proxy, monkeypatch)
    request(proxy, gpu, monkeypatch)
    wait_until(lambda: recorder.outcomes)
    return recorder.outcomes[0]


def test_outcome_of_a_request_that_was_served(
    proxy: RunningProxy, gpu: FakeUpstream, monkeypatch: pytest.MonkeyPatch
) -> None:
    outcome = outcome_of(served, proxy, gpu, monkeypatch)
    assert outcome.target is not None
    assert outcome.first_choice == outcome.target
    assert (outcome.status, outcome.error, outcome.attempts, list(outcome.failures)) == (200, None, 1, [])
    assert (outcome.usage, outcome.completed, outcome.queued) == ((3, 1), True, 0)
    assert 0 < outcome.waited < outcome.finished
    assert 0 < outcome.first_output <= outcome.finished


def test_outcome_of_a_stream_that_was_resumed(
    proxy: RunningProxy, gpu: FakeUpstream, monkeypatch: pytest.MonkeyPatch
) -> None:
    outcome = outcome_of(resumed, proxy, gpu, monkeypatch)
    assert outcome.target is not None
    assert outcome.first_choice is not None
    assert (outcome.first_choice.backend.name, outcome.target.backend.name) == ("vllm", "llama_cpp")
    assert (outcome.attempts, outcome.resumed, outcome.interrupted, outcome.completed) == (2, 1, None, True)
    assert [failure.target.backend.name for failure in outcome.failures] == ["vllm"]


def test_outcome_of_a_stream_that_was_interrupted(
    proxy: RunningProxy, gpu: FakeUpstream, monkeypatch: pytest.MonkeyPatch
) -> None:
    outcome = outcome_of(interrupted, proxy, gpu, monkeypatch)
    assert outcome.interrupted is not None
    assert outcome.interrupted.outcome == "broken"
    assert (outcome.status, outcome.resumed, outcome.completed) == (200, 0, False)


def test_outcome_of_a_request_that_could_not_be_routed(
    proxy: RunningProxy, gpu: FakeUpstream, monkeypatch: pytest.MonkeyPatch
) -> None:
    outcome = outcome_of(unroutable, proxy, gpu, monkeypatch)
    assert outcome.error is not None
    assert (outcome.error.code, outcome.first_choice, outcome.target, outcome.attempts) == (
        "model_not_found",
        None,
        None,
        0,
    )


def test_outcome_of_a_client_that_left_the_queue(
    start: Start, gpu: FakeUpstream, monkeypatch: pytest.MonkeyPatch
) -> None:
    proxy = start(backends={"only": backend(gpu, dialect="openai", slots=1)})
    recorder = watch(proxy, monkeypatch)
    gpu.scripts.append(silent)
    with ask(proxy):
        wait_until(lambda: gpu.talks)
        with ask(proxy):
            wait_until(lambda: proxy.gateway.admission.queue)
        wait_until(lambda: recorder.outcomes)
        outcome = recorder.outcomes[0]
        assert (outcome.status, outcome.left_queue, outcome.attempts) == (499, True, 0)
        assert 0 < outcome.queued <= outcome.waited
