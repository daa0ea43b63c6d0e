"""Errors in the words of this API: in OpenAI's envelope before a stream, and as a failed response in one."""

from __future__ import annotations

import re

import orjson

from xgen_proxy.errors import ProxyError
from xgen_proxy.request.features import Json
from xgen_proxy.translation.field_names import renamed

# A chat's fields that a later check may find wrong, and this API's.
FIELDS = {"messages": "input", "response_format": "text.format", "max_completion_tokens": "max_output_tokens"}
RETRY_S = 5  # as in the Retry-After of a full queue
TELLS_DELAY = re.compile(r"try again in\s*\d", re.IGNORECASE)  # what Codex looks for


def error_body(error: ProxyError) -> bytes:
    return orjson.dumps({"error": renamed(error.fields(), FIELDS)})


def failure(error: Json) -> Json:
    """The `error` of a failed response, for the error that broke the stream.

    Codex acts by the code: it drops history at context_length_exceeded, waits as long as the message of
    rate_limit_exceeded says, gives up at invalid_prompt, and sends the request again at server_error. It would give up
    at server_is_overloaded too, although another replica may serve the next attempt.
    """
    error = renamed(error, FIELDS)
    message, code, kind = str(error.get("message") or "the stream broke"), error.get("code"), error.get("type")
    if code == "context_length_exceeded":
        return {"code": code, "message": message}
    if kind == "rate_limit_error":
        delay = "" if TELLS_DELAY.search(message) else f"; try again in {RETRY_S}s"
        return {"code": "rate_limit_exceeded", "message": message + delay}
    if kind == "invalid_request_error":
        return {"code": "invalid_prompt", "message": message}
    return {"code": "server_error", "message": message}
