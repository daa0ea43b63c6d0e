"""What the client is sent: by the wire where there is one, else by ASGI's send()."""

from __future__ import annotations

import time
from collections.abc import Callable

from starlette.types import Send

from xgen_proxy import sse
from xgen_proxy.downstream.direct_writer import DirectWriter, Headers
from xgen_proxy.forwarding.exchange import Exchange
from xgen_proxy.forwarding.replay_buffer import ReplayBuffer

EVENT_STREAM = [
    (b"content-type", b"text/event-stream; charset=utf-8"),
    (b"x-accel-buffering", b"no"),
    (b"cache-control", b"no-cache"),
]
JSON = (b"content-type", b"application/json")


class ResponseWriter:
    """`status`: 0 until something has been sent. `first_output`: when that was, time.perf_counter(). `retained`: what
    was shown of a stream; None where a break cannot be mended anyway."""

    __slots__ = ("_send", "_size", "_wire", "first_output", "retained", "status")

    def __init__(self, send: Send, wire: DirectWriter | None) -> None:
        self._send = send
        self._wire = wire
        self.status = 0
        self.first_output = 0.0
        self.retained: ReplayBuffer | None = None
        self._size: int | None = None

    @property
    def size(self) -> int | None:
        """Bytes of the answer, but for the closing `[DONE]`; None where nobody has counted them."""
        return self._size if self.retained is None else self.retained.size

    def _begin(self) -> None:
        self.first_output = time.perf_counter()
        self.status = 200

    async def whole(self, headers: Headers, data: bytes) -> None:
        self._begin()
        self._size = len(data)
        headers = [JSON, *headers]
        if self._wire is not None and not self._wire.slow:
            self._wire.whole(headers, data)
        else:
            headers.append((b"content-length", b"%d" % len(data)))
            await self._send({"type": "http.response.start", "status": 200, "headers": headers})
            await self.end(data)

    async def start(self, headers: Headers) -> None:
        """Of a stream."""
        self._begin()
        headers = [*EVENT_STREAM, *headers]
        if self._wire is not None:
            self._wire.start(headers)
        else:
            await self._send({"type": "http.response.start", "status": 200, "headers": headers})

    async def show(self, events: bytes) -> None:
        if self.retained is not None:
            self.retained.add(events)
        if self._wire is not None and not self._wire.slow:
            self._wire.chunk(events)
        else:
            await self.say(events)

    async def say(self, data: bytes) -> None:
        """What is no part of the answer itself."""
        await self._send({"type": "http.response.body", "body": data, "more_body": True})

    async def end(self, data: bytes = b"") -> None:
        await self._send({"type": "http.response.body", "body": data, "more_body": False})

    def passing(self, attempt: Exchange) -> Callable[[bytes], bool] | None:
        """What hands ordinary events on as they come, without waking anybody: most of what a stream is made of. It says
        whether it has taken them."""
        if self._wire is None:
            return None
        wire, splitter, retained = self._wire, attempt.splitter, self.retained

        def take(data: bytes) -> bool:
            if splitter.rest or not sse.are_ordinary(data) or wire.slow:
                return False
            if retained is not None:
                retained.add(data)
            wire.chunk(data)
            return True

        return take
