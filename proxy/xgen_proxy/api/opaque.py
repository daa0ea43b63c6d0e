"""The opaque endpoints: reranking, scores, classes, tokens, and audio. The proxy reads the model and passes the rest.

A form is held whole like any body, within a limit of its own: a request that waits for a slot or goes to a second
replica needs all of it, and the budget for all bodies together bounds what is held.
"""

from __future__ import annotations

from starlette.types import Receive

from xgen_proxy.api.inference import Incoming, InferenceEndpoint
from xgen_proxy.api.translated import read_limited_body
from xgen_proxy.downstream.request_body import HeldBytes, read_body
from xgen_proxy.gateway import Gateway
from xgen_proxy.request.call import Origin
from xgen_proxy.request.media.parts import check_everywhere
from xgen_proxy.request.opaque.endpoints import OPAQUE
from xgen_proxy.request.opaque.multipart import boundary_of, read_form
from xgen_proxy.request.opaque.parsing import parse_opaque


class OpaqueJson(InferenceEndpoint):
    async def read(self, origin: Origin, receive: Receive, held: HeldBytes) -> Incoming:
        limits, router = self.gateway.settings.limits, self.gateway.router
        raw = await read_body(receive, origin.headers, limits.body_bytes, held)
        body = read_limited_body(raw, origin.headers, limits)
        check_everywhere(body, limits)
        return Incoming(parse_opaque(origin, self.endpoint, raw, body, router.default_model, router.find_alias))


class OpaqueForm(InferenceEndpoint):
    async def read(self, origin: Origin, receive: Receive, held: HeldBytes) -> Incoming:
        boundary_of(origin.headers)  # before 26 MiB are read in vain
        router = self.gateway.router
        raw = await read_body(receive, origin.headers, self.gateway.settings.limits.upload_bytes, held)
        form = read_form(raw, origin.headers)
        body = dict(form.fields)
        return Incoming(parse_opaque(origin, self.endpoint, raw, body, router.default_model, router.find_alias, form))


def opaque_routes(gateway: Gateway) -> dict[str, InferenceEndpoint]:
    """By path."""
    return {
        endpoint.path: (OpaqueForm if endpoint.form else OpaqueJson)(gateway, name) for name, endpoint in OPAQUE.items()
    }
