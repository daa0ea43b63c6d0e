"""/generate and /generate/stream: a minimal completion API, `prompt` in and `text` out, on top of /v1/completions."""

from __future__ import annotations

import time
from typing import Any, Literal

import orjson
from pydantic import BaseModel, Field, ValidationError
from starlette.types import Message, Receive, Send

from xgen_proxy import sse
from xgen_proxy.api.inference import Incoming, InferenceEndpoint
from xgen_proxy.downstream.request_body import HeldBytes, read_body
from xgen_proxy.downstream.response_writer import ResponseWriter
from xgen_proxy.errors import BadGatewayError, BadRequestError
from xgen_proxy.gateway import Gateway
from xgen_proxy.request.call import Origin
from xgen_proxy.request.json_body import read_json

MALFORMED = (ValueError, LookupError, TypeError, AttributeError)  # what reading a malformed answer raises


class GenerateRequest(BaseModel):
    prompt: str = Field(min_length=1)
    model: str | None = None
    max_tokens: int = Field(1024, ge=1)
    temperature: float | None = Field(None, ge=0, le=2)
    top_p: float | None = Field(None, gt=0, le=1)
    backend: str = "auto"
    stream: bool = False
    urgency: Literal["high", "normal", "low"] | None = None
    task_type: str | None = None


def parse_generate(body: dict[str, Any]) -> GenerateRequest:
    """Raises BadRequestError."""
    try:
        return GenerateRequest.model_validate(body)
    except ValidationError as error:
        first = error.errors(include_url=False, include_input=False)[0]
        field = ".".join(str(part) for part in first["loc"])
        raise BadRequestError(f"{field}: {first['msg']}", param=field) from None


class GenerateEndpoint(InferenceEndpoint):
    """`always_streams` is true for /generate/stream; /generate streams if the request says so."""

    def __init__(self, gateway: Gateway, *, always_streams: bool) -> None:
        super().__init__(gateway, "completions")
        self.always_streams = always_streams

    async def read(self, origin: Origin, receive: Receive, held: HeldBytes) -> Incoming:
        limits = self.gateway.settings.limits
        raw = await read_body(receive, origin.headers, limits.body_bytes, held)
        request = parse_generate(read_json(raw, origin.headers, limits))
        body = request.model_dump(exclude_none=True) | {"stream": self.always_streams or request.stream}
        converter = TokenStream if body["stream"] else WholeText
        return Incoming(
            self.parse(origin, orjson.dumps(body), body), lambda send, direct: ResponseWriter(converter(send), None)
        )


class WholeText:
    """An ASGI send that turns a completion into {text, backend_used, generation_time (s), tokens_per_second}."""

    def __init__(self, send: Send) -> None:
        self._send = send
        self._began = time.perf_counter()
        self._start: Message = {}

    async def __call__(self, message: Message) -> None:
        if message["type"] == "http.response.start":
            self._start = message
            return
        body = message["body"]
        if self._start["status"] == 200:
            body = self._convert(body)
            headers = [(name, value) for name, value in self._start["headers"] if name != b"content-length"]
            self._start["headers"] = [*headers, (b"content-length", b"%d" % len(body))]
        await self._send(self._start)
        await self._send({"type": "http.response.body", "body": body})

    def _convert(self, body: bytes) -> bytes:
        try:
            return orjson.dumps(self._answer(orjson.loads(body)))
        except MALFORMED:
            error = BadGatewayError("the backend's answer is not a completion", code="bad_answer")
            self._start["status"] = error.status
            return error.body()

    def _answer(self, completion: dict[str, Any]) -> dict[str, Any]:
        """The speed is null if the backend reports no usage. Raises LookupError, TypeError or AttributeError."""
        seconds = time.perf_counter() - self._began
        usage = completion.get("usage")
        return {
            "text": completion["choices"][0]["text"],
            "backend_used": dict(self._start["headers"])[b"x-backend"].decode(),
            "generation_time": round(seconds, 4),
            "tokens_per_second": round(usage["completion_tokens"] / seconds, 2) if usage else None,
        }


class TokenStream:
    """An ASGI send that turns completion chunks into `{"token": …}` events and a closing `{"done": true}`."""

    def __init__(self, send: Send) -> None:
        self._send = send
        self._is_stream = False

    async def __call__(self, message: Message) -> None:
        if message["type"] == "http.response.start":
            self._is_stream = message["status"] == 200
        elif self._is_stream:
            message = {**message, "body": b"".join(self._event(data) for data in sse.payloads(message["body"]))}
        await self._send(message)

    def _event(self, data: bytes) -> bytes:
        if data == b"[DONE]":
            return b'data: {"done": true}\n\n'
        try:
            chunk = orjson.loads(data)
            if "error" in chunk:
                return b"data: " + data + b"\n\n"
            tokens = [choice["text"] for choice in chunk["choices"] if choice["text"]]
        except MALFORMED:
            return BadGatewayError("the backend's answer is not a completion", code="bad_answer").event()
        return b"".join(b"data: " + orjson.dumps({"token": token}) + b"\n\n" for token in tokens)
