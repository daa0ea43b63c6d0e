"""Every failure a client or a backend can cause, drawn once.

    ProxyError                     has an HTTP status and OpenAI's error fields; what a client is shown
    ├── BadRequest            400  the request is wrong: the message says what to change
    │   ├── Unauthorized      401
    │   ├── NotFound          404  unknown path
    │   ├── ModelNotFound     404
    │   ├── MethodNotAllowed  405
    │   ├── ClientTooSlow     408  the request's body did not come
    │   ├── TooLarge          413
    │   ├── UnsupportedMedia  415
    │   └── HeadTooLarge      431
    ├── Refused               4xx  a backend's own verdict on the request, in OpenAI's shape
    ├── QueueFull             429  too many wait for a slot
    │   └── QueueTimeout      429  waited for a slot and none came free
    ├── Unavailable           503  no backend can answer now
    ├── GatewayFailed    502, 504  every candidate was tried and failed
    └── InternalError         500  a fault of the proxy's own; the log has the trace
    UpstreamFailed                 one attempt failed before the commit point: try the next candidate
    ├── ConnectFailed              no connection
    ├── Busy                       429 or 503: healthy but full, never counted against the breaker
    ├── Unable                     it turns out that this backend cannot do the request: nobody's fault
    ├── TimedOut                   no first byte, or silence, for longer than the limit
    └── Broken                     reset, bad HTTP, 5xx, error event, stream without finish_reason
    ClientLeft                     the client closed its connection: stop everything, answer nobody

Error body: https://platform.openai.com/docs/guides/error-codes
"""

from __future__ import annotations

from collections.abc import Iterable

import orjson


class ProxyError(Exception):
    """Shown to the client as ``{"error": {message, type, param, code}}`` with `status`.

    `retry`: what `x-should-retry` says; None leaves it to the client library's own rule.
    `retry_after`: seconds, for the `Retry-After` header.
    """

    status = 500
    type = "api_error"
    code: str | None = None
    retry: bool | None = None
    close = False  # end the connection: what is left of the body would be read as the next request

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
        """The same as one SSE event, for a stream that has already begun."""
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
    """`allowed`: methods as the Allow header lists them, which HTTP asks of a 405."""

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
    reason = "queue_full"  # the word in metrics


class QueueTimeoutError(QueueFullError):
    reason = "queue_timeout"


class ServiceUnavailableError(ProxyError):
    status = 503
    type = "service_unavailable_error"
    code = "no_backend_available"
    retry = False


class BadGatewayError(ProxyError):
    status = 502
    code = "all_backends_failed"
    retry = False


class InternalServerError(ProxyError):
    code = "internal_error"


class UpstreamError(Exception):
    """`outcome` is the word used for it in metrics, logs and messages. `why` is in our own words; `told` in the
    backend's, which may repeat the prompt: for the client, never for a log."""

    outcome = "failed"

    def __init__(self, why: str, told: str = "") -> None:
        super().__init__(f"{why}: {told}" if told else why)
        self.reason = why


class UpstreamConnectError(UpstreamError):
    outcome = "connect_failed"


class UpstreamOverloadedError(UpstreamError):
    outcome = "busy"


class UnsupportedByBackendError(UpstreamError):
    outcome = "unable"


class UpstreamTimeoutError(UpstreamError):
    outcome = "timed_out"


class UpstreamProtocolError(UpstreamError):
    outcome = "broken"


class ClientDisconnectedError(Exception):
    """The client is gone; whatever runs for it must stop."""


def all_failed(tried: Iterable[tuple[str, UpstreamError]]) -> ProxyError:
    """502, or 504 when time ran out, or 503 when all were busy or down; with what was tried, in words. `tried`: names
    of replicas, and what became of them."""
    tried = list(tried)
    told = "; ".join(f"{name}: {error}" for name, error in tried)
    message = f"every backend that could answer was tried and failed ({told})"
    if all(
        isinstance(error, UpstreamOverloadedError | UpstreamConnectError | UnsupportedByBackendError)
        for _, error in tried
    ):
        return ServiceUnavailableError(message, code="all_backends_failed", retry_after=2)
    return BadGatewayError(message, status=504 if isinstance(tried[-1][1], UpstreamTimeoutError) else 502)
