"""The client's side of a request: its body, with limits, and the moment it leaves."""

from __future__ import annotations

import asyncio
import re
import secrets
from collections.abc import Mapping
from types import TracebackType
from typing import Any

import orjson
from starlette.types import Message, Receive, Send

from xgen_proxy.config.settings import Limits
from xgen_proxy.errors import (
    BadRequestError,
    ClientDisconnectedError,
    ProxyError,
    RequestTooLargeError,
    UnsupportedMediaTypeError,
)

REQUEST_ID = re.compile(rb"[A-Za-z0-9._-]{1,128}")


def request_id(headers: Mapping[bytes, bytes]) -> str:
    """The client's own where it is harmless in logs and headers, else a new one."""
    given = headers.get(b"x-request-id", b"")
    return given.decode() if REQUEST_ID.fullmatch(given) else f"req-{secrets.token_hex(8)}"


async def read_body(receive: Receive, headers: Mapping[bytes, bytes], limits: Limits) -> bytes:
    """Raises RequestTooLargeError, and ClientDisconnectedError also where the body did not come in time (downstream/http_protocol.py)."""
    length = headers.get(b"content-length", b"")
    if length.isdigit() and int(length) > limits.body_bytes:
        raise RequestTooLargeError(f"the request body has {int(length)} bytes; the limit is {limits.body_bytes}")
    return await _read(receive, limits.body_bytes)


async def _read(receive: Receive, limit: int) -> bytes:
    parts: list[bytes] = []
    size = 0
    while True:
        message = await receive()
        if message["type"] == "http.disconnect":
            raise ClientDisconnectedError
        part = message.get("body", b"")
        size += len(part)
        if size > limit:
            raise RequestTooLargeError(f"the request body has more than {limit} bytes, which is the limit")
        parts.append(part)
        if not message.get("more_body", False):
            return parts[0] if len(parts) == 1 else b"".join(parts)


def read_json(raw: bytes, headers: Mapping[bytes, bytes]) -> dict[str, Any]:
    """Raises UnsupportedMediaTypeError, BadRequestError."""
    kind = headers.get(b"content-type", b"application/json").split(b";")[0].strip().lower()
    if kind != b"application/json":
        raise UnsupportedMediaTypeError("send the request as JSON, with the header Content-Type: application/json")
    if not raw:
        raise BadRequestError("the request body is empty; send a JSON object")
    try:
        body = orjson.loads(raw)
    except orjson.JSONDecodeError as error:
        raise BadRequestError(f"the request body is not valid JSON: {error}") from None
    if not isinstance(body, dict):
        raise BadRequestError(f"the request body must be a JSON object, not {type(body).__name__}")
    return body


WATCH_AFTER_S = 0.02  # most small answers are done by then, and a task to watch would cost them a tenth of their CPU


class CancelOnDisconnect:
    """Cancels the task in it when its client leaves, wherever it waits, and raises ClientDisconnectedError at the end.

    One task waits on receive(), from a moment after the start; polling is_disconnected() misses clients in some stacks:
    https://github.com/vllm-project/vllm/issues/10087
    """

    __slots__ = ("_gone", "_over", "_receive", "_start", "_task", "_watch")

    def __init__(self, receive: Receive) -> None:
        self._receive = receive
        self._gone = self._over = False
        self._watch: asyncio.Task[None] | None = None

    def __enter__(self) -> None:
        self._task = asyncio.current_task()
        self._start = asyncio.get_running_loop().call_later(WATCH_AFTER_S, self._begin)

    def _begin(self) -> None:
        self._watch = asyncio.create_task(self._wait())

    async def _wait(self) -> None:
        while (await self._receive())["type"] != "http.disconnect":
            pass
        if not self._over and self._task is not None:
            self._gone = True
            self._task.cancel()

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, traceback: TracebackType | None
    ) -> None:
        self._over = True
        self._start.cancel()
        if self._watch is not None:
            self._watch.cancel()
        task, self._task, self._watch = self._task, None, None  # each holds the other
        if self._gone and task is not None:
            task.uncancel()
            raise ClientDisconnectedError from None


async def send_error(send: Send, error: ProxyError, headers: list[tuple[bytes, bytes]]) -> None:
    body = error.body()
    start: Message = {
        "type": "http.response.start",
        "status": error.status,
        "headers": [*error.headers(), (b"content-length", str(len(body)).encode()), *headers],
    }
    await send(start)
    await send({"type": "http.response.body", "body": body})
