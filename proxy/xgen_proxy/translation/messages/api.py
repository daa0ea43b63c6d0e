"""The Messages API, for the translating endpoint."""

from __future__ import annotations

from collections.abc import Callable

import orjson

from xgen_proxy.errors import ProxyError
from xgen_proxy.request.call import Call
from xgen_proxy.request.features import Json
from xgen_proxy.translation.chat import read_answer
from xgen_proxy.translation.messages.blocks import Dropped
from xgen_proxy.translation.messages.errors import error_response
from xgen_proxy.translation.messages.request import to_chat
from xgen_proxy.translation.messages.response import message_of
from xgen_proxy.translation.messages.stream import MessageStream


class MessagesApi:
    """`strip_attribution` reads the setting, which may change while the proxy runs. `counts`: of count_tokens."""

    def __init__(self, strip_attribution: Callable[[], bool], *, counts: bool = False) -> None:
        self._strip_attribution = strip_attribution
        self._counts = counts

    def translate(self, body: Json) -> MessagesTranslation:
        dropped: Dropped = {}
        chat = to_chat(body, dropped, strip_attribution=self._strip_attribution(), counts=self._counts)
        return MessagesTranslation(chat, dropped)

    def error(self, error: ProxyError, request_id: str) -> tuple[int, bytes]:
        return error_response(error, request_id)

    def fails_in_stream(self, error: ProxyError, originator: bytes) -> bool:
        return False


class MessagesTranslation:
    """One request. The answer names the model as the client did, and has an id by which the log can be searched."""

    def __init__(self, body: Json, dropped: Dropped) -> None:
        self.body = body
        self.dropped = tuple(dropped)

    def whole(self, data: bytes, call: Call) -> bytes:
        return orjson.dumps(message_of(read_answer(data), call.id, call.asked))

    def stream(self, call: Call) -> MessageStream:
        return MessageStream(call.id, call.asked, call.features.prompt_tokens)
