"""Every failure that a client or a backend can cause.

    ProxyError                          sent to the client: an HTTP status and OpenAI's error fields
    ├── BadRequestError            400  the request is wrong; the message says what to change
    │   ├── AuthenticationError    401
    │   ├── NotFoundError          404  unknown path
    │   ├── ModelNotFoundError     404
    │   ├── MethodNotAllowedError  405
    │   ├── RequestTimeoutError    408  the request body did not arrive in time
    │   ├── RequestTooLargeError   413
    │   ├── UnsupportedMediaTypeError  415
    │   └── HeadersTooLargeError   431
    ├── RequestRejectedError       4xx  a backend rejected the request, in OpenAI's shape
    ├── QueueFullError             429  too many requests wait for a slot
    │   └── QueueTimeoutError      429  no slot came free in time
    ├── ServiceUnavailableError    503  no backend can answer now
    │   └── TooManyConnectionsError 503 the proxy serves as many connections as it can
    │   └── OutOfResourcesError    503  the proxy has no descriptors, ports or memory left
    ├── BadGatewayError       502, 504  every candidate was tried and failed
    │   └── ResponseTooLargeError  502  the answer is larger than the proxy takes
    └── InternalServerError        500  a bug in the proxy; the log has the traceback
    UpstreamError                       one attempt failed before the commit point: try the next candidate
    ├── UpstreamConnectError            no connection
    ├── UpstreamLocalError              no connection, because of a limit of this process
    ├── UpstreamOverloadedError         429 or 503: healthy but full
    ├── UnsupportedByBackendError       this backend cannot serve the request
    │   └── MissingCapabilityError      its engine says that it was started without something
    ├── DifferentAnswerError            does not go on with a broken stream as it began: another may
    ├── UpstreamTimeoutError            no first byte, or silence, for longer than the limit
    ├── UpstreamOversizedError          a response larger than our limit: no candidate is tried after it
    └── UpstreamProtocolError           reset, invalid HTTP, error event, stream without finish_reason
        └── UpstreamServerError         a well-formed answer that says that the engine failed: a 5xx
    StreamInterruptedError              a stream broke after the commit point: resume it elsewhere
    ClientDisconnectedError             the client closed its connection: stop all work for it

Error body: https://platform.openai.com/docs/guides/error-codes
"""

from __future__ import annotations

from collections.abc import Iterable
from copy import copy
from typing import Any, Literal

import orjson

# Whose fault a failed attempt is. Only "replica" counts on a circuit breaker.
#   replica  it hung up, was silent, or spoke no HTTP
#   unclear  its engine answered that it failed: the replica may be ill, or the request may make any replica fail
#   request  any replica would fail alike
#   engine   it runs without something that the request needs: start-up flags, a model, our key
#   busy     it is healthy and full
#   proxy    we ran out of something
#   nobody   the answer never paused, but took longer than it may: it is long, or its client reads slowly
Blame = Literal["replica", "unclear", "request", "engine", "busy", "proxy", "nobody"]
MAX_NAMED = 8  # failed attempts that an error message lists
QUOTED_CHARACTERS = 60


def quoted(value: Any) -> str:
    """A value that the client sent, cut before it is written into a message."""
    if isinstance(value, str):
        return repr(value[:QUOTED_CHARACTERS] + ("…" if len(value) > QUOTED_CHARACTERS else ""))
    return repr(value) if isinstance(value, int | float) else "that"


