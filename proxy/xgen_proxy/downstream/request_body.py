"""Reads a request's body within its size limit."""

from __future__ import annotations

from collections.abc import Mapping

from starlette.types import Receive

from xgen_proxy.errors import ClientDisconnectedError, RequestTooLargeError


async def read_body(receive: Receive, headers: Mapping[bytes, bytes], limit: int) -> bytes:
    """Read the whole body, of at most `limit` bytes.

    Raises RequestTooLargeError, before reading if `Content-Length` exceeds the limit. Raises ClientDisconnectedError
    if the client disconnects, or if http_protocol.py closes the connection because the body arrives too slowly.
    """
    length = headers.get(b"content-length", b"")
    if length.isdigit() and int(length) > limit:
        raise RequestTooLargeError(f"the request body has {int(length)} bytes; the limit is {limit}")
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
