"""uvicorn's HTTP protocol with the limits and fixes that it lacks.

- A request's head is limited in size and time. In uvicorn one header of 100 MB blocks the whole event loop. Chunk
  extensions and trailers count too, and trailers never become headers.
- A request's body is limited in time. A body that arrives together with its head, as nearly all do, costs no timer.
- The number of connections is limited. At the limit the oldest that wait for a request are closed.
- `Upgrade: h2c` is ignored, as https://www.rfc-editor.org/rfc/rfc9110#section-7.8 allows. Java's HTTP client sends it
  with every POST, and uvicorn then loses the body.
- A client that stops reading is disconnected, or it would hold its backend's slot forever.
- A disconnect reaches the request that is running. With pipelining, uvicorn reports it only to the last one received.
- Input that is not HTTP gets a 400 in OpenAI's error format.
- A refused client can read the refusal, even if it is still sending: see lingering_close.py.
- A response without a length ends with the connection if the request is HTTP/1.0. uvicorn would send chunks.
"""

from __future__ import annotations

import asyncio
import heapq
import re
import resource
import weakref
from collections.abc import Callable, Sequence
from http import HTTPStatus

from uvicorn._types import ASGI3Application, ASGISendEvent
from uvicorn.protocols.http.httptools_impl import HttpToolsProtocol, RequestResponseCycle

from xgen_proxy.downstream.cors import cors_headers
from xgen_proxy.downstream.direct_writer import EXTENSION
from xgen_proxy.downstream.lingering_close import LingeringClose, LingeringTransport
from xgen_proxy.downstream.request_id import request_id
from xgen_proxy.errors import (
    BadRequestError,
    HeadersTooLargeError,
    ProxyError,
    RequestTimeoutError,
    TooManyConnectionsError,
)

MAX_HEAD_BYTES = 64 * 1024
CHUNK_FRAME_BYTES = 12  # what frames one chunk at most: eight digits and two line breaks
HEAD_TIMEOUT_S = 30.0  # from the connection, or from the first byte of a later request
STALL_TIMEOUT_S = 60.0  # how long a client may read nothing; nginx's send_timeout is the same
MAX_STALLS = 10  # how often a client may leave the write buffer full for so long, however steadily it reads
MAX_CONNECTIONS = 16_384
RESERVED_FILES = 32  # descriptors for all but connections
UPGRADE = re.compile(rb"\r\nUpgrade:", re.IGNORECASE)

OnRefused = Callable[[str, ProxyError, str | None], None]


def http_protocol(
    get_body_timeout_s: Callable[[], float],
    report_refused: OnRefused,
    get_cors_origins: Callable[[], Sequence[str]],
) -> type[HTTPProtocol]:
    """The protocol class for one app.

    `get_body_timeout_s` is called for each body and `get_cors_origins` for each request, since a reload may change
    them. `report_refused` is called with the request ID, the error and the client's address for each request that is
    refused before it reaches the app.
    """

    class AppHTTPProtocol(HTTPProtocol):
        body_timeout_s = staticmethod(get_body_timeout_s)
        cors_origins = staticmethod(get_cors_origins)
        on_refused = staticmethod(report_refused)
        max_connections = connection_limit()
        closing: set[HTTPProtocol] = set()  # noqa: RUF012

    return AppHTTPProtocol


