"""Several observers as one."""

from __future__ import annotations

from xgen_proxy.forwarding.outcome import Observer, Outcome, Refusal
from xgen_proxy.request.call import Call
from xgen_proxy.routing.router import Target


class Observers:
    """Passes each event to all observers in order. The trace context is that of the last observer that has one."""

    def __init__(self, *observers: Observer) -> None:
        self._observers = observers

    def request_refused(self, refusal: Refusal) -> None:
        for observer in self._observers:
            observer.request_refused(refusal)

    def request_started(self, call: Call) -> None:
        for observer in self._observers:
            observer.request_started(call)

    def attempt_started(self, call: Call, target: Target, number: int) -> bytes | None:
        trace = None
        for observer in self._observers:
            own = observer.attempt_started(call, target, number)
            trace = trace if own is None else own
        return trace

    def attempt_finished(self, call: Call, target: Target, error: BaseException | None, tail: bytes) -> None:
        for observer in self._observers:
            observer.attempt_finished(call, target, error, tail)

    def request_finished(self, call: Call, outcome: Outcome) -> None:
        for observer in self._observers:
            observer.request_finished(call, outcome)
