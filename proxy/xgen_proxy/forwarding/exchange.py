"""One request to one replica, and its response: a stream's events as they come, or the whole body.

Used while a slot of the replica is held. On every way out the connection goes back to the pool if it can be reused;
otherwise it is closed, which cancels the request upstream.
"""

from __future__ import annotations

import math
import time
from collections.abc import Callable
from types import TracebackType
from typing import Any

from xgen_proxy import sse
from xgen_proxy.dialects.backend_request import BackendRequest
from xgen_proxy.dialects.error_mapping import as_long_prompt, read_error, stream_error
from xgen_proxy.dialects.whole_response import check_whole
from xgen_proxy.errors import RequestRejectedError, UpstreamProtocolError
from xgen_proxy.fleet.replica import Replica
from xgen_proxy.request.features import Json
from xgen_proxy.upstream.connection import Connection

ANSWER_LIMIT = 64 * 1024 * 1024  # bytes of a whole response; the largest batch of embeddings has 45 MB in base64
ERROR_LIMIT = 128 * 1024  # bytes; engines repeat the whole request in some errors
MAX_HELD = 256 * 1024  # bytes of comments and roles before the first output
JSON_TYPE = b"content-type: application/json"  # as a replica's head has it
TOKENS_PER_WORD = 1.3  # of English
# Parsers hold a tool's argument back until it is complete: 32 s of silence for one file on eight B300s, 130 s on one
# small GPU. https://github.com/vllm-project/vllm/pull/50627
HELD_BACK = frozenset({"tools", "forced_tool", "structured_outputs", "json_schema", "json_object", "grammar"})
PATIENCE = 10  # times the idle limit


