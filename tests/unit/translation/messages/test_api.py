"""What the endpoint asks of the API."""

from __future__ import annotations

import orjson
import pytest

from tests.support.requests import make_call
from xgen_proxy.errors import BadRequestError, ServiceUnavailableError
from xgen_proxy.request.features import UsedAlias
from xgen_proxy.translation.chat import Text
from xgen_proxy.translation.messages.api import MessagesApi

BODY = {"model": "claude-x", "max_tokens": 5, "messages": [{"role": "user", "content": "Hi"}]}
WHOLE = {
    "choices": [{"message": {"role": "assistant", "content": "hello"}, "finish_reason": "stop"}],
    "usage": {"prompt_tokens": 3, "completion_tokens": 1},
}


def test_an_answer_names_the_model_as_the_client_did() -> None:
    """An alias may stand for another."""
    translation = MessagesApi(lambda: True).translate(BODY)
    call = make_call(alias=UsedAlias("claude-x", "claude-*", "m"))
    whole = orjson.loads(translation.whole(orjson.dumps(WHOLE), call))
    assert (whole["id"], whole["model"], whole["content"]) == (
        "msg_id-1",
        "claude-x",
        [{"type": "text", "text": "hello"}],
    )
    assert b'"model":"claude-x"' in translation.stream(call).feed(Text("Hi"))


def test_without_one_it_is_the_default() -> None:
    translation = MessagesApi(lambda: True).translate({**BODY, "model": None})
    assert orjson.loads(translation.whole(orjson.dumps(WHOLE), make_call(model="m")))["model"] == "m"


def test_the_setting_is_read_for_each_request() -> None:
    settings = [True]
    api = MessagesApi(lambda: settings[0])
    body = {**BODY, "system": [{"type": "text", "text": "x-anthropic-billing-header: cch=1;"}]}
    assert len(api.translate(body).body["messages"]) == 1
    settings[0] = False
    assert len(api.translate(body).body["messages"]) == 2
    assert len(MessagesApi(lambda: settings[0], counts=True).translate(body).body["messages"]) == 2


def test_a_count_needs_no_max_tokens() -> None:
    body = {"model": "m", "messages": BODY["messages"]}
    assert MessagesApi(lambda: True, counts=True).translate(body).body == body
    with pytest.raises(BadRequestError, match="max_tokens is missing"):
        MessagesApi(lambda: True).translate(body)


def test_errors() -> None:
    status, body = MessagesApi(lambda: True).error(ServiceUnavailableError("full"), "req-1")
    assert (status, orjson.loads(body)["error"]["type"]) == (529, "overloaded_error")
