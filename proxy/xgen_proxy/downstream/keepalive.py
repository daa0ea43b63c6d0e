"""Comments for a client whose stream is silent, so that load balancers that cut silent connections let it live."""

from __future__ import annotations

import asyncio

from xgen_proxy.downstream.direct_writer import Headers
from xgen_proxy.downstream.response_writer import ResponseWriter


class KeepAlive:
    """`with KeepAlive(…):` sends a comment each `interval_s` in which the stream has sent nothing else.

    The first comment starts the response, if nothing else has. This is also the log of a stream that needs no other.
    """

    def __init__(self, writer: ResponseWriter, interval_s: float, headers: Headers) -> None:
        self.count = 0
        self.size = 0
        self._writer = writer
        self._interval_s = interval_s
        self._headers = headers
        self._seen: int | None = 0

    def __enter__(self) -> None:
        self._writer.sent_log = self
        self._start_timer()

    def __exit__(self, *_: object) -> None:
        self._timer.cancel()

    def add(self, block: bytes) -> None:
        self.count += 1
        self.size += len(block)

    def _start_timer(self) -> None:
        self._timer = asyncio.get_running_loop().call_later(self._interval_s, self._on_timer)

    def _on_timer(self) -> None:
        if self._writer.chunks == self._seen:
            self._writer.waiting(self._headers)
        self._seen = self._writer.chunks
        self._start_timer()
