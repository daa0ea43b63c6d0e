"""Errors in Anthropic's shape: https://docs.claude.com/en/api/errors"""

from __future__ import annotations

import re

import orjson

from xgen_proxy import sse
from xgen_proxy.errors import ProxyError
from xgen_proxy.request.features import Json
from xgen_proxy.translation.field_names import renamed

OVERLOADED = 529
TYPES = {
    401: "authentication_error",
    403: "permission_error",
    404: "not_found_error",
    413: "request_too_large",
    429: "rate_limit_error",
    503: "overloaded_error",
    504: "timeout_error",
}
STREAM_TYPES = {"service_unavailable_error": "overloaded_error"}  # OpenAI's and our names
KNOWN = frozenset({"invalid_request_error", "api_error", *TYPES.values()})
# A chat's fields that a later check may find wrong, and this API's.
FIELDS = {"stop": "stop_sequences", "response_format": "output_config.format"}
# Claude Code compacts its history where it reads the first words of this message, and by how much by its numbers.
TOO_LONG = "prompt is too long"
NUMBERS = (
    re.compile(r"prompt of about (?P<prompt>\d{1,9}) tokens exceeds its context of (?P<limit>\d{1,9})"),
    re.compile(r"request \((?P<prompt>\d{1,9}) tokens\) exceeds the available context size \((?P<limit>\d{1,9})"),
    # Not vLLM's "at least 65537": it counts no further, and Claude Code would drop one turn where it must drop many.
    re.compile(
        r"maximum context length is (?P<limit>\d{1,9}) tokens.{1,60}?requested \d{1,9} tokens \((?P<prompt>\d{1,9}) in"
    ),
)


def error_response(error: ProxyError, request_id: str) -> tuple[int, bytes]:
    """The status and the body. Claude Code sends a request again after overloaded_error, whatever x-should-retry says,
    so what only an operator can mend, such as a backend's API key, is no overload."""
    permanent = error.status == 503 and error.code == "all_backends_failed" and error.retry_after is None
    status = 500 if permanent else error.status
    kind = TYPES.get(status) or ("invalid_request_error" if status < 500 else "api_error")
    return OVERLOADED if status == 503 else status, _envelope(kind, _message(error.fields()), request_id)


def error_event(fields: Json, request_id: str) -> bytes:
    """The last event of a broken stream. `fields` are those of OpenAI's error object."""
    given = str(fields.get("type"))
    kind = STREAM_TYPES.get(given, given)
    data = _envelope(kind if kind in KNOWN else "api_error", _message(fields), request_id)
    return sse.named_event("error", data)


def _envelope(kind: str, message: str, request_id: str) -> bytes:
    return orjson.dumps({"type": "error", "error": {"type": kind, "message": message}, "request_id": request_id})


def _message(fields: Json) -> str:
    fields = renamed(fields, FIELDS)
    message = str(fields.get("message") or "no reason given")
    if fields.get("code") == "context_length_exceeded":
        return _too_long(message)
    return message


def _too_long(message: str) -> str:
    for pattern in NUMBERS:
        if found := pattern.search(message):
            return f"{TOO_LONG}: {found['prompt']} tokens > {found['limit']} maximum ({message})"
    return f"{TOO_LONG}: {message}"
