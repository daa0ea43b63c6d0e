"""Sends a chat completion to a client of another API.

The forwarding side writes chat completions, as always. The replay buffer keeps the chat's events, so that a broken
stream resumes like any other.
"""

from __future__ import annotations

import re
import time
from collections.abc import Callable

import orjson
from starlette.types import Send

from xgen_proxy import sse
from xgen_proxy.downstream.direct_writer import DirectWriter, Headers
from xgen_proxy.downstream.response_writer import ResponseWriter, send_error
from xgen_proxy.errors import BadGatewayError, ProxyError, UpstreamOversizedError, UpstreamProtocolError
from xgen_proxy.request.call import Call
from xgen_proxy.translation.chat import Failure, read_pieces
from xgen_proxy.translation.translation import Api, Translation

NAME = re.compile(r"[\w.:-]{1,64}", re.ASCII)  # what may stand in X-Dropped; clients write these names
MAX_NAMES = 20
LIMIT = 64 * 1024 * 1024  # bytes of events, as of a whole answer
SILENCE_S = 10.0  # how long a translated stream may write nothing before a ping is sent


class TranslatingWriter(ResponseWriter):
    """A response writer whose input is a chat completion and whose output is the other API's answer."""

    __slots__ = ("_api", "_call", "_failed", "_headers", "_originator", "_size", "_stream", "_translation", "_wrote_at")

    def __init__(
        self,
        send: Send,
        direct: DirectWriter | None,
        api: Api,
        translation: Translation,
        call: Call,
        originator: bytes = b"",
    ) -> None:
        super().__init__(send, direct)
        self._api = api
        self._call = call
        self._originator = originator
        self._translation = translation
        self._stream = translation.stream(call)
        self._failed = False
        self._size = 0  # bytes of events so far; bounds what the translation keeps in memory
        self._wrote_at = time.monotonic()
        names = [name for name in translation.dropped if NAME.fullmatch(name)][:MAX_NAMES]
        self._headers: list[tuple[bytes, bytes]] = [(b"request-id", call.id.encode())]  # where Anthropic's SDK looks
        if names:
            self._headers.append((b"x-dropped", ", ".join(names).encode()))

    async def whole(self, headers: Headers, data: bytes) -> None:
        """Raises UpstreamProtocolError before anything is sent."""
        try:
            answer = self._translation.whole(data, self._call)
        except BadGatewayError as error:
            raise UpstreamProtocolError(error.message) from None
        except orjson.JSONEncodeError:  # what was read may have 1024 levels, what is written 254
            raise UpstreamProtocolError("the answer is nested too deeply") from None
        await super().whole([*headers, *self._headers], answer)

    def waiting(self, headers: Headers) -> None:
        self._keep_alive([*headers, *self._headers], self._stream.ping)

    async def start(self, headers: Headers) -> None:
        await super().start([*headers, *self._headers])

    async def send(self, events: bytes) -> None:
        if not events or self._ended:
            return
        self._size += len(events)
        if self._size > LIMIT:
            raise UpstreamOversizedError(f"an answer of more than {LIMIT} bytes")
        translated = self._translated(events)  # before they are recorded: it may fail
        if self.sent_log is not None:
            self.sent_log.add(events)
        if translated:
            self._wrote_at = time.monotonic()
            await self._write(translated)
        elif time.monotonic() - self._wrote_at > SILENCE_S:
            self._wrote_at = time.monotonic()
            await self.alive()

    async def alive(self) -> None:
        """Sends a ping event: some clients' timeouts ignore comments."""
        if not self._ended:
            await self._write(self._stream.ping())

    async def fail(self, error: ProxyError, headers: Headers) -> None:
        wants_stream = self._call.features.stream and self._api.fails_in_stream(error, self._originator)
        if not self.status and not self._ended and wants_stream:
            await self.start(headers)
        if self.status:
            await self.end(error.event())
        elif not self._ended:
            await send_error(self._send, error, [*headers, *self._headers], self._api.error(error, self._call.id))
            self._ended = True

    async def end(self, data: bytes = b"") -> None:
        if self._ended:
            return
        events = self._translated(data)
        await self._finish(events if self._failed else events + self._stream.end())

    def pass_through(self, splitter: sse.EventSplitter) -> Callable[[bytes], bool] | None:
        """Every chunk is translated."""
        return None

    def _translated(self, events: bytes) -> bytes:
        out = []
        for piece in list(read_pieces(events)):  # if one cannot be read, none has been translated
            out.append(self._stream.feed(piece))
            if isinstance(piece, Failure):
                self._failed = True
                break
        return b"".join(out)