class Exchange:
    """`with Exchange(…) as exchange:`, then `open()`, then either `whole()` or the events.

    `streams`: the replica was asked for a stream, or answers with one although its request is opaque.
    """

    __slots__ = (
        "_connection",
        "_deadline",
        "_expects_close",
        "_payload",
        "_request_id",
        "_timeout_s",
        "_trace",
        "dialect",
        "replica",
        "request",
        "splitter",
        "streams",
    )

    def __init__(self, replica: Replica, request: BackendRequest, request_id: str, trace: bytes) -> None:
        """`request_id`: one that no other exchange has. `trace`: header lines.

        Raises BadRequestError if the backend cannot serve the request.
        """
        self.replica = replica
        self.dialect = replica.dialect
        self.request = request
        self.streams = not request.opaque and self.dialect.asks_for_stream(request)
        self.splitter = self.dialect.event_splitter()
        self._payload = self.dialect.prepare(request)
        self._request_id = request_id
        self._trace = trace
        total_s = replica.settings.total_timeout_s
        self._timeout_s = min(self._first_byte_timeout_s(), total_s) if self.streams else total_s
        self._connection: Connection | None = None
        self._expects_close = False

    def _first_byte_timeout_s(self) -> float:
        """Longer for longer prompts: a CPU prefills some 100 tokens a second. Chinese and JSON have few words."""
        settings, features = self.replica.settings, self.request.features
        words = max(features.prompt_words, features.prompt_tokens / TOKENS_PER_WORD)
        return settings.first_byte_timeout_s + settings.first_byte_per_1k_words_s * (words / 1000)

    @property
    def _idle_timeout_s(self) -> float:
        """Longer where an engine's parser holds output back: the total limit holds all the same."""
        timeout_s = self.replica.settings.idle_timeout_s
        return timeout_s if self.request.features.needs.isdisjoint(HELD_BACK) else timeout_s * PATIENCE

    def __enter__(self) -> Exchange:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, traceback: TracebackType | None
    ) -> None:
        if self._connection is not None:
            reuse = not self.streams or self.dialect.reuse_after_stream
            self.replica.pool.release(self._connection, expect_last_chunk=self._expects_close, reuse=reuse)

    async def open(self) -> None:
        """Sends the request and waits for status and headers.

        Raises UpstreamError, and RequestRejectedError if the backend rejects the request.
        """
        self._deadline = time.perf_counter() + self._timeout_s
        total_s = self.replica.settings.total_timeout_s
        message = self._head() + self._payload
        connection = self._connection = await self.replica.pool.exchange(message, self._timeout_s, total_s)
        if connection.status != 200:
            error = read_error(connection.status, await self._error_body(connection), self.request.opaque)
            raise self._blamed(error)
        head = connection.headers
        if head.get(b"content-encoding", b"identity").lower() != b"identity":
            raise UpstreamProtocolError("a compressed answer, although none was asked for")
        if b"html" in head.get(b"content-type", b"").lower():
            raise UpstreamProtocolError("a web page instead of an answer")

    async def _error_body(self, connection: Connection) -> bytes:
        """The beginning of it. A connection with more to come is not reused."""
        body = b""
        while len(body) < ERROR_LIMIT and (data := await connection.read(self._time_left, self._timeout_s)):
            body += data
        return body

    def _head(self) -> bytes:
        lines = self._trace
        if self.dialect.sends_request_id:
            lines += b"x-request-id: " + self._request_id.encode() + b"\r\n"
        head, form = self.replica.head, self.request.form
        if form is not None:
            head = head.replace(JSON_TYPE, b"content-type: " + form.content_type, 1)
        parts = self.dialect.path(self.request).encode(), head, lines, len(self._payload)
        return b"POST %b HTTP/1.1\r\n%b%bcontent-length: %d\r\n\r\n" % parts

    @property
    def _time_left(self) -> float:
        return max(0.01, self._deadline - time.perf_counter())

    async def whole(self) -> bytes:
        """The whole body. Raises UpstreamError, or the meaning of an error with status 200."""
        data = await self.body()
        check_whole(data, self.request.features.endpoint, parse=not self.splitter.passes_unparsed)
        if sse.is_abort(data):
            raise UpstreamProtocolError("finish_reason abort: the engine is shutting down")
        return data

    async def body(self) -> bytes:
        """The whole body, unread. Raises UpstreamError."""
        if not self.connection.framed:
            raise UpstreamProtocolError("an answer without a length, which may be cut short")
        data = await self.connection.read_all(self._time_left, ANSWER_LIMIT)
        self.replica.record_activity()
        return data

    async def first_events(self, begun: Callable[[bytes], bool] = bool) -> bytes:
        """Waits for the first real output, the commit point: vLLM sends 200 and headers before it accepts a request.

        `begun` tells of all events so far whether there is output among them; by default, any chunk is output. Raises
        what `begun` raises, and the meaning of an error event or of an empty stream.
        """
        held = b""
        while True:
            data = await self.connection.read(self._time_left, self._timeout_s)
            if not data:
                raise await self.dialect.explain_empty_stream(self.request, self.post)
            block = self.splitter.feed(data)
            if sse.is_error(block) or sse.is_abort(block):
                raise self.error_in(block)
            held += block
            if sse.has_line_starting(block, b"data: {"):
                self.replica.record_activity()
                if begun(held):
                    return held
                # The engine has begun: what follows the role is silence between two chunks.
                self._timeout_s = self._idle_timeout_s
                self._deadline = max(self._deadline, time.perf_counter() + self._timeout_s)
            if len(held) > MAX_HELD:
                raise UpstreamProtocolError(f"no output in the first {MAX_HELD} bytes")

    async def next_events(self, pass_through: Callable[[bytes], bool] | None = None) -> bytes:
        """The next events, b"" at the end of the stream. Raises UpstreamError.

        `pass_through` is offered all data first, and returns whether it has sent it to the client.
        """
        timeout_s = self._idle_timeout_s
        while data := await self.connection.read(timeout_s, on_data=pass_through):
            if block := self.splitter.feed(data):
                self.replica.record_activity()
                return block
        return b""

    def error_in(self, block: bytes) -> Exception:
        """The meaning of the error event or the abort among these events."""
        for event in sse.events(block):
            if sse.is_error(event):
                return self._blamed(stream_error(event))
        return UpstreamProtocolError("finish_reason abort: the engine is shutting down")

    def _blamed(self, error: Exception) -> Exception:
        """Where an engine does not tell whether the prompt or max_tokens is too large: the prompt, unless the client
        means its max_tokens and the prompt fits by estimate. An agent that is told so compacts; one that is told that
        its max_tokens is too large gives up, since that is a constant of its own."""
        features, context = self.request.features, self.request.context
        meant = features.max_tokens_believed and features.prompt_tokens < (context or math.inf)
        return error if meant or not isinstance(error, RequestRejectedError) else as_long_prompt(error)

    def expect_close(self) -> None:
        """The response is complete but for its closing chunk, so that the connection is worth waiting for."""
        self._expects_close = True

    def cancel(self) -> None:
        """Ends the generation: all output that is wanted has arrived."""
        self.connection.close()

    async def post(self, path: str, body: Json) -> tuple[int, Any]:
        """Asks the same replica a small question. Returns (status, JSON). Raises UpstreamError."""
        return await self.replica.post_json(path, body)

    @property
    def connection(self) -> Connection:
        if self._connection is None:
            raise RuntimeError("the exchange is not open")
        return self._connection
