from __future__ import annotations

from typing import Any

import orjson
import pytest

from xgen_proxy.errors import BadGatewayError, BadRequestError, ProxyError, QueueTimeoutError, RequestRejectedError
from xgen_proxy.translation.responses.errors import error_body, failure


@pytest.mark.parametrize(
    ("param", "own"),
    [
        ("messages", "input"),
        ("max_completion_tokens", "max_output_tokens"),
        ("response_format", "text.format"),
        ("tools", "tools"),
        (None, None),
    ],
)
def test_before_a_stream_an_error_names_this_apis_field(param: str | None, own: str | None) -> None:
    body = orjson.loads(error_body(BadRequestError("no", param=param, code="c")))
    assert body == {"error": {"message": "no", "type": "invalid_request_error", "param": own, "code": "c"}}


@pytest.mark.parametrize(
    ("error", "code", "message"),
    [
        (RequestRejectedError("too long", code="context_length_exceeded"), "context_length_exceeded", "too long"),
        (QueueTimeoutError("no slot", retry_after=5), "rate_limit_exceeded", "no slot; try again in 5s"),
        (QueueTimeoutError("try again in 3 s"), "rate_limit_exceeded", "try again in 3 s"),
        (BadRequestError("bad schema"), "invalid_prompt", "bad schema"),
        (BadRequestError("messages is wrong", param="messages"), "invalid_prompt", "input is wrong"),
        (BadGatewayError("all failed"), "server_error", "all failed"),
    ],
)
def test_in_a_stream_the_code_says_what_to_do(error: ProxyError, code: str, message: str) -> None:
    assert failure(error.fields()) == {"code": code, "message": message}


@pytest.mark.parametrize("error", [{}, {"message": None, "code": 500, "type": 5}])
def test_an_engines_own_error_may_be_odd(error: dict[str, Any]) -> None:
    assert failure(error) == {"code": "server_error", "message": "the stream broke"}
