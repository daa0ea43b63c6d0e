"""The routes that ask a model: plain ASGI callables, since they are hot."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace

from starlette.types import Receive, Scope, Send

from xgen_proxy.api.api_keys import check_key
from xgen_proxy.downstream.client_address import client_address
from xgen_proxy.downstream.direct_writer import DirectWriter, direct_writer_for
from xgen_proxy.downstream.request_body import HeldBytes, read_body
from xgen_proxy.downstream.request_id import request_id
from xgen_proxy.downstream.response_writer import ResponseWriter, send_error
from xgen_proxy.errors import ClientDisconnectedError, MethodNotAllowedError, ProxyError
from xgen_proxy.forwarding.outcome import Refusal
from xgen_proxy.gateway import Gateway
from xgen_proxy.request.call import Call, Origin, parse_call
from xgen_proxy.request.features import Endpoint, Json
from xgen_proxy.request.json_body import read_json
from xgen_proxy.values import frozen


@frozen
class Incoming:
    """A request that was read. `writer` makes what sends its answer in the words of the API that it came in."""

    call: Call
    writer: Callable[[Send, DirectWriter | None], ResponseWriter] = ResponseWriter


class InferenceEndpoint:
    """One POST route, from the request's bytes to the response's."""

    def __init__(self, gateway: Gateway, endpoint: Endpoint) -> None:
        self.gateway = gateway
        self.endpoint = endpoint

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        headers = dict(scope["headers"])
        settings = self.gateway.settings
        origin = Origin(request_id(headers), headers, client_address(scope, settings.trusted_proxies))
        with self.gateway.bodies.hold() as held:
            try:
                if scope["method"] != "POST":
                    raise MethodNotAllowedError(scope["path"], scope["method"], "POST")
                if (key := check_key(headers, settings.api_keys)) is not None:
                    origin = replace(origin, key=key)
                incoming = await self.read(origin, receive, held)
            except ProxyError as error:
                await self.refuse(origin, error, send)
                self.gateway.observer.request_refused(Refusal(origin, self.endpoint, error))
            except ClientDisconnectedError:
                pass
            else:
                call = incoming.call
                self.gateway.observer.request_started(call)
                writer = incoming.writer(send, direct_writer_for(scope))
                outcome = await self.gateway.forwarder.forward(call, receive, writer)
                self.gateway.observer.request_finished(call, outcome)

    async def read(self, origin: Origin, receive: Receive, held: HeldBytes) -> Incoming:
        """Raises ProxyError, ClientDisconnectedError."""
        limits = self.gateway.settings.limits
        raw = await read_body(receive, origin.headers, limits.body_bytes, held)
        return Incoming(self.parse(origin, raw, read_json(raw, origin.headers, limits)))

    def parse(self, origin: Origin, raw: bytes, body: Json) -> Call:
        """`raw` are the bytes that `body` was parsed from. Raises ProxyError."""
        settings = self.gateway.settings
        return parse_call(
            origin,
            self.endpoint,
            raw,
            body,
            limits=settings.limits,
            continuation=settings.routing.continuation,
            default_model=self.gateway.router.default_model,
            believed_below=settings.routing.max_tokens_believed_below,
            find_alias=self.gateway.router.find_alias,
        )

    async def refuse(self, origin: Origin, error: ProxyError, send: Send) -> None:
        await send_error(send, error, [(b"x-request-id", origin.request_id.encode())])
