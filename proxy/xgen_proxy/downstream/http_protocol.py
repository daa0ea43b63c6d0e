"""uvicorn's HTTP protocol with the limits and fixes that it lacks.

- A request's head is limited in size and time. In uvicorn one header of 100 MB blocks the whole event loop.
- A request's body is limited in time. A body that arrives together with its head, as nearly all do, costs no timer.
- `Upgrade: h2c` is ignored, as https://www.rfc-editor.org/rfc/rfc9110#section-7.8 allows. Java's HTTP client sends it
  with every POST, and uvicorn then loses the body.
- A client that stops reading is disconnected, or it would hold its backend's slot forever.
- A disconnect reaches the request that is running. With pipelining, uvicorn reports it only to the last one received.
- Input that is not HTTP gets a 400 in OpenAI's error format.
"""

from __future__ import annotations

import asyncio
import re
import weakref
from collections.abc import Callable
from http import HTTPStatus

from uvicorn._types import ASGI3Application
from uvicorn.protocols.http.httptools_impl import HttpToolsProtocol, RequestResponseCycle

from xgen_proxy.downstream.direct_writer import EXTENSION
from xgen_proxy.downstream.request_id import request_id
from xgen_proxy.errors import BadRequestError, HeadersTooLargeError, ProxyError, RequestTimeoutError

MAX_HEAD_BYTES = 64 * 1024
HEAD_TIMEOUT_S = 30.0  # from the connection, or from the first byte of a later request
STALL_TIMEOUT_S = 60.0  # how long a client may read nothing; nginx's send_timeout is the same
UPGRADE = re.compile(rb"\r\nUpgrade:", re.IGNORECASE)

OnRefused = Callable[[str, ProxyError, str | None], None]


def http_protocol(get_body_timeout_s: Callable[[], float], report_refused: OnRefused) -> type[HTTPProtocol]:
    """The protocol class for one app.

    `get_body_timeout_s` is called for each body, since a reload may change the limit. `report_refused` is called with
    the request ID, the error and the client's address for each request that is refused before it reaches the app.
    """

    class AppHTTPProtocol(HTTPProtocol):
        body_timeout_s = staticmethod(get_body_timeout_s)
        on_refused = staticmethod(report_refused)

    return AppHTTPProtocol


class HTTPProtocol(HttpToolsProtocol):
    """Use http_protocol() to make a subclass for an app."""

    body_timeout_s: Callable[[], float]
    on_refused: OnRefused

    _running_cycle: RequestResponseCycle | None = None
    _in_head = False
    _in_body = False
    _head_bytes = 0
    _read_timer: asyncio.TimerHandle | None = None  # for the head, then for the body
    _stall_timer: asyncio.TimerHandle | None = None

    def connection_made(self, transport: asyncio.Transport) -> None:  # type: ignore[override]  # as uvicorn has it
        super().connection_made(transport)
        self._read_timer = self.loop.call_later(HEAD_TIMEOUT_S, self._on_read_timeout)

    def connection_lost(self, exc: Exception | None) -> None:
        self._stop_read_timer()
        self._stop_stall_timer()
        super().connection_lost(exc)
        if self._running_cycle is not None and self._running_cycle is not self.cycle:
            self._running_cycle.disconnected = True
            self._running_cycle.message_event.set()

    def _start_asgi_task(self, cycle: RequestResponseCycle, app: ASGI3Application) -> None:
        self._running_cycle = cycle
        super()._start_asgi_task(cycle, app)

    def pause_writing(self) -> None:
        self._stall_timer = self.loop.call_later(STALL_TIMEOUT_S, self.transport.abort)
        super().pause_writing()

    def resume_writing(self) -> None:
        self._stop_stall_timer()
        super().resume_writing()

    def data_received(self, data: bytes) -> None:
        if not self._in_body and b"pgrade:" in data:
            head, end, rest = data.partition(b"\r\n\r\n")
            data = UPGRADE.sub(b"\r\nIgnored:", head) + end + rest
        super().data_received(data)
        if self._in_head:
            self._limit_head(len(data))
        elif self._in_body and self._read_timer is None:
            self._read_timer = self.loop.call_later(self.body_timeout_s(), self._on_read_timeout)

    def on_message_begin(self) -> None:
        self._in_head = True
        self._head_bytes = 0
        super().on_message_begin()

    def on_headers_complete(self) -> None:
        self._in_head = False
        self._in_body = True
        if self._read_timer is not None:
            self._stop_read_timer()
        super().on_headers_complete()
        # A weak reference, since the cycle holds the scope: see garbage_collection.py. The task has not run yet.
        self.scope["extensions"] = {EXTENSION: weakref.ref(self.cycle)}  # type: ignore[dict-item]

    def on_message_complete(self) -> None:
        self._in_body = False
        self._stop_read_timer()
        super().on_message_complete()

    def send_400_response(self, msg: str) -> None:
        self._refuse(BadRequestError("this is not an HTTP/1.1 request"))

    def _limit_head(self, size: int) -> None:
        """Count the bytes and start the timer of a head that arrives in several pieces, which is rare."""
        self._head_bytes += size
        if self._head_bytes > MAX_HEAD_BYTES:
            self._refuse(
                HeadersTooLargeError(f"the request's headers have more than {MAX_HEAD_BYTES} bytes, which is the limit")
            )
        elif self._read_timer is None:
            self._read_timer = self.loop.call_later(HEAD_TIMEOUT_S, self._on_read_timeout)

    def _on_read_timeout(self) -> None:
        """Refuse a request that arrives too slowly. Close idle connections without sending a response."""
        self._read_timer = None
        if self._in_head:
            self._refuse(RequestTimeoutError(f"the request's headers did not arrive within {HEAD_TIMEOUT_S:g} s"))
        elif self._in_body:
            self._refuse(RequestTimeoutError(f"the request body did not arrive within {self.body_timeout_s():g} s"))
        else:
            self.transport.close()

    def _refuse(self, error: ProxyError) -> None:
        """Close the connection, with an error response unless one would land inside another request's response."""
        self.on_refused(request_id({}), error, self.client[0] if self.client else None)
        responding = self.cycle is not None and not self.cycle.response_complete
        if not responding or (self._in_body and not self.cycle.response_started):
            body = error.body()
            headers = {**dict(error.headers()), b"connection": b"close", b"content-length": b"%d" % len(body)}
            start = f"HTTP/1.1 {error.status} {HTTPStatus(error.status).phrase}".encode()
            lines = [start, *(b"%b: %b" % header for header in headers.items()), b"", body]
            self.transport.write(b"\r\n".join(lines))
        self._in_head = False
        self.transport.close()

    def _stop_stall_timer(self) -> None:
        if self._stall_timer is not None:
            self._stall_timer.cancel()
            self._stall_timer = None

    def _stop_read_timer(self) -> None:
        if self._read_timer is not None:
            self._read_timer.cancel()
            self._read_timer = None
