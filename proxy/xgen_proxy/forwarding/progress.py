"""What has happened to a request so far: the notes that forwarding keeps and turns into an Outcome."""

from __future__ import annotations

import random
import time
from collections.abc import Callable
from types import TracebackType

from xgen_proxy.downstream.response_writer import ResponseWriter
from xgen_proxy.errors import ProxyError, UpstreamError
from xgen_proxy.forwarding.outcome import Block, Failure, Outcome
from xgen_proxy.forwarding.usage import usage_at_end
from xgen_proxy.request.call import Call
from xgen_proxy.routing.router import Target


class Stopwatch:
    """Adds up the seconds spent in `with stopwatch:` blocks, which must not be nested."""

    __slots__ = ("_began", "seconds")

    def __init__(self) -> None:
        self.seconds = 0.0

    def __enter__(self) -> None:
        self._began = time.perf_counter()

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, traceback: TracebackType | None
    ) -> None:
        self.seconds += time.perf_counter() - self._began


class Progress:
    """The fields are those of Outcome; `waiting` measures its `waited`.

    `tail` is the whole response, or the last events of the stream, once it is complete.
    """

    __slots__ = (
        "at_commit",
        "attempts",
        "broken_in",
        "call",
        "failures",
        "first_choice",
        "interrupted",
        "left_queue",
        "queued",
        "resumed",
        "tail",
        "target",
        "waiting",
    )

    def __init__(self, call: Call) -> None:
        self.call = call
        self.first_choice: Target | None = None
        self.target: Target | None = None
        self.attempts = 0
        self.failures: list[Failure] = []
        self.resumed = 0
        self.interrupted: UpstreamError | None = None
        self.broken_in: Block = "text"
        self.waiting = Stopwatch()
        self.queued = 0.0
        self.left_queue = False
        self.tail = b""
        self.at_commit: Callable[[], None] | None = None

    def commit(self) -> None:
        """The answer begins, or there is none: calls `at_commit`, once."""
        committed, self.at_commit = self.at_commit, None
        if committed is not None:
            committed()

    @property
    def reason(self) -> str:
        """Why the request went to its present target."""
        if not self.failures:
            return self.target.reason if self.target is not None else ""
        last = self.failures[-1]
        return f"fallback: {last.target.replica.name} {last.error.outcome}"

    @property
    def provenance(self) -> str:
        """The same as a comment in a stream whose headers are sent already. Empty if there is no target."""
        target = self.target
        if target is None:
            return ""
        distance = f"; model distance {target.distance}" if target.distance else ""
        return f"{target.replica.name}; {self.reason}{distance}"

    @property
    def backend_request_id(self) -> str:
        """The id of the present attempt: the client's, with the attempt's number and a random suffix.

        Two requests at once with the same id broke or leaked requests in vLLM, and a client may use one twice.
        https://github.com/vllm-project/vllm/pull/27987
        """
        return f"{self.call.id}-{self.attempts}-{random.getrandbits(32):08x}"

    def response_headers(self) -> list[tuple[bytes, bytes]]:
        """The headers that explain a response."""
        headers = [(b"x-request-id", self.call.id.encode())]
        if self.first_choice is None:
            return headers
        headers.append((b"x-attempts", b"%d" % self.attempts))
        if self.target is not None:
            overhead_ms = (time.perf_counter() - self.call.started - self.waiting.seconds) * 1000
            headers += [
                *self.target.replica.response_headers,
                (b"x-route-reason", self.reason.encode("ascii", "replace")),
                (b"x-overhead-ms", b"%.2f" % max(overhead_ms, 0.0)),
            ]
            if self.target.distance:
                headers.append((b"x-model-distance", self.target.distance.encode()))
        return headers

    def outcome(self, status: int, writer: ResponseWriter, error: ProxyError | None = None) -> Outcome:
        return Outcome(
            status,
            error,
            self.first_choice,
            self.target,
            self.attempts,
            self.failures,
            self.resumed,
            self.interrupted,
            writer.first_output,
            time.perf_counter(),
            self.waiting.seconds,
            self.queued,
            self.left_queue,
            writer.bytes_sent,
            writer.chunks,
            usage_at_end(self.tail) if self.tail else None,
            bool(self.tail),
            self.broken_in,
        )
