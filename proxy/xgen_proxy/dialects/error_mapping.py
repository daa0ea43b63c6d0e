"""Maps a backend's error to ours: the request is wrong, or this attempt failed and another backend may succeed.

Messages lose the server's file paths and echoes of the prompt.
"""

from __future__ import annotations

import re
from typing import Any

import orjson

from xgen_proxy import sse
from xgen_proxy.errors import (
    ProxyError,
    RequestRejectedError,
    UpstreamError,
    UpstreamOverloadedError,
    UpstreamProtocolError,
)

TOO_LONG = re.compile(
    r"maximum context length|exceeds? (?:the )?(?:available )?context|longer than the maximum model length"
)
PATHS = re.compile(r"(?:/[\w.@+-]+){2,}(?::\d+)?")
# pydantic's errors as text, with everything that was sent; this finds where and what of the first
INVALID = re.compile(r"""'loc': ([(\[].*?[)\]]|'.*?'), 'msg': (".*?"|'.*?'),?""")
# llama.cpp's servers answer 500 to some requests that are wrong
CLIENTS_500 = re.compile(
    r"validation errors?|can only concatenate str|Input should be|[Ff]ailed to parse|input is not supported"
    r"|type must be|Unknown reasoning format"
)
MAX_MESSAGE = 600
PROMPTS = ("messages", "prompt")  # vLLM says input_tokens, which is not a field of a request

TYPES = {401: "authentication_error", 403: "permission_error", 404: "not_found_error", 429: "rate_limit_error"}


def read_error(status: int, body: bytes) -> ProxyError | UpstreamError:
    """The error for a response whose status is not 200."""
    message, code, param = _fields(body)
    if status in (429, 503):
        return UpstreamOverloadedError(f"says {status}", message)
    if status in (401, 403):
        return UpstreamProtocolError(f"says {status}: the backend's api_key setting is wrong")
    if status in (404, 405):
        return UpstreamProtocolError(f"says {status}: it has no such model or route", message)
    if status >= 500 and not CLIENTS_500.search(message):
        return UpstreamProtocolError(f"says {status}", message)
    return _refused(status, message, code, param)


def stream_error(event: bytes) -> ProxyError | UpstreamError:
    """The error for an error event in a stream."""
    data = next(sse.payloads(event), b"") or event.partition(b":")[2].strip()
    message, code, param = _fields(data)
    status = code if isinstance(code, int) else 500
    if status in (429, 503):
        return UpstreamOverloadedError("says in the stream that it is busy", message)
    if status >= 500 and not CLIENTS_500.search(message):
        return UpstreamProtocolError("says in the stream that it failed", message)
    return _refused(status, message, None, param)


def _refused(status: int, message: str, code: Any, param: str | None) -> RequestRejectedError:
    if TOO_LONG.search(message):
        return RequestRejectedError(message, param=param if param in PROMPTS else None, code="context_length_exceeded")
    status = status if 400 <= status < 500 else 400
    return RequestRejectedError(
        message,
        status=status,
        type=TYPES.get(status),
        param=param,
        code=code if isinstance(code, str) else None,
    )


def _fields(body: bytes) -> tuple[str, Any, str | None]:
    """(message, code, param) from any shape that engines use: {error: {…}}, {error: "…"}, {detail: …}, plain text."""
    try:
        data = orjson.loads(body)
    except orjson.JSONDecodeError:
        return _clean(body[:MAX_MESSAGE].decode("utf-8", "replace")), None, None
    error = data.get("error", data) if isinstance(data, dict) else data
    if not isinstance(error, dict):
        return _clean(str(error)), None, None
    message = error.get("message") or error.get("detail") or "no reason given"
    param = error.get("param")
    return _clean(str(message)), error.get("code"), param.removeprefix("body.") if isinstance(param, str) else None


def _clean(message: str) -> str:
    invalid = INVALID.search(message)
    if invalid:
        where = ".".join(re.findall(r"[\w-]+", invalid[1])).removeprefix("body.")
        message = f"validation error: {where}: {invalid[2][1:-1]}"
    message = PATHS.sub("…", message).strip() or "no reason given"
    return message if len(message) <= MAX_MESSAGE else message[:MAX_MESSAGE] + " …"
