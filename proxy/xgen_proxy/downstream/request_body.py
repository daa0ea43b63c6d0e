"""Reads a request's body within its size limit and within a budget for all bodies together."""

from __future__ import annotations

from collections.abc import Mapping
from types import TracebackType

from starlette.types import Receive

from xgen_proxy.errors import (
    ClientDisconnectedError,
    QueueFullError,
    RequestTooLargeError,
    UnsupportedMediaTypeError,
)

# Parsed, with its copies, a body takes five times its size, and the container has 1 GiB.
BUDGET_BYTES = 128 * 1024 * 1024


class BodyBudget:
    """Limits the bytes of all request bodies that the proxy holds: being read, queued or being answered.

    A body that is alone always fits, however large the setting `limits.body_bytes` allows it to be.
    """

    def __init__(self, limit: int = BUDGET_BYTES) -> None:
        self.limit = limit
        self.used = 0

    def hold(self) -> HeldBytes:
        return HeldBytes(self)


class HeldBytes:
    """The bytes of one request, given back when its `with` block is left."""

    __slots__ = ("_budget", "size")

    def __init__(self, budget: BodyBudget) -> None:
        self._budget = budget
        self.size = 0

    def check(self, size: int) -> int:
        """What the budget would be used to if this request had `size` bytes. Raises QueueFullError if it has no room.

        An announced body is checked but holds nothing, or announcing bodies would be enough to keep others out.
        """
        budget = self._budget
        used = budget.used + size - self.size
        if used > budget.limit and used != size:
            raise QueueFullError(
                f"the proxy holds {budget.used} bytes of other requests, and this one does not fit beside them; "
                "try again later",
                retry_after=1,
            )
        return used

    def grow_to(self, size: int) -> None:
        """Hold `size` bytes in all. Raises QueueFullError."""
        self._budget.used = self.check(size)
        self.size = size

    def __enter__(self) -> HeldBytes:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, traceback: TracebackType | None
    ) -> None:
        self._budget.used -= self.size
        self.size = 0


async def read_body(receive: Receive, headers: Mapping[bytes, bytes], limit: int, held: HeldBytes) -> bytes:
    """Read the whole body, of at most `limit` bytes.

    Raises, before reading if the headers tell: RequestTooLargeError, QueueFullError, and UnsupportedMediaTypeError if
    the body is compressed. Raises ClientDisconnectedError if the client disconnects, or if http_protocol.py closes the
    connection because the body arrives too slowly.
    """
    encoding = headers.get(b"content-encoding", b"identity")
    if encoding.lower() not in (b"", b"identity"):
        raise UnsupportedMediaTypeError(
            f"Content-Encoding: {encoding[:40].decode('latin-1')} is not supported; send the body uncompressed"
        )
    length = headers.get(b"content-length", b"")
    if length.isdigit():
        size = int(length)
        if size > limit:
            raise RequestTooLargeError(f"the request body has {size} bytes; the limit is {limit}")
        held.check(size)
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
        held.grow_to(size)
        parts.append(part)
        if not message.get("more_body", False):
            return parts[0] if len(parts) == 1 else b"".join(parts)
