"""One request, parsed."""

from __future__ import annotations

import re
import sys
import time
from collections.abc import Callable, Mapping
from dataclasses import replace
from typing import Any

from xgen_proxy.request.corrections import corrected
from xgen_proxy.request.features import Endpoint, Features, UsedAlias
from xgen_proxy.request.limits import Limits
from xgen_proxy.request.opaque.multipart import Form
from xgen_proxy.request.parsing import parse_features, strip_hints
from xgen_proxy.request.presets import apply_preset
from xgen_proxy.values import frozen

TRACEPARENT = re.compile(rb"[0-9a-f]{2}-[0-9a-f]{32}-[0-9a-f]{16}-[0-9a-f]{2}(?:-[\x21-\x7e]{1,64})?")
TRACESTATE = re.compile(rb"[\x20-\x7e\t]{1,512}")  # the specification asks to pass on at least 512 characters


@frozen
class Origin:
    """Where a request comes from.

    `request_id` is the client's own or a new one. `headers` have lower-case names. `client` is the client's address.
    `key` is the first 8 hex digits of the hash of its API key.
    """

    request_id: str
    headers: Mapping[bytes, bytes]
    client: str | None = None
    key: str | None = None


@frozen
class Call:
    """A request that can be routed.

    `body` is corrected, without our hints and with presets filled in. `raw` is the client's own bytes while they still
    say the same as `body`, else None. `model` is the public model name. `trace` is the client's trace context as header
    lines. `started` is `time.perf_counter()`. `form`: the request was a multipart form, of which `body` has the short
    fields that the proxy reads.
    """

    origin: Origin
    features: Features
    body: dict[str, Any]
    raw: bytes | None
    model: str
    trace: bytes
    started: float
    form: Form | None = None

    @property
    def id(self) -> str:
        return self.origin.request_id

    @property
    def asked(self) -> str:
        """The name that the client sent, which the answer must carry: that of the model, or an alias."""
        alias = self.features.alias
        return self.model if alias is None else alias.asked


def parse_call(
    origin: Origin,
    endpoint: Endpoint,
    raw: bytes,
    body: dict[str, Any],
    *,
    limits: Limits,
    continuation: bool,
    default_model: Callable[[], str],
    believed_below: int = sys.maxsize,
    find_alias: Callable[[str], UsedAlias | None] = lambda name: None,
) -> Call:
    """Checks and reads a request body. `raw` are the bytes that `body` was parsed from.

    `continuation` is the setting; a client can only turn it off. `default_model` is asked if the client names none.
    `believed_below`: the setting `routing.max_tokens_believed_below`. `find_alias` takes a model's name.
    Raises BadRequestError, and whatever `default_model` raises.
    """
    sent, body = body, corrected(body)
    features = parse_features(body, origin.headers, endpoint, limits)
    named = features.model
    model = named or default_model()
    if alias := find_alias(model):
        model = alias.model
        urgency = features.urgency if _says_urgency(body, origin.headers) else alias.urgency
        features = replace(features, alias=alias, urgency=urgency or features.urgency)
    if model != named:
        features = replace(features, model=model)
    if (features.max_tokens or 0) >= believed_below:
        features = replace(features, max_tokens_believed=False)
    if not continuation:
        features = replace(features, continuation=False)
    changed = apply_preset(strip_hints(body, endpoint), features)
    trace = trace_lines(origin.headers) if b"traceparent" in origin.headers else b""
    return Call(origin, features, changed, raw if changed is sent else None, model, trace, time.perf_counter())


def _says_urgency(body: dict[str, Any], headers: Mapping[bytes, bytes]) -> bool:
    return bool(body.get("urgency") or headers.get(b"x-urgency"))


def trace_lines(headers: Mapping[bytes, bytes]) -> bytes:
    """The client's trace context as header lines for the backend: https://www.w3.org/TR/trace-context/

    Only what is well-formed: a server that closes the connection at an odd header would be held to be broken.
    """
    parent, state = headers.get(b"traceparent", b""), headers.get(b"tracestate", b"")
    if not TRACEPARENT.fullmatch(parent):
        return b""
    lines = b"traceparent: " + parent + b"\r\n"
    return lines + b"tracestate: " + state + b"\r\n" if TRACESTATE.fullmatch(state) else lines