class ProxyError(Exception):
    """Sent to the client as ``{"error": {message, type, param, code}}`` with `status`.

    `retry` is the value of `x-should-retry`; None omits the header and leaves the choice to the client library.
    `retry_after` is in seconds. `close` ends the connection, because the rest of the body would be read as the next
    request.
    """

    status = 500
    type = "api_error"
    code: str | None = None
    retry: bool | None = None
    close = False

    def __init__(
        self,
        message: str,
        *,
        status: int | None = None,
        type: str | None = None,
        param: str | None = None,
        code: str | None = None,
        retry_after: int | None = None,
    ) -> None:
        super().__init__(message)
        self.message = message
        self.status = status or self.status
        self.type = type or self.type
        self.param = param
        self.code = code or self.code
        self.retry_after = retry_after

    def fields(self) -> dict[str, object]:
        return {"message": self.message, "type": self.type, "param": self.param, "code": self.code}

    def body(self) -> bytes:
        return orjson.dumps({"error": self.fields()})

    def event(self) -> bytes:
        """The error as one SSE event, for a stream that has already begun."""
        return b"data: " + self.body() + b"\n\n"

    def headers(self) -> list[tuple[bytes, bytes]]:
        headers = [(b"content-type", b"application/json")]
        if self.retry is not None:
            headers.append((b"x-should-retry", b"true" if self.retry else b"false"))
        if self.retry_after is not None:
            headers.append((b"retry-after", str(self.retry_after).encode()))
        if self.close:
            headers.append((b"connection", b"close"))
        return headers


class BadRequestError(ProxyError):
    status = 400
    type = "invalid_request_error"
    retry = False


class AuthenticationError(BadRequestError):
    status = 401
    type = "authentication_error"
    code = "invalid_api_key"


class NotFoundError(BadRequestError):
    status = 404
    type = "not_found_error"


class ModelNotFoundError(BadRequestError):
    status = 404
    code = "model_not_found"


class MethodNotAllowedError(BadRequestError):
    """`allowed`: the methods as the Allow header lists them; HTTP requires that header on a 405."""

    status = 405
    code = "method_not_allowed"

    def __init__(self, path: str, method: str, allowed: str) -> None:
        super().__init__(f"use {allowed} for {path}, not {method}")
        self.allowed = allowed

    def headers(self) -> list[tuple[bytes, bytes]]:
        return [*super().headers(), (b"allow", self.allowed.encode())]


class RequestTimeoutError(BadRequestError):
    status = 408
    code = "request_timeout"
    close = True


class RequestTooLargeError(BadRequestError):
    status = 413
    code = "request_too_large"
    close = True


class UnsupportedMediaTypeError(BadRequestError):
    status = 415
    code = "unsupported_media_type"

    def headers(self) -> list[tuple[bytes, bytes]]:
        """With the encoding that a body may have: https://www.rfc-editor.org/rfc/rfc9110#section-15.5.16"""
        return [*super().headers(), (b"accept-encoding", b"identity")]


class HeadersTooLargeError(BadRequestError):
    status = 431
    code = "headers_too_large"
    close = True


class RequestRejectedError(ProxyError):
    status = 400
    type = "invalid_request_error"
    retry = False


class QueueFullError(ProxyError):
    status = 429
    type = "rate_limit_error"
    code = "queue_full"
    reason = "queue_full"  # label value in metrics


class QueueTimeoutError(QueueFullError):
    reason = "queue_timeout"


class ServiceUnavailableError(ProxyError):
    status = 503
    type = "service_unavailable_error"
    code = "no_backend_available"
    retry = False


class ModelTooFarError(ServiceUnavailableError):
    code = "model_too_far"


class TooManyConnectionsError(ServiceUnavailableError):
    code = "too_many_connections"
    retry = True
    close = True


class OutOfResourcesError(ServiceUnavailableError):
    code = "proxy_out_of_resources"


class BadGatewayError(ProxyError):
    status = 502
    code = "all_backends_failed"
    retry = False


class ResponseTooLargeError(BadGatewayError):
    code = "response_too_large"


class InternalServerError(ProxyError):
    code = "internal_error"


class UpstreamError(Exception):
    """One attempt failed.

    `outcome` is the label value in metrics and logs. `reason` is ours and safe to log. `backend_message` may echo the
    prompt: send it to the client, never log it.
    """

    outcome = "failed"
    blame: Blame = "replica"

    def __init__(self, reason: str, backend_message: str = "") -> None:
        super().__init__(f"{reason}: {backend_message}" if backend_message else reason)
        self.reason = reason


