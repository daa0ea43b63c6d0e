"""Calls and targets for unit tests."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import orjson

from xgen_proxy.config.settings import Settings
from xgen_proxy.dialects.backend_request import BackendRequest
from xgen_proxy.fleet.backend import Fleet
from xgen_proxy.request.call import Call, Origin, parse_call
from xgen_proxy.request.features import Endpoint, UsedAlias
from xgen_proxy.request.limits import Limits
from xgen_proxy.request.opaque.parsing import parse_opaque
from xgen_proxy.routing.router import Target


def make_call(endpoint: Endpoint = "chat", alias: UsedAlias | None = None, **fields: Any) -> Call:
    least = {"messages": [{"role": "user", "content": "Hi"}]} if endpoint == "chat" else {"prompt": "One"}
    body = {"model": "m", **least, **fields}
    origin = Origin("id-1", {})
    return parse_call(
        origin, endpoint, orjson.dumps(body), body, limits=Limits(), continuation=True, default_model=lambda: "m",
        find_alias=lambda name: alias,
    )  # fmt: skip


def make_opaque_call(endpoint: Endpoint, headers: Mapping[bytes, bytes] | None = None, **fields: Any) -> Call:
    body = {"model": "m", **fields}
    return parse_opaque(Origin("id-1", headers or {}), endpoint, orjson.dumps(body), body, lambda: "m")


def make_opaque_request(
    endpoint: Endpoint, served: str = "m", context: int | None = 2048, **fields: Any
) -> BackendRequest:
    call = make_opaque_call(endpoint, **fields)
    return BackendRequest(call.features, call.body, call.raw, call.model, served, context)


def make_target(reason: str = "default: because", url: str = "http://gpu:8000") -> Target:
    """On a backend called vllm."""
    [backend] = Fleet(Settings(backends={"vllm": {"urls": url}})).backends
    return Target(backend, backend.replicas[0], reason, 0)
