"""The routes of other APIs, which are translated to chat completions."""

from __future__ import annotations

import orjson
from starlette.types import Receive, Scope, Send

from xgen_proxy.api.inference import Incoming, InferenceEndpoint
from xgen_proxy.downstream.direct_writer import direct_writer_for
from xgen_proxy.downstream.request_body import HeldBytes, read_body
from xgen_proxy.downstream.response_writer import ResponseWriter, send_error
from xgen_proxy.errors import ProxyError
from xgen_proxy.gateway import Gateway
from xgen_proxy.request.call import Origin
from xgen_proxy.request.json_body import read_json
from xgen_proxy.translation.translation import Api
from xgen_proxy.translation.writer import TranslatingWriter


class TranslatedEndpoint(InferenceEndpoint):
    """One POST route of another API."""

    def __init__(self, gateway: Gateway, api: Api) -> None:
        super().__init__(gateway, "chat")
        self.api = api

    async def read(self, origin: Origin, receive: Receive, held: HeldBytes) -> Incoming:
        limits = self.gateway.settings.limits
        raw = await read_body(receive, origin.headers, limits.body_bytes, held)
        translation = self.api.translate(read_json(raw, origin.headers, limits), origin.headers)
        call = self.parse(origin, orjson.dumps(translation.body), translation.body)
        return Incoming(call, translation)

    def writer(self, incoming: Incoming, scope: Scope, send: Send) -> ResponseWriter:
        if incoming.translation is None:
            return super().writer(incoming, scope, send)
        return TranslatingWriter(send, direct_writer_for(scope), self.api, incoming.translation, incoming.call)

    async def refuse(self, origin: Origin, error: ProxyError, send: Send) -> None:
        headers = [(b"x-request-id", origin.request_id.encode())]
        await send_error(send, error, headers, self.api.error(error, origin.request_id))
