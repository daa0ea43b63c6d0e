from __future__ import annotations

import orjson
import pytest

from xgen_proxy import errors
from xgen_proxy.errors import BadRequestError, ProxyError, RequestRejectedError
from xgen_proxy.translation.messages.errors import error_event, error_response


@pytest.mark.parametrize(
    ("error", "status", "kind"),
    [
        (errors.BadRequestError("x"), 400, "invalid_request_error"),
        (errors.AuthenticationError("x"), 401, "authentication_error"),
        (errors.RequestRejectedError("x", status=403, type="permission_error"), 403, "permission_error"),
        (errors.ModelNotFoundError("x"), 404, "not_found_error"),
        (errors.MethodNotAllowedError("/v1/messages", "GET", "POST"), 405, "invalid_request_error"),
        (errors.RequestTimeoutError("x"), 408, "invalid_request_error"),
        (errors.RequestTooLargeError("x"), 413, "request_too_large"),
        (errors.QueueFullError("x"), 429, "rate_limit_error"),
        (errors.InternalServerError("x"), 500, "api_error"),
        (errors.BadGatewayError("x"), 502, "api_error"),
        (errors.BadGatewayError("x", status=504), 504, "timeout_error"),
        (errors.ServiceUnavailableError("x"), 529, "overloaded_error"),
        (errors.OutOfResourcesError("x"), 529, "overloaded_error"),
        (errors.ServiceUnavailableError("x", code="all_backends_failed", retry_after=2), 529, "overloaded_error"),
        (errors.ServiceUnavailableError("x", code="all_backends_failed"), 500, "api_error"),  # a backend's key is wrong
    ],
)
def test_responses(error: ProxyError, status: int, kind: str) -> None:
    found, body = error_response(error, "req-1")
    assert found == status
    assert orjson.loads(body) == {
        "type": "error",
        "error": {"type": kind, "message": error.message},
        "request_id": "req-1",
    }


@pytest.mark.parametrize(
    ("fields", "kind"),
    [
        ({"message": "x", "type": "service_unavailable_error"}, "overloaded_error"),
        ({"message": "x", "type": "rate_limit_error"}, "rate_limit_error"),
        ({"message": "x", "type": "InternalServerError"}, "api_error"),
        ({"message": "x", "type": None}, "api_error"),
        ({"message": "x", "type": ["x"]}, "api_error"),
        ({"message": "x"}, "api_error"),
    ],
)
def test_events(fields: dict[str, object], kind: str) -> None:
    head, data, *rest = error_event(fields, "req-1").split(b"\n")
    assert (head, rest) == (b"event: error", [b"", b""])
    found = orjson.loads(data.removeprefix(b"data: "))
    assert (found["type"], found["error"]["type"], found["request_id"]) == ("error", kind, "req-1")


@pytest.mark.parametrize(
    ("message", "numbers"),
    [
        ("vllm: prompt of about 3000 tokens exceeds its context of 2048", "3000 tokens > 2048 maximum"),
        ("request (18031 tokens) exceeds the available context size (2048 tokens)", "18031 tokens > 2048 maximum"),
        (
            "This model's maximum context length is 2048 tokens. However, you requested 18035 tokens (18031 in the",
            "18031 tokens > 2048 maximum",
        ),
    ],
)
def test_a_long_prompt_is_told_in_the_words_that_clients_read(message: str, numbers: str) -> None:
    _, body = error_response(BadRequestError(message, code="context_length_exceeded"), "req-1")
    assert orjson.loads(body)["error"]["message"] == f"prompt is too long: {numbers} ({message})"


AT_LEAST = (
    "This model's maximum context length is 2048 tokens. However, your prompt contains at least 2049 input tokens."
)


@pytest.mark.parametrize("message", ["too much", AT_LEAST])
def test_a_long_prompt_without_numbers_that_are_true(message: str) -> None:
    """vLLM counts one token more than fits. Claude Code would drop so little that its next request fails, too."""
    _, body = error_response(RequestRejectedError(message, code="context_length_exceeded"), "req-1")
    assert orjson.loads(body)["error"]["message"] == f"prompt is too long: {message}"


def test_fields_have_the_names_of_this_api() -> None:
    _, body = error_response(BadRequestError("stop has 20 entries; the limit is 16", param="stop"), "req-1")
    assert orjson.loads(body)["error"]["message"] == "stop_sequences has 20 entries; the limit is 16"
