from __future__ import annotations

import orjson
import pytest

from tests.support.requests import make_call
from xgen_proxy.errors import BadGatewayError, BadRequestError
from xgen_proxy.request.features import UsedAlias
from xgen_proxy.translation.chat import Text
from xgen_proxy.translation.responses.api import ResponsesApi


def test_a_request_and_its_answers() -> None:
    translation = ResponsesApi().translate({"model": "alias", "input": "Hi", "tools": [{"type": "web_search"}]})
    assert translation.body == {"model": "alias", "messages": [{"role": "user", "content": "Hi"}]}
    assert translation.dropped == ("web_search",)
    chat = {"choices": [{"message": {"content": "Hello"}, "finish_reason": "stop"}]}
    call = make_call(alias=UsedAlias("alias", "alias", "m"))
    response = orjson.loads(translation.whole(orjson.dumps(chat), call))
    assert (response["model"], response["output"][0]["content"][0]["text"]) == ("alias", "Hello")
    assert b'"model":"alias"' in translation.stream(call).feed(Text("Hello"))
    with pytest.raises(BadGatewayError):
        translation.whole(b"{}", make_call(model="m"))


def test_without_a_name_the_model_is_the_default() -> None:
    translation = ResponsesApi().translate({"input": "Hi"})
    assert b'"model":"m"' in translation.stream(make_call(model="m")).ping()


def test_an_error() -> None:
    status, body = ResponsesApi().error(BadRequestError("no", param="messages"), "id-1")
    assert (status, orjson.loads(body)["error"]["param"]) == (400, "input")
