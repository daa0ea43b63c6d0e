"""Writes a response straight to the client's transport, past ASGI's send().

What it saves: send() costs a coroutine and a dictionary per message and, in uvicorn, two regular expressions per
header. Together with pass_through.py a streamed chunk costs 15.1 µs of CPU with every feature on, as much as
in a bare relay that has no features and uses send() (15.3 µs; docs/measurements.md).

The contract:
- It writes the bytes that uvicorn's RequestResponseCycle would write and leaves the cycle in the same state, so the two
  can be mixed: ASGI's send() ends a stream that the direct writer started. tests/unit/downstream/test_direct_writer.py
  compares both against the installed uvicorn, and pyproject.toml caps uvicorn's version.
- It sends status 200 only. http_protocol.py offers it to a POST over HTTP/1.1 only: the answer to a HEAD has no body,
  and HTTP/1.0 has no chunks.
- It cannot emit a malformed frame. An empty chunk would end the body, so it is not written. Out of order, such as a
  chunk after the end, a call writes nothing and raises RuntimeError, as send() does.
- It never waits. The caller checks `paused` before each chunk and whole response, and uses send() while it is true.
- Only our own server offers it, as an ASGI extension: https://asgi.readthedocs.io/en/latest/extensions.html
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING

from starlette.types import Scope

if TYPE_CHECKING:
    from uvicorn.protocols.http.httptools_impl import RequestResponseCycle

EXTENSION = "xgen_proxy.direct_writer"
CONTROL_CHARACTERS = bytes({*range(32), 127} - {ord("\t")})
Headers = Sequence[tuple[bytes, bytes]]


class DirectWriter:
    """Sends one response: either whole(), or start() and chunk()s, which ASGI's send() ends."""

    __slots__ = ("_cycle", "_write")

    def __init__(self, cycle: RequestResponseCycle) -> None:
        self._cycle = cycle
        self._write = cycle.transport.write

    @property
    def ended(self) -> bool:
        return self._cycle.response_complete

    @property
    def paused(self) -> bool:
        """The client reads too slowly and the write buffer is full. send() would wait; this writer does not."""
        return self._cycle.flow.write_paused

    def start(self, headers: Headers) -> None:
        """Send the head of a stream.

        Raises ValueError, like whole(), if a header contains a control character, such as a line break.
        """
        cycle = self._cycle
        if not cycle.disconnected:
            self._write(b"%b%btransfer-encoding: chunked\r\n\r\n" % (self._head(headers), self._connection_header))
            cycle.chunked_encoding = True

    def chunk(self, data: bytes) -> None:
        cycle = self._cycle
        if cycle.disconnected or not data:
            return
        if cycle.response_complete or not cycle.chunked_encoding:
            raise RuntimeError("a chunk outside a stream")
        self._write(b"%x\r\n%b\r\n" % (len(data), data))

    def whole(self, headers: Headers, body: bytes) -> None:
        """Send a complete response. Neither this writer nor send() can send more after it."""
        cycle = self._cycle
        if cycle.disconnected:
            return
        parts = self._head(headers), len(body), self._connection_header, body
        self._write(b"%bcontent-length: %d\r\n%b\r\n%b" % parts)
        cycle.chunked_encoding = False
        cycle.response_complete = True
        cycle.message_event.set()
        if not cycle.keep_alive:
            cycle.transport.close()
        cycle.on_response()

    def _head(self, headers: Headers) -> bytes:
        """Build the status line and headers, and mark the response as started. If it raises, nothing has changed."""
        cycle = self._cycle
        if cycle.response_started:
            raise RuntimeError("a second head of a response")
        lines = [b"%b: %b\r\n" % header for header in (*cycle.default_headers, *headers)]
        head = b"".join(lines)
        if len(head.translate(None, CONTROL_CHARACTERS)) != len(head) - 2 * len(lines):
            raise ValueError("a header with a control character in it")
        cycle.response_started = True
        cycle.waiting_for_100_continue = False
        return b"HTTP/1.1 200 OK\r\n" + head

    @property
    def _connection_header(self) -> bytes:
        return b"" if self._cycle.keep_alive else b"connection: close\r\n"


def direct_writer_for(scope: Scope) -> DirectWriter | None:
    """None if the server does not offer the extension."""
    extensions = scope.get("extensions")
    return DirectWriter(extensions[EXTENSION]()) if extensions and EXTENSION in extensions else None
