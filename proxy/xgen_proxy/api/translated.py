"""The routes of other APIs, which are translated to chat completions."""

from __future__ import annotations

from collections.abc import Mapping
from functools import partial
from typing import Any

import orjson
from starlette.types import Receive, Send

from xgen_proxy.api.inference import Incoming, InferenceEndpoint
from xgen_proxy.downstream.request_body import HeldBytes, read_body
from xgen_proxy.downstream.response_writer import send_error
from xgen_proxy.errors import BadRequestError, ProxyError
from xgen_proxy.gateway import Gateway
from xgen_proxy.request.call import Origin
from xgen_proxy.request.features import Json
from xgen_proxy.request.json_body import read_json
from xgen_proxy.request.limits import Limits
from xgen_proxy.translation.media_part import in_clients_words
from xgen_proxy.translation.translation import Api
from xgen_proxy.translation.writer import TranslatingWriter

PARTS = ("content", "output", "tools")  # of a message or an item, and of a namespace


def read_limited_body(raw: bytes, headers: Mapping[bytes, bytes], limits: Limits) -> Json:
    """Reads the body and limits its lists. The chat's own limits apply only after translation, or never where it passes
    unread.

    Raises UnsupportedMediaTypeError, BadRequestError.
    """
    body = read_json(raw, headers, limits)
    for field, most in (("messages", limits.messages), ("input", limits.messages), ("tools", limits.schema_nodes)):
        entries = body.get(field)
        if isinstance(entries, list) and (len(entries) > most or _count_entries(entries) > most):
            raise BadRequestError(f"{field} has more than {most} entries and parts of these", param=field)
    return body


def _count_entries(entries: list[Any]) -> int:
    """The number of entries and of what their lists have."""
    count = len(entries)
    for each in entries:
        if isinstance(each, dict):
            for name in PARTS:
                if name in each and isinstance(each[name], list):
                    count += len(each[name])
    return count


class TranslatedEndpoint(InferenceEndpoint):
    """One POST route of another API."""

    def __init__(self, gateway: Gateway, api: Api) -> None:
        super().__init__(gateway, "chat")
        self.api = api

    async def read(self, origin: Origin, receive: Receive, held: HeldBytes) -> Incoming:
        limits = self.gateway.settings.limits
        raw = await read_body(receive, origin.headers, limits.body_bytes, held)
        translation = self.api.translate(read_limited_body(raw, origin.headers, limits))
        chat = translation.body
        try:
            call = self.parse(origin, orjson.dumps(chat), chat)
        except BadRequestError as error:
            raise in_clients_words(error, chat) from None
        originator = origin.headers.get(b"originator", b"")
        writer = partial(TranslatingWriter, api=self.api, translation=translation, call=call, originator=originator)
        return Incoming(call, writer)

    async def refuse(self, origin: Origin, error: ProxyError, send: Send) -> None:
        id = origin.request_id.encode()
        headers = [(b"x-request-id", id), (b"request-id", id)]
        await send_error(send, error, headers, self.api.error(error, origin.request_id))
