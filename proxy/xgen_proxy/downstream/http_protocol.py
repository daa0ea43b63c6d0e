"""uvicorn's HTTP protocol, with what it leaves open closed.

- The head of a request has no limit there, neither of bytes nor of time, and one header of 100 MB stops the whole loop.
- Nor has its body a limit of time. Here a body that comes with its head, as nearly all do, costs no timer.
- Java's HTTP client asks with each POST whether HTTP/2 may be spoken (`Upgrade: h2c`), and uvicorn then loses the body.
  A server may ignore the question: https://www.rfc-editor.org/rfc/rfc9110#section-7.8
- A client that stops reading is waited for without end there, and would keep its backend's slot.
- A client that leaves is told only to the request that came last, which with pipelining is not the one that runs.
- What is not HTTP at all gets its 400 in OpenAI's shape too.
"""

from __future__ import annotations

import asyncio
import re
import weakref
from http import HTTPStatus

from uvicorn._types import ASGI3Application
from uvicorn.protocols.http.httptools_impl import HttpToolsProtocol, RequestResponseCycle

from xgen_proxy.config.settings import Limits
from xgen_proxy.downstream.direct_writer import EXTENSION
from xgen_proxy.downstream.request_body import request_id
from xgen_proxy.errors import BadRequestError, HeadersTooLargeError, ProxyError, RequestTimeoutError
from xgen_proxy.forwarding.outcome import Refusal
from xgen_proxy.request.call import Origin

HEAD_LIMIT = 64 * 1024
HEAD_S = 30.0  # from the connection, or from the first byte of a later request
STALL_S = 60.0  # a client that takes nothing for so long is gone; nginx's send_timeout is the same
UPGRADE = re.compile(rb"\r\nUpgrade:", re.IGNORECASE)


class HTTPProtocol(HttpToolsProtocol):
    _running: RequestResponseCycle | None = None
    _begun = False  # a head has begun and has not ended
    _in_body = False
    _head = 0  # bytes
    _timer: asyncio.TimerHandle | None = None  # for the head
    _stall: asyncio.TimerHandle | None = None

    def connection_made(self, transport: asyncio.Transport) -> None:  # type: ignore[override]  # as uvicorn has it
        super().connection_made(transport)
        self._timer = self.loop.call_later(HEAD_S, self._too_slow)

    def connection_lost(self, exc: Exception | None) -> None:
        self._stop_timer()
        self._stop_stall()
        super().connection_lost(exc)
        if self._running is not None and self._running is not self.cycle:
            self._running.disconnected = True
            self._running.message_event.set()

    def _start_asgi_task(self, cycle: RequestResponseCycle, app: ASGI3Application) -> None:
        self._running = cycle
        super()._start_asgi_task(cycle, app)

    def pause_writing(self) -> None:
        self._stall = self.loop.call_later(STALL_S, self.transport.abort)
        super().pause_writing()

    def resume_writing(self) -> None:
        self._stop_stall()
        super().resume_writing()

    def data_received(self, data: bytes) -> None:
        if not self._in_body and b"pgrade:" in data:
            head, end, rest = data.partition(b"\r\n\r\n")
            data = UPGRADE.sub(b"\r\nIgnored:", head) + end + rest
        super().data_received(data)
        if self._begun:
            self._watch_head(len(data))
        elif self._in_body and self._timer is None:
            self._timer = self.loop.call_later(self._body_s, self._too_slow)

    def on_message_begin(self) -> None:
        self._begun = True
        self._head = 0
        super().on_message_begin()

    def on_headers_complete(self) -> None:
        self._begun = False
        self._in_body = True
        if self._timer is not None:
            self._stop_timer()
        super().on_headers_complete()
        extension = weakref.ref(self.cycle)  # the cycle holds the scope, and both would wait for the garbage collector
        self.scope["extensions"] = {EXTENSION: extension}  # type: ignore[dict-item]  # its task has not run yet

    @property
    def _body_s(self) -> float:
        limits: Limits = self.app.gateway.settings.limits  # the app is app.py's Front
        return limits.body_timeout_s

    def on_message_complete(self) -> None:
        self._in_body = False
        self._stop_timer()
        super().on_message_complete()

    def send_400_response(self, msg: str) -> None:
        self._refuse(BadRequestError("this is not an HTTP/1.1 request"))

    def _watch_head(self, size: int) -> None:
        """Called when the head did not come in one piece, which is rare."""
        self._head += size
        if self._head > HEAD_LIMIT:
            self._refuse(
                HeadersTooLargeError(f"the request's headers have more than {HEAD_LIMIT} bytes, which is the limit")
            )
        elif self._timer is None:
            self._timer = self.loop.call_later(HEAD_S, self._too_slow)

    def _too_slow(self) -> None:
        """Who has said nothing yet is told nothing."""
        self._timer = None
        if self._begun:
            self._refuse(RequestTimeoutError(f"the request's headers did not arrive within {HEAD_S:g} s"))
        elif self._in_body:
            self._refuse(RequestTimeoutError(f"the request body did not arrive within {self._body_s:g} s"))
        else:
            self.transport.close()

    def _refuse(self, error: ProxyError) -> None:
        """Ends the connection. While an answer runs on it nothing may be said in between."""
        origin = Origin(request_id({}), {}, self.client[0] if self.client else None)
        self.app.gateway.observer.request_refused(Refusal(origin, "other", error))
        answers = self.cycle is not None and not self.cycle.response_complete
        if not answers or (self._in_body and not self.cycle.response_started):
            body = error.body()
            headers = {**dict(error.headers()), b"connection": b"close", b"content-length": b"%d" % len(body)}
            start = f"HTTP/1.1 {error.status} {HTTPStatus(error.status).phrase}".encode()
            lines = [start, *(b"%b: %b" % header for header in headers.items()), b"", body]
            self.transport.write(b"\r\n".join(lines))
        self._begun = False
        self.transport.close()

    def _stop_stall(self) -> None:
        if self._stall is not None:
            self._stall.cancel()
            self._stall = None

    def _stop_timer(self) -> None:
        if self._timer is not None:
            self._timer.cancel()
            self._timer = None
