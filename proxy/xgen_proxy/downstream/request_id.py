"""The ID of a request, as it appears in logs, in `X-Request-Id` and at the backend. It is no secret."""

from __future__ import annotations

import random
import re
from collections.abc import Mapping

REQUEST_ID = re.compile(rb"[A-Za-z0-9._-]{1,128}")


def request_id(headers: Mapping[bytes, bytes]) -> str:
    """The client's own `X-Request-Id` if it is safe in logs and headers, else a new ID."""
    given = headers.get(b"x-request-id", b"")
    return given.decode() if REQUEST_ID.fullmatch(given) else f"req-{random.getrandbits(64):016x}"
