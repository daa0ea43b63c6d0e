"""CORS: which web pages may read our responses. https://developer.mozilla.org/docs/Web/HTTP/Guides/CORS"""

from __future__ import annotations

import re
from collections.abc import Iterable, Mapping, Sequence

ANY = "*"
EXPOSED = (
    b"X-Request-Id, Request-Id, X-Backend, X-Replica, X-Route-Reason, X-Model-Distance, X-Attempts, X-Overhead-Ms,"
    b" X-Dropped, X-Should-Retry, Retry-After"
)
MAX_AGE_S = 600  # how long a browser may keep the answer to a preflight
HEADER_NAMES = re.compile(rb"[A-Za-z0-9_, -]{1,2000}")

Header = tuple[bytes, bytes]


def cors_headers(request_headers: Iterable[Header], allowed: Sequence[str]) -> list[Header]:
    """The headers that any response to a request with these headers gets.

    `allowed`: origins such as https://chat.example.org, or `*` for all. Empty: CORS is off.
    """
    if not allowed:
        return []
    if ANY in allowed:
        return [(b"access-control-allow-origin", b"*"), (b"access-control-expose-headers", EXPOSED)]
    vary = (b"vary", b"Origin")
    origin = next((value for name, value in request_headers if name == b"origin"), b"")
    if origin.decode("latin-1") not in allowed:
        return [vary]
    return [(b"access-control-allow-origin", origin), (b"access-control-expose-headers", EXPOSED), vary]


def is_preflight(headers: Mapping[bytes, bytes]) -> bool:
    """`headers`: of an OPTIONS request."""
    return b"origin" in headers and b"access-control-request-method" in headers


def preflight_headers(headers: Mapping[bytes, bytes]) -> list[Header]:
    """What the answer to a preflight has beside cors_headers().

    It allows the headers that were asked for: `*` would leave out Authorization, and SDKs send many of their own.
    """
    asked = headers.get(b"access-control-request-headers", b"")
    names = asked if HEADER_NAMES.fullmatch(asked) else b"Authorization, Content-Type"
    return [
        (b"access-control-allow-methods", b"GET, POST, OPTIONS"),
        (b"access-control-allow-headers", names),
        (b"access-control-max-age", b"%d" % MAX_AGE_S),
    ]