def connection_limit() -> int:
    """Half of the descriptors that this process may open: serving a connection may take one to a backend."""
    files, _ = resource.getrlimit(resource.RLIMIT_NOFILE)
    if files == resource.RLIM_INFINITY:
        return MAX_CONNECTIONS
    return min(MAX_CONNECTIONS, max(1, (files - RESERVED_FILES) // 2))


class UntilCloseCycle(RequestResponseCycle):
    """Answers an HTTP/1.0 request, whose client knows no chunks: a body without a length ends with the connection."""

    until_close = False

    async def send(self, message: ASGISendEvent) -> None:
        if message["type"] == "http.response.start":
            if b"content-length" not in dict(message.get("headers", [])):
                self.until_close = True
                self.chunked_encoding = False
        elif self.until_close and message["type"] == "http.response.body":
            self.expected_content_length = len(message.get("body", b""))
        await super().send(message)


class HTTPProtocol(HttpToolsProtocol):
    """Use http_protocol() to make a subclass for an app."""

    body_timeout_s: Callable[[], float]
    cors_origins: Callable[[], Sequence[str]]
    on_refused: OnRefused
    max_connections: int
    closing: set[HTTPProtocol]  # connections that were closed to make room and are not gone yet

    _running_cycle: RequestResponseCycle | None = None
    _in_head = False
    _in_body = False
    _head_bytes = 0
    _framing_bytes = 0  # of the body: chunk sizes, extensions and trailers
    _chunks = 0
    _read_timer: asyncio.TimerHandle | None = None  # for the head, then for the body
    _stall_timer: asyncio.TimerHandle | None = None
    _lingers_since: float | None = None  # loop time

    def connection_made(self, transport: asyncio.Transport) -> None:  # type: ignore[override]  # as uvicorn has it
        super().connection_made(transport)
        self._read_timer = self.loop.call_later(HEAD_TIMEOUT_S, self._on_read_timeout)
        if len(self.connections) - len(self.closing) > self.max_connections:
            self._make_room()

    def connection_lost(self, exc: Exception | None) -> None:
        self._stop_read_timer()
        self._stop_stall_timer()
        self.closing.discard(self)
        super().connection_lost(exc)
        if self._running_cycle is not None and self._running_cycle is not self.cycle:
            self._running_cycle.disconnected = True
            self._running_cycle.message_event.set()

    def _start_asgi_task(self, cycle: RequestResponseCycle, app: ASGI3Application) -> None:
        self._running_cycle = cycle
        super()._start_asgi_task(cycle, app)

    # The number of connections

    @property
    def _waiting_since(self) -> float | None:
        """When the connection began to wait for a request, for the rest of one, or for its end, as loop time.

        None while a request is served.
        """
        if self._lingers_since is not None:
            return self._lingers_since
        if self.timeout_keep_alive_task is not None:
            return self.timeout_keep_alive_task.when() - self.timeout_keep_alive
        if self._read_timer is None or self._is_responding:
            return None
        return self._read_timer.when() - (self.body_timeout_s() if self._in_body else HEAD_TIMEOUT_S)

    @property
    def _is_responding(self) -> bool:
        """Whether a request that has arrived completely is being served, or a response has begun."""
        cycle = self._running_cycle
        return cycle is not None and not cycle.response_complete and (cycle.response_started or not cycle.more_body)

    def _make_room(self) -> None:
        """Close the connections that have waited longest: several, since finding them means to look at all."""
        waiting: list[tuple[float, int, HTTPProtocol]] = []
        for each in self.connections:
            if isinstance(each, HTTPProtocol) and each is not self and each not in self.closing:
                since = each._waiting_since
                if since is not None:
                    waiting.append((since, id(each), each))
        for _, _, oldest in heapq.nsmallest(1 + self.max_connections // 64, waiting):
            self.closing.add(oldest)
            oldest.transport.close()
        if not waiting:
            limit = f"{self.max_connections} connections, which is its limit"
            self._report_and_write(TooManyConnectionsError(f"the proxy serves {limit}; try again", retry_after=1))
            self.transport.close()  # without lingering, which would keep its descriptor

    # A client that reads slowly

    def pause_writing(self) -> None:
        self._stalls_left = MAX_STALLS
        self._watch_for_progress()
        super().pause_writing()

    def _watch_for_progress(self) -> None:
        self._unsent = self.transport.get_write_buffer_size()
        self._stall_timer = self.loop.call_later(STALL_TIMEOUT_S, self._on_stall)

    def _on_stall(self) -> None:
        self._stalls_left -= 1
        if self._stalls_left and self.transport.get_write_buffer_size() < self._unsent:
            self._watch_for_progress()
        else:
            self.transport.abort()

    def resume_writing(self) -> None:
        self._stop_stall_timer()
        super().resume_writing()

    # What arrives

    def data_received(self, data: bytes) -> None:
        cycle = self.cycle if self._in_body else None
        if cycle is None and b"pgrade:" in data:
            head, end, rest = data.partition(b"\r\n\r\n")
            data = UPGRADE.sub(b"\r\nIgnored:", head) + end + rest
        received = len(cycle.body) if cycle is not None else 0
        super().data_received(data)
        if self._in_head:
            self._limit_head(len(data))
        elif self._in_body:
            if cycle is not None and cycle is self.cycle:
                self._limit_framing(len(data) - (len(cycle.body) - received))
            if self._read_timer is None:
                self._expect_more_body()

    def on_message_begin(self) -> None:
        self._in_head = True
        self._head_bytes = 0
        super().on_message_begin()

    def on_headers_complete(self) -> None:
        self._in_head = False
        if self._read_timer is not None:
            self._stop_read_timer()
        super().on_headers_complete()
        self._in_body = True
        self.headers = []  # for trailers, which must not become headers: RFC 9110, 6.5.1
        scope, cycle = self.scope, self.cycle  # the task that serves them has not run yet
        if scope["http_version"] == "1.0":
            cycle.__class__ = UntilCloseCycle
        elif scope["method"] == "POST":
            # A weak reference, since the cycle holds the scope: see garbage_collection.py.
            scope["extensions"] = {EXTENSION: weakref.ref(cycle)}  # type: ignore[dict-item]
        origins = self.cors_origins()
        if origins:
            cycle.default_headers = [*cycle.default_headers, *cors_headers(scope["headers"], origins)]

    def on_chunk_header(self) -> None:
        self._chunks += 1

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
            self._refuse_headers("headers")
        elif self._read_timer is None:
            self._read_timer = self.loop.call_later(HEAD_TIMEOUT_S, self._on_read_timeout)

    def _expect_more_body(self) -> None:
        """The body did not arrive together with the head, which is rare."""
        self._chunks = self._framing_bytes = 0
        self._read_timer = self.loop.call_later(self.body_timeout_s(), self._on_read_timeout)
        self.cycle.transport = LingeringTransport(self.transport, self)  # type: ignore[assignment]

    def _limit_framing(self, size: int) -> None:
        """Limit the chunk extensions and trailers. `size`: of what arrived, without the body."""
        if self.cycle.response_complete:  # uvicorn discards the rest of the body, so its size is unknown
            return
        self._framing_bytes += size
        if self._framing_bytes > MAX_HEAD_BYTES + CHUNK_FRAME_BYTES * self._chunks:
            self._refuse_headers("chunk extensions and trailers")

    def _refuse_headers(self, what: str) -> None:
        limit = f"{MAX_HEAD_BYTES} bytes, which is the limit"
        self._refuse(HeadersTooLargeError(f"the request's {what} have more than {limit}"))

    def _on_read_timeout(self) -> None:
        """Refuse a request that arrives too slowly. Close idle connections without sending a response."""
        self._read_timer = None
        if self._in_head:
            self._refuse(RequestTimeoutError(f"the request's headers did not arrive within {HEAD_TIMEOUT_S:g} s"))
        elif self._in_body:
            self._refuse(RequestTimeoutError(f"the request body did not arrive within {self.body_timeout_s():g} s"))
        else:
            self.transport.close()

    # Refusals

    def _refuse(self, error: ProxyError) -> None:
        """Close the connection, with an error response unless one would land inside or after another one."""
        if self._lingers_since is not None or self.transport.is_closing():
            return  # one read may hold two reasons to refuse
        if self._can_refuse:
            self._report_and_write(error)
            self._linger()
        else:
            self.on_refused(request_id({}), error, self._peer)
            self.transport.close()
        self._in_head = False

    @property
    def _can_refuse(self) -> bool:
        running = self._running_cycle
        if running is None or running.response_complete:
            return not self._in_body or running is not self.cycle
        return self._in_body and running is self.cycle and not running.response_started

    def _report_and_write(self, error: ProxyError) -> None:
        self.on_refused(request_id({}), error, self._peer)
        if self._in_body:
            self.cycle.disconnected = True  # so that the app writes no second response
            self.cycle.message_event.set()
        body = error.body()
        fields = {**dict(error.headers()), b"connection": b"close", b"content-length": b"%d" % len(body)}
        if self.headers is not None:
            fields.update(cors_headers(self.scope["headers"], self.cors_origins()))
        start = f"HTTP/1.1 {error.status} {HTTPStatus(error.status).phrase}".encode()
        lines = [start, *(b"%b: %b" % field for field in fields.items()), b"", b""]
        self.transport.write(b"\r\n".join(lines) + (b"" if self.parser.get_method() == b"HEAD" else body))

    @property
    def _peer(self) -> str | None:
        return self.client[0] if self.client else None

    def close_after_response(self) -> None:
        """What LingeringTransport.close() does."""
        if self._in_body:
            self._linger()
        else:
            self.transport.close()

    def _linger(self) -> None:
        self._stop_read_timer()
        if not self.transport.is_closing():
            self._lingers_since = self.loop.time()
            LingeringClose(self.transport, self)

    def _stop_stall_timer(self) -> None:
        if self._stall_timer is not None:
            self._stall_timer.cancel()
            self._stall_timer = None

    def _stop_read_timer(self) -> None:
        if self._read_timer is not None:
            self._read_timer.cancel()
            self._read_timer = None
