"""Closes a connection on which the client is still sending, in a way that lets it read the response.

Closing a socket with unread bytes in it resets the connection, and the reset destroys a response that the client has
not read yet. So we close our side only, and read and discard for a while what the client still sends:
https://www.rfc-editor.org/rfc/rfc9112#section-9.6
"""

from __future__ import annotations

import asyncio
import weakref
from typing import Any, Protocol

QUIET_S = 5.0  # a client that sends nothing for this long is done; nginx's lingering_timeout is the same
LONGEST_S = 30.0  # nginx's lingering_time is the same
MAX_BYTES = 64 * 1024 * 1024


class ClosesLater(Protocol):
    def close_after_response(self) -> None: ...


class LingeringTransport:
    """A transport whose close() is its protocol's close_after_response().

    uvicorn's request cycle gets it while the request's body is incomplete. The protocol is referenced weakly, because
    it holds the cycle.
    """

    def __init__(self, transport: asyncio.Transport, protocol: ClosesLater) -> None:
        self._transport = transport
        self._protocol = weakref.ref(protocol)

    def close(self) -> None:
        protocol = self._protocol()
        if protocol is not None:
            protocol.close_after_response()

    def __getattr__(self, name: str) -> Any:
        return getattr(self._transport, name)


class LingeringClose(asyncio.Protocol):
    """Takes over `transport`, which must have written the whole response, from `protocol`.

    `protocol` still learns about the state of the write buffer and the end of the connection.
    """

    def __init__(self, transport: asyncio.Transport, protocol: asyncio.Protocol) -> None:
        self._transport = transport
        self.connection_lost = protocol.connection_lost  # type: ignore[method-assign]
        self.pause_writing = protocol.pause_writing  # type: ignore[method-assign]
        self.resume_writing = protocol.resume_writing  # type: ignore[method-assign]
        self._loop = asyncio.get_running_loop()
        self._received = self._received_before = 0
        self._deadline = self._loop.time() + LONGEST_S
        transport.set_protocol(self)
        transport.write_eof()
        self._loop.call_later(QUIET_S, self._check)

    def data_received(self, data: bytes) -> None:
        self._received += len(data)
        if self._received > MAX_BYTES:
            self._transport.close()

    def _check(self) -> None:
        """Runs on after the connection is closed, once, and then does nothing."""
        if self._received == self._received_before or self._loop.time() >= self._deadline:
            self._transport.close()
        elif not self._transport.is_closing():
            self._received_before = self._received
            self._loop.call_later(QUIET_S, self._check)
