"""/health /ready /metrics /models/status /route: the routes for operators."""

from __future__ import annotations

import asyncio
import time
from collections.abc import Iterable
from dataclasses import asdict
from typing import Any

from prometheus_client import CONTENT_TYPE_LATEST
from starlette.concurrency import run_in_threadpool
from starlette.requests import Request
from starlette.responses import JSONResponse, Response

from xgen_proxy import __version__
from xgen_proxy.api.api_keys import authenticated
from xgen_proxy.api.inference import InferenceEndpoint
from xgen_proxy.dialects.backend_request import ModelFacts
from xgen_proxy.downstream.request_body import read_body
from xgen_proxy.downstream.request_id import request_id
from xgen_proxy.fleet.backend import Backend
from xgen_proxy.fleet.details.gguf_header import read_gguf_header
from xgen_proxy.fleet.details.gpus import GpuReader
from xgen_proxy.fleet.details.kv_cache import read_kv_cache
from xgen_proxy.fleet.memory.process import Memory, is_local, listeners, memory_of, model_files
from xgen_proxy.fleet.replica import Replica
from xgen_proxy.gateway import Gateway
from xgen_proxy.request.call import Origin
from xgen_proxy.request.json_body import read_json
from xgen_proxy.routing.plan import explain

Local = dict[Replica, tuple[Memory, ModelFacts | None]]
GPUS = GpuReader()


def gateway_of(request: Request) -> Gateway:
    gateway: Gateway = request.app.state.gateway
    return gateway


async def root(request: Request) -> Response:
    """The name, the version and links: some clients and people ask for / to see whether a server is there."""
    return JSONResponse(
        {
            "name": "xgen-proxy",
            "version": __version__,
            "api": "OpenAI's, under /v1: POST /v1/chat/completions, /v1/responses, /v1/completions, /v1/embeddings;"
            " Anthropic's POST /v1/messages",
            "links": ["/docs", "/openapi.json", "/v1/models", "/models/status", "/health", "/ready", "/metrics"],
        }
    )


async def health(request: Request) -> Response:
    """The process is alive. Says nothing about the backends: restarting the proxy would not repair them."""
    return JSONResponse({"status": "ok"})


async def ready(request: Request) -> Response:
    """503 while no replica is up, and while draining."""
    gateway = gateway_of(request)
    if gateway.ready:
        return JSONResponse({"status": "ready"})
    reason = "draining" if gateway.draining else "no backend is up"
    replicas = {replica.name: f"{replica.state}: {replica.reason}" for replica in gateway.fleet.replicas}
    return JSONResponse({"status": "not ready", "reason": reason, "replicas": replicas}, status_code=503)


async def metrics(request: Request) -> Response:
    return Response(gateway_of(request).metrics.render(), media_type=CONTENT_TYPE_LATEST)


async def status(request: Request) -> Response:
    """The fleet, from the last health checks and from this machine. It asks no engine."""
    gateway = gateway_of(request)
    fleet = [(backend, (*backend.replicas, *backend.draining.values())) for backend in gateway.fleet.backends]
    replicas = [replica for _, replicas in fleet for replica in replicas]
    local, gpus = await asyncio.gather(run_in_threadpool(local_facts, replicas), GPUS.read())
    return JSONResponse(
        {
            "default_model": gateway.fleet.default_model,
            "models": gateway.fleet.models,
            "aliases": aliases(gateway),
            "queued": len(gateway.admission.queue),
            "draining": gateway.draining,
            "gpus": gpus,
            "model_pairs": model_pairs(gateway),
            "backends": [backend_status(backend, replicas, local) for backend, replicas in fleet],
        }
    )


def aliases(gateway: Gateway) -> dict[str, dict[str, Any]]:
    """By pattern. `served`: whether a backend serves the model that it stands for."""
    models = gateway.fleet.models
    found = gateway.settings.models.aliases.items()
    return {pattern: {**alias.model_dump(), "served": alias.model in models} for pattern, alias in found}


def local_facts(replicas: list[Replica]) -> Local:
    """What this machine knows about the processes that run on it."""
    here = [each for each in replicas if is_local(each.pool.host)]
    pids = listeners() if here else {}
    found: Local = {}
    for each in replicas:
        pid = pids.get(each.pool.port) if each in here else None
        headers = [header for path in model_files(pid) if (header := read_gguf_header(path)) is not None]
        found[each] = memory_of(pid), headers[0] if headers else None
    return found


def model_pairs(gateway: Gateway) -> list[dict[str, Any]]:
    """The backends that serve the same public model name. `same_tokenizer`: null while that is unknown."""
    measured = gateway.settings.fallback.top1
    return [
        {"model": model, "backends": [one, other], "same_tokenizer": alike, "top1": measured.get((one, other, model))}
        for (one, other, model), alike in gateway.health.tokenizers.pairs.items()
    ]


def backend_status(backend: Backend, replicas: Iterable[Replica], local: Local) -> dict[str, Any]:
    return {
        "name": backend.name,
        "device_class": backend.device_class,
        "dialect": backend.dialect.name,
        "models": {name: backend.served(name) for name in sorted(backend.models)},
        "context": backend.context,
        "capabilities": sorted(backend.capabilities),
        "replicas": [replica_status(replica, *local[replica]) for replica in replicas],
    }


def replica_status(replica: Replica, memory: Memory, header: ModelFacts | None) -> dict[str, Any]:
    scraped = replica.scraped
    kv_cache = read_kv_cache(replica.metrics_page)
    return {
        "name": replica.name,
        "url": replica.url,
        "state": replica.state,
        "reason": replica.reason,
        "for_s": round(time.monotonic() - replica.since, 1),
        "up": replica.up,
        "in_flight": replica.in_flight,
        "slots": replica.slots,
        "connections": len(replica.pool.live),
        "load": replica.load_parts.as_dict(),
        "memory": {
            **memory,
            "kv_usage": scraped.kv if scraped else None,
            "pressure": asdict(replica.pressure) if replica.pressure else None,
        },
        "kv_cache": asdict(kv_cache) if kv_cache else None,
        "model": model_status(replica.info.model if replica.info else None, header),
    }


def model_status(reported: ModelFacts | None, header: ModelFacts | None) -> dict[str, Any] | None:
    """What the engine reports, and what it leaves out from the header of its file."""
    known = [asdict(each) for each in (header, reported) if each is not None]
    if not known:
        return None
    return {key: next((each[key] for each in reversed(known) if each[key] is not None), None) for key in known[0]}


async def route(request: Request) -> Response:
    """The dry run: what would be decided for this request now.

    The body is that of /v1/chat/completions, or of /v1/completions if it has a `prompt`.
    """
    gateway = authenticated(request)
    headers = dict(request.scope["headers"])
    limits = gateway.settings.limits
    with gateway.bodies.hold() as held:
        raw = await read_body(request.receive, headers, limits.body_bytes, held)
        body = read_json(raw, headers, limits)
        endpoint = InferenceEndpoint(gateway, "completions" if "prompt" in body else "chat")
        features = endpoint.parse(Origin(request_id(headers), headers), raw, body).features
    return JSONResponse(explain(gateway.router.plan(features), features))
