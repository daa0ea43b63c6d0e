"""Questions in the form of requests: canaries, for one token, which show whether a replica really generates; and which
media it reads, where no route of its engine tells.
"""

from __future__ import annotations

from typing import Any

from xgen_proxy.errors import UpstreamError, UpstreamProtocolError
from xgen_proxy.fleet.replica import Replica
from xgen_proxy.request.features import Json, Need

# A completion is the cheapest. An engine may lack the route, and one that was started for embeddings has only the last.
ROUTES: dict[str, dict[str, Any]] = {
    "/v1/completions": {"prompt": "1", "max_tokens": 1},
    "/v1/chat/completions": {"messages": [{"role": "user", "content": "1"}], "max_tokens": 1},
    "/v1/embeddings": {"input": "1"},
}
NOT_SERVED = frozenset({404, 405, 501})


async def ask_canary(replica: Replica, model: str) -> bool:
    """Returns whether the replica serves a route that a canary can be asked on; if not, only its health checks can
    tell. Any answer but a 5xx shows that the engine runs; 503 means that it is busy. Raises UpstreamError.
    """
    for path, body in ROUTES.items():
        limit = replica.settings.first_byte_timeout_s
        status, answer = await replica.ask(path, {**body, "model": model}, timeout_s=limit)
        if status in NOT_SERVED or (status < 500 and not answer.lstrip().startswith((b"{", b"["))):
            continue  # no such route, or a page of something in between
        if status >= 500 and status != 503:
            raise UpstreamProtocolError(f"{path} returned {status}")
        return True
    return False


async def ask_missing_media(replica: Replica, model: str, timeout_s: float) -> frozenset[Need]:
    """What it says it cannot read. What it does not say now, it says when it refuses a request."""

    async def post(path: str, body: Json) -> tuple[int, Any]:
        return await replica.post_json(path, body, timeout_s)

    try:
        return await replica.dialect.missing_media(model, post)
    except UpstreamError:
        return frozenset()
