"""What happened to a request, and what its observers see: metrics, the request log, traces."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Literal, get_args

from xgen_proxy.errors import ProxyError, UpstreamError
from xgen_proxy.forwarding.usage import Usage
from xgen_proxy.request.call import Call, Origin
from xgen_proxy.request.features import Endpoint
from xgen_proxy.routing.router import Target
from xgen_proxy.values import frozen

Block = Literal["text", "reasoning", "tool_call", "constrained"]  # of an answer, in which its stream broke
BLOCKS: tuple[Block, ...] = get_args(Block)
CLIENT_DISCONNECTED = 499  # nginx's number; it appears only in metrics, logs and traces


@frozen
class Failure:
    """An attempt that failed, or a target that was down when its turn came."""

    target: Target
    error: UpstreamError


@frozen
class Outcome:
    """What happened to a request that was parsed. Times are `time.perf_counter()`, durations seconds."""

    status: int  # what the client received, or CLIENT_DISCONNECTED
    error: ProxyError | None = None  # sent instead of an answer, or as the last event of a stream
    first_choice: Target | None = None  # the plan's first target; None if nothing could be planned
    target: Target | None = None  # the last target tried
    attempts: int = 0
    failures: Sequence[Failure] = ()
    resumed: int = 0  # how often the stream was resumed
    interrupted: UpstreamError | None = None  # broke the stream, which could not be resumed
    first_output: float = 0.0  # 0 if nothing was sent
    finished: float = 0.0
    waited: float = 0.0  # for slots and backends
    queued: float = 0.0  # the part of `waited` spent in the queue for a slot
    left_queue: bool = False  # the client disconnected while the request was queued
    bytes_sent: int | None = None  # without the closing `[DONE]`; None if not counted
    chunks: int | None = None  # of a stream that could be resumed; None if not counted
    usage: Usage | None = None  # as the backend reported it
    completed: bool = False  # the response was sent to its end
    broken_in: Block = "text"  # the kind of block in which a stream broke


@frozen
class Refusal:
    """A request that was refused before it could be routed. `endpoint` is "other" outside the inference routes."""

    origin: Origin
    endpoint: Endpoint | str
    error: ProxyError


class Observer:
    """Sees what happens to requests. Override what you need; the methods must return at once and not raise."""

    def request_refused(self, refusal: Refusal) -> None:
        """The request was refused before it was parsed. No other method is called for it."""

    def request_started(self, call: Call) -> None:
        """The request was parsed. `request_finished` follows in every case."""

    def attempt_started(self, call: Call, target: Target, number: int) -> bytes | None:
        """A slot on `target` is held. `number` counts from 1.

        Returns the trace context for the backend as header lines, or None to forward the client's own.
        """
        return None

    def attempt_finished(self, call: Call, target: Target, error: BaseException | None, tail: bytes) -> None:
        """The slot was released. `error` is None if the attempt succeeded.

        `tail` is the whole response, or the last events of the stream.
        """

    def request_finished(self, call: Call, outcome: Outcome) -> None:
        """The last byte was sent, or the client disconnected."""
