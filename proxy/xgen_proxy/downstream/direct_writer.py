"""The client's connection, written to without going through ASGI's send(): an extension of our own server.

send() costs a coroutine, a dictionary and, in uvicorn, two regular expressions for each header; a streamed chunk needs
none of that. What is written here is what uvicorn's cycle would write, and its state is kept as it would keep it, so
that both ways mix. https://asgi.readthedocs.io/en/latest/extensions.html
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING

from starlette.types import Scope

if TYPE_CHECKING:
    from uvicorn.protocols.http.httptools_impl import RequestResponseCycle

EXTENSION = "xgen_proxy.wire"
Headers = Sequence[tuple[bytes, bytes]]


class DirectWriter:
    """One answer to one request: 200, and then either a whole body or chunks, which ASGI's send() ends."""

    __slots__ = ("_cycle", "_write")

    def __init__(self, cycle: RequestResponseCycle) -> None:
        self._cycle = cycle
        self._write = cycle.transport.write

    @property
    def slow(self) -> bool:
        """Has the client so much to take that send() would wait? Then it is to be used, since here nothing waits."""
        return self._cycle.flow.write_paused

    def start(self, headers: Headers) -> None:
        cycle = self._cycle
        if not cycle.disconnected:
            self._write(self._head(headers, b"transfer-encoding: chunked\r\n\r\n"))
            cycle.chunked_encoding = True

    def chunk(self, data: bytes) -> None:
        if not self._cycle.disconnected:
            self._write(b"%x\r\n%b\r\n" % (len(data), data))

    def whole(self, headers: Headers, body: bytes) -> None:
        cycle = self._cycle
        if cycle.disconnected:
            return
        self._write(self._head(headers, b"content-length: %d\r\n\r\n%b" % (len(body), body)))
        cycle.response_complete = True
        cycle.message_event.set()
        if not cycle.keep_alive:
            cycle.transport.close()
        cycle.on_response()

    def _head(self, headers: Headers, rest: bytes) -> bytes:
        """Raises ValueError, having changed nothing."""
        cycle = self._cycle
        lines = [b"%b: %b\r\n" % header for header in (*cycle.default_headers, *headers)]
        if not cycle.keep_alive:
            lines.append(b"connection: close\r\n")
        head = b"".join(lines)
        if head.count(b"\n") != len(lines):
            raise ValueError("a header with a line break in it")
        cycle.response_started = True
        cycle.waiting_for_100_continue = False
        return b"HTTP/1.1 200 OK\r\n%b%b" % (head, rest)


def direct_writer_for(scope: Scope) -> DirectWriter | None:
    """None under another server than ours."""
    extensions = scope.get("extensions")
    return DirectWriter(extensions[EXTENSION]()) if extensions and EXTENSION in extensions else None
