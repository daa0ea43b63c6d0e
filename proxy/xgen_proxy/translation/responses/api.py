"""/v1/responses as an API that is translated to chat completions and back."""

from __future__ import annotations

from xgen_proxy.errors import ProxyError, QueueFullError
from xgen_proxy.request.call import Call
from xgen_proxy.request.features import Json
from xgen_proxy.translation.chat import read_answer
from xgen_proxy.translation.responses.errors import error_body
from xgen_proxy.translation.responses.request import read_request
from xgen_proxy.translation.responses.response import ResponseHead, repeated, whole_response
from xgen_proxy.translation.responses.stream import ResponseStream


class ResponsesApi:
    """Implements Api."""

    def translate(self, body: Json) -> ResponsesTranslation:
        return ResponsesTranslation(body)

    def error(self, error: ProxyError, request_id: str) -> tuple[int, bytes]:
        return error.status, error_body(error)

    def fails_in_stream(self, error: ProxyError, originator: bytes) -> bool:
        """Codex drops history at this code, but reads a 400 as a request that can never succeed; and it waits where a
        stream says so, but gives up at a 429, after which OpenAI's SDKs wait."""
        waits = isinstance(error, QueueFullError) and originator.startswith(b"codex")
        return waits or error.code == "context_length_exceeded"


class ResponsesTranslation:
    """Implements Translation. Raises BadRequestError."""

    def __init__(self, sent: Json) -> None:
        request = read_request(sent)
        self.body = request.body
        self.dropped = request.dropped
        self._repeated = repeated(sent)  # rather than all that was sent, which may be 10 MB
        self._tools = request.tools

    def whole(self, data: bytes, call: Call) -> bytes:
        return whole_response(ResponseHead(self._repeated, call.asked), self._tools, read_answer(data))

    def stream(self, call: Call) -> ResponseStream:
        return ResponseStream(ResponseHead(self._repeated, call.asked), self._tools)
