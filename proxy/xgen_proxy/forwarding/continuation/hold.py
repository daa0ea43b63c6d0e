"""Holds back what of a stream its client cannot use in part, until it is complete.

A stream that breaks meanwhile loses nothing that the client has seen: what was held is thrown away, and another replica
gives it anew. Held are tool calls, from the first chunk of one to the finish_reason: no client runs half a call. The
setting `routing.hold_constrained` also holds the text of an answer that a schema or grammar constrains.

Plain text is never held. A request without tools has no Hold, and so costs nothing.
"""

from __future__ import annotations

import re
import time
from collections.abc import Callable

from xgen_proxy import sse
from xgen_proxy.forwarding.continuation.requests import CONSTRAINED, TOOLS
from xgen_proxy.forwarding.replay_buffer import ReplayBuffer
from xgen_proxy.request.features import Features

LIMIT = 12 * 1024 * 1024  # bytes of events, some 50,000 tokens; a longer block passes as it comes
COMMENT_S = 10.0  # a comment shows a client that waits for a long call that the stream is alive

# Inside a JSON string the quotes would be escaped.
CALL = re.compile(rb'"tool_calls": ?\[ ?\{|"function_call": ?\{')
TEXT = re.compile(rb'"(?:content|text)": ?"[^"]|' + CALL.pattern)


class Hold:
    """Pass all events of a stream of one choice to `feed()`, in order; it returns those that may be sent.

    `holding`: some are held back.
    """

    def __init__(self, begins: re.Pattern[bytes]) -> None:
        self.holding = False
        self._begins = begins
        self._held = ReplayBuffer()
        self._over = False  # the block was complete or too long: everything passes
        self._commented = 0.0

    def feed(self, block: bytes) -> bytes:
        """The events to send now, b"" if none."""
        if self._over or not (self.holding or self._begins.search(block)):
            return block
        passed = b"" if self.holding else self._pass(block)
        rest = block[len(passed) :]
        if sse.count_finished(rest) or self._held.size + len(rest) > LIMIT:
            self.holding, self._over = False, True
            return passed + self._held.all() + rest
        self._held.add(rest)
        return passed

    def _pass(self, block: bytes) -> bytes:
        """Start holding. Returns the events before the first that is held."""
        self.holding = True
        self._commented = time.monotonic()
        passed = b""
        for event in sse.events(block):
            if self._begins.search(event):
                break
            passed += event
        return passed

    def guard(self, pass_through: Callable[[bytes], bool] | None) -> Callable[[bytes], bool] | None:
        """The pass-through, limited to events that are not held; feed() gets the others."""
        if pass_through is None:
            return None

        def on_data(data: bytes) -> bool:
            return not self.holding and not self._begins.search(data) and pass_through(data)

        return on_data

    def wants_comment(self) -> bool:
        """Whether it is time to tell the client that the stream is alive."""
        now = time.monotonic()
        if not self.holding or now - self._commented < COMMENT_S:
            return False
        self._commented = now
        return True


def hold_for(features: Features, *, constrained: bool) -> Hold | None:
    """What holds a resumable stream for such a request. `constrained`: the setting `routing.hold_constrained`."""
    if constrained and not features.needs.isdisjoint(CONSTRAINED):
        return Hold(TEXT)
    return None if features.needs.isdisjoint(TOOLS) else Hold(CALL)
