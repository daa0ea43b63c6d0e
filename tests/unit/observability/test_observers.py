from __future__ import annotations

from tests.support.requests import make_call, make_target
from xgen_proxy.errors import NotFoundError
from xgen_proxy.forwarding.outcome import Observer, Outcome, Refusal
from xgen_proxy.observability.observers import Observers
from xgen_proxy.request.call import Call, Origin
from xgen_proxy.routing.router import Target


class Recorder(Observer):
    def __init__(self, log: list[str], name: str, trace: bytes | None = None) -> None:
        self.log = log
        self.name = name
        self.trace = trace

    def request_refused(self, refusal: Refusal) -> None:
        self.log.append(f"{self.name} refused {refusal.error.status}")

    def request_started(self, call: Call) -> None:
        self.log.append(f"{self.name} started {call.id}")

    def attempt_started(self, call: Call, target: Target, number: int) -> bytes | None:
        self.log.append(f"{self.name} attempt {number}")
        return self.trace

    def attempt_finished(self, call: Call, target: Target, error: BaseException | None, tail: bytes) -> None:
        self.log.append(f"{self.name} attempt finished {tail!r}")

    def request_finished(self, call: Call, outcome: Outcome) -> None:
        self.log.append(f"{self.name} finished {outcome.status}")


def test_each_observer_sees_each_event_in_order() -> None:
    log: list[str] = []
    observers = Observers(Recorder(log, "a"), Recorder(log, "b"))
    call, target = make_call(), make_target()
    observers.request_refused(Refusal(Origin("id-0", {}), "other", NotFoundError("x")))
    observers.request_started(call)
    observers.attempt_started(call, target, 1)
    observers.attempt_finished(call, target, None, b"tail")
    observers.request_finished(call, Outcome(200))
    events = ["refused 404", "started id-1", "attempt 1", "attempt finished b'tail'", "finished 200"]
    assert log == [f"{name} {event}" for event in events for name in "ab"]


def test_the_last_trace_context_wins() -> None:
    call, target = make_call(), make_target()
    assert Observers(Recorder([], "a"), Recorder([], "b")).attempt_started(call, target, 1) is None
    traced = Observers(Recorder([], "a", b"1"), Recorder([], "b"), Recorder([], "c", b"2"), Recorder([], "d"))
    assert traced.attempt_started(call, target, 1) == b"2"


class OnlyFinished(Observer):
    def __init__(self) -> None:
        self.statuses: list[int] = []

    def request_finished(self, call: Call, outcome: Outcome) -> None:
        self.statuses.append(outcome.status)


def test_an_observer_overrides_only_what_it_needs() -> None:
    observer = OnlyFinished()
    observers = Observers(observer)
    call, target = make_call(), make_target()
    observers.request_refused(Refusal(Origin("id-0", {}), "other", NotFoundError("x")))
    observers.request_started(call)
    assert observers.attempt_started(call, target, 1) is None
    observers.attempt_finished(call, target, None, b"")
    observers.request_finished(call, Outcome(200))
    assert observer.statuses == [200]
