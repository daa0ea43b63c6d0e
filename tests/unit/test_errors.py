from __future__ import annotations

import orjson
import pytest

from xgen_proxy.errors import (
    BadGatewayError,
    BadRequestError,
    MethodNotAllowedError,
    MissingCapabilityError,
    ProxyError,
    RequestTimeoutError,
    ServiceUnavailableError,
    UnsupportedByBackendError,
    UpstreamConnectError,
    UpstreamError,
    UpstreamLocalError,
    UpstreamOverloadedError,
    UpstreamOversizedError,
    UpstreamProtocolError,
    UpstreamServerError,
    UpstreamTimeoutError,
    all_failed,
    quoted,
)


def test_an_error_has_openais_fields() -> None:
    error = BadRequestError("n must be 1", param="n")
    fields = {"message": "n must be 1", "type": "invalid_request_error", "param": "n", "code": None}
    assert orjson.loads(error.body()) == {"error": fields}
    assert error.event() == b"data: " + error.body() + b"\n\n"
    assert dict(error.headers()) == {b"content-type": b"application/json", b"x-should-retry": b"false"}


def test_headers_say_when_to_retry_and_whether_the_connection_ends() -> None:
    assert dict(ServiceUnavailableError("down", retry_after=5).headers())[b"retry-after"] == b"5"
    assert dict(RequestTimeoutError("slow").headers())[b"connection"] == b"close"
    assert dict(MethodNotAllowedError("/a", "GET", "POST").headers())[b"allow"] == b"POST"
    assert b"x-should-retry" not in dict(ProxyError("x").headers())


def test_an_upstream_error_keeps_the_backends_words_out_of_its_reason() -> None:
    error = UpstreamProtocolError("says 500", "the prompt was secret")
    assert (error.reason, str(error)) == ("says 500", "says 500: the prompt was secret")


@pytest.mark.parametrize(
    ("errors", "status"),
    [
        ([UpstreamOverloadedError("full"), UpstreamConnectError("down"), UnsupportedByBackendError("no")], 503),
        ([UpstreamConnectError("down"), UpstreamTimeoutError("silent")], 504),
        ([UpstreamTimeoutError("silent"), UpstreamProtocolError("reset")], 502),
    ],
)
def test_all_failed(errors: list[UpstreamError], status: int) -> None:
    error = all_failed((f"r{number}", each) for number, each in enumerate(errors))
    assert (error.status, error.code) == (status, "all_backends_failed")
    assert all(f"r{number}: {each}" in error.message for number, each in enumerate(errors))
    assert isinstance(error, BadGatewayError) == (status != 503)
    assert (error.retry_after is not None) == (status == 503)


def test_what_a_client_sent_is_quoted_in_brief() -> None:
    assert quoted("a") == "'a'"
    assert quoted("x" * 10**6) == repr("x" * 60 + "…")
    assert (quoted(5), quoted(["a"]), quoted(None)) == ("5", "that", "that")


@pytest.mark.parametrize(
    ("errors", "status", "code"),
    [
        ([UpstreamOversizedError("more than 64 MiB")], 502, "response_too_large"),
        ([UpstreamTimeoutError("silent"), UpstreamOversizedError("more than 64 MiB")], 502, "response_too_large"),
        ([UpstreamLocalError("Too many open files")], 503, "proxy_out_of_resources"),
        ([UpstreamLocalError("Too many open files"), UpstreamConnectError("down")], 503, "all_backends_failed"),
        ([MissingCapabilityError("tools", "start it with")], 400, None),
        ([MissingCapabilityError("tools", "start it with"), UpstreamConnectError("down")], 503, "all_backends_failed"),
        ([UnsupportedByBackendError("says 404")], 503, "all_backends_failed"),
        ([UpstreamServerError("says 500")] * 2, 502, "all_backends_failed"),
    ],
)
def test_a_failure_of_everything_says_whose_fault_it_is(
    errors: list[UpstreamError], status: int, code: str | None
) -> None:
    error = all_failed((f"r{number}", each) for number, each in enumerate(errors))
    assert (error.status, error.code, error.retry) == (status, code, False)
    assert ("change it before you send it again" in error.message) == isinstance(errors[0], UpstreamServerError)


def test_a_thousand_failures_are_named_in_a_short_message() -> None:
    error = all_failed((f"r{number}", UpstreamProtocolError("reset")) for number in range(1000))
    assert len(error.message) < 1000
    assert "and 992 more" in error.message
