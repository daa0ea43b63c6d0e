"""What a backend's error means: the client's mistake, in OpenAI's shape, or a failure that another backend may mend.

No server file paths and no echo of the prompt come through.
"""

from __future__ import annotations

import re
from typing import Any

import orjson

from xgen_proxy import sse
from xgen_proxy.dialects.dialect import BackendRequest, Dialect, Post
from xgen_proxy.dialects.request_rules import prepared
from xgen_proxy.errors import (
    ProxyError,
    RequestRejectedError,
    UpstreamError,
    UpstreamOverloadedError,
    UpstreamProtocolError,
)

Verdict = ProxyError | UpstreamError

TOO_LONG = re.compile(
    r"maximum context length|exceeds? (?:the )?(?:available )?context|longer than the maximum model length"
)
PATHS = re.compile(r"(?:/[\w.@+-]+){2,}(?::\d+)?")
# pydantic's errors, printed, with all that was sent: of the first, where and what
INVALID = re.compile(r"""'loc': ([(\[].*?[)\]]|'.*?'), 'msg': (".*?"|'.*?'),?""")
# llama.cpp's servers answer 500 to some of the client's mistakes
CLIENTS_500 = re.compile(
    r"validation errors?|can only concatenate str|Input should be|[Ff]ailed to parse|input is not supported"
    r"|type must be|Unknown reasoning format"
)
MAX_MESSAGE = 600
PROMPTS = ("messages", "prompt")  # vLLM says input_tokens, which is no field of a request

TYPES = {401: "authentication_error", 403: "permission_error", 404: "not_found_error", 429: "rate_limit_error"}


def read_error(status: int, body: bytes) -> Verdict:
    """The verdict on an answer that is not 200."""
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


def stream_error(event: bytes) -> Verdict:
    """The verdict on an error event."""
    data = next(sse.payloads(event), b"") or event.partition(b":")[2].strip()
    message, code, param = _fields(data)
    status = code if isinstance(code, int) else 500
    if status in (429, 503):
        return UpstreamOverloadedError("says in the stream that it is busy", message)
    if status >= 500 and not CLIENTS_500.search(message):
        return UpstreamProtocolError("says in the stream that it failed", message)
    return _refused(status, message, None, param)


async def explain_empty(dialect: Dialect, request: BackendRequest, post: Post) -> Verdict:
    """The verdict on a stream without a single event: llama-cpp-python's way to say that the prompt is too long. Asked
    for a whole answer it says so in words."""
    if dialect.name == "llama-cpp-python":
        status, answer = await post(request.path, {**prepared(dialect, request), "stream": False, "max_tokens": 1})
        if status != 200:
            return read_error(status, orjson.dumps(answer))
    return UpstreamProtocolError("the stream was empty")


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
    """(message, code, param) of any shape that was seen: {error: {…}}, {error: "…"}, {detail: …}, plain text."""
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