class UpstreamConnectError(UpstreamError):
    outcome = "connect_failed"


class UpstreamLocalError(UpstreamError):
    outcome = "out_of_resources"
    blame = "proxy"


class UpstreamOverloadedError(UpstreamError):
    outcome = "busy"
    blame = "busy"


class UnsupportedByBackendError(UpstreamError):
    outcome = "unable"
    blame = "engine"


class MissingCapabilityError(UnsupportedByBackendError):
    """`capability`: what the engine lacks. `remedy`: what an operator should do."""

    def __init__(self, capability: str, remedy: str) -> None:
        super().__init__(f"runs without {capability}: {remedy}")
        self.capability = capability
        self.remedy = remedy


class PromptTooLongError(UpstreamError):
    """The prompt exceeds the context here. `rejection`: what the client gets if it exceeds every other, too."""

    outcome = "too_long"
    blame = "engine"

    def __init__(self, rejection: RequestRejectedError) -> None:
        super().__init__("the prompt exceeds its context", rejection.message)
        self.rejection = rejection


class DifferentAnswerError(UpstreamError):
    outcome = "different"
    blame = "engine"


class UpstreamTimeoutError(UpstreamError):
    outcome = "timed_out"


class UpstreamTooLongError(UpstreamTimeoutError):
    blame = "nobody"


class UpstreamOversizedError(UpstreamError):
    outcome = "too_large"
    blame = "request"


class UpstreamProtocolError(UpstreamError):
    outcome = "broken"


class UpstreamServerError(UpstreamProtocolError):
    blame = "unclear"


class StreamInterruptedError(Exception):
    """`error` is what broke the stream. The bytes sent so far stay sent."""

    def __init__(self, error: UpstreamError) -> None:
        super().__init__(str(error))
        self.error = error


class ClientDisconnectedError(Exception):
    """The client closed its connection; all work for it must stop."""


def all_failed(
    failures: Iterable[tuple[str, UpstreamError]], model: str = "", *, may_fit_elsewhere: bool = False
) -> ProxyError:
    """The error for a request for `model` whose every candidate failed, given (replica name, error) in order.

    By blame: the request's or the proxy's own fault says so; 400 if no engine has what the request needs, or none a
    context for it; 503 if all were overloaded, down or unsuitable; 504 if the last one timed out; else 502.
    `may_fit_elsewhere`: a backend has a larger context than those that found the prompt too long.
    """
    failures = list(failures)
    errors = [error for _, error in failures]
    too_long = [error.rejection for error in errors if isinstance(error, PromptTooLongError)]
    if too_long and not may_fit_elsewhere:
        return copy(too_long[-1])  # raised while its PromptTooLongError is handled, it would refer to that: a circle
    tried = "; ".join(f"{name}: {error}" for name, error in failures[:MAX_NAMED])
    if len(failures) > MAX_NAMED:
        tried += f"; and {len(failures) - MAX_NAMED} more"
    last = errors[-1]
    if last.blame == "request":
        return ResponseTooLargeError(f"the answer is too large ({last}); ask for less in one request")
    if all(error.blame == "proxy" for error in errors):
        return OutOfResourcesError(f"the proxy itself ran out of resources ({tried}); try again later", retry_after=2)
    if all(isinstance(error, MissingCapabilityError) for error in errors):
        return BadRequestError(f"no backend can do this request with the model {quoted(model)} ({tried})")
    message = f"every backend that could answer was tried and failed ({tried})"
    blames = {error.blame for error in errors}
    if all(error.blame in ("busy", "engine", "proxy") or isinstance(error, UpstreamConnectError) for error in errors):
        return ServiceUnavailableError(
            message, code="all_backends_failed", retry_after=None if blames == {"engine"} and not too_long else 2
        )
    if blames == {"unclear"}:
        message += "; it may be this request that makes them fail: change it before you send it again"
    return BadGatewayError(message, status=504 if isinstance(last, UpstreamTimeoutError) else 502)
