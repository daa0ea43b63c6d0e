"""Reads a request's body within its size limit and parses it as JSON."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import orjson
from starlette.types import Receive

from xgen_proxy.errors import (
    BadRequestError,
    ClientDisconnectedError,
    RequestTooLargeError,
    UnsupportedMediaTypeError,
)


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


def read_json(raw: bytes, headers: Mapping[bytes, bytes]) -> dict[str, Any]:
    """Parse the body as a JSON object. Raises UnsupportedMediaTypeError, BadRequestError."""
    media_type = headers.get(b"content-type", b"application/json").split(b";")[0].strip().lower()
    if media_type != b"application/json":
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
