"""Several observers as one."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

from xgen_proxy.forwarding.outcome import Observer, Outcome, Refusal
from xgen_proxy.request.call import Call
from xgen_proxy.routing.router import Target


class Observers(Observer):
    """Passes each event to the observers that override its method, in order.

    The trace context is that of the last observer that has one.
    """

    def __init__(self, *observers: Observer) -> None:
        self._on_refused = overriding(observers, "request_refused")
        self._on_started = overriding(observers, "request_started")
        self._on_attempt_started = overriding(observers, "attempt_started")
        self._on_attempt_finished = overriding(observers, "attempt_finished")
        self._on_finished = overriding(observers, "request_finished")

    def request_refused(self, refusal: Refusal) -> None:
        for observe in self._on_refused:
            observe(refusal)

    def request_started(self, call: Call) -> None:
        for observe in self._on_started:
            observe(call)

    def attempt_started(self, call: Call, target: Target, number: int) -> bytes | None:
        trace: bytes | None = None
        for observe in self._on_attempt_started:
            own = observe(call, target, number)
            trace = trace if own is None else own
        return trace

    def attempt_finished(self, call: Call, target: Target, error: BaseException | None, tail: bytes) -> None:
        for observe in self._on_attempt_finished:
            observe(call, target, error, tail)

    def request_finished(self, call: Call, outcome: Outcome) -> None:
        for observe in self._on_finished:
            observe(call, outcome)


def overriding(observers: Sequence[Observer], name: str) -> list[Callable[..., Any]]:
    """The methods of this name that do something."""
    default = getattr(Observer, name)
    return [getattr(observer, name) for observer in observers if getattr(type(observer), name) is not default]
