"""Snapshots for decide(), and Features of a short chat without hints."""

from __future__ import annotations

import math
from dataclasses import replace
from typing import Any

from xgen_proxy.config.settings import Routing
from xgen_proxy.fleet.hash_ring import ring_of
from xgen_proxy.fleet.load import Scrape
from xgen_proxy.fleet.snapshot import BackendSnapshot, ReplicaSnapshot
from xgen_proxy.request.features import NEEDS, DeviceClass, Features

AT_REST = Features(
    endpoint="chat",
    model="m",
    prompt_words=5,
    prompt_tokens=7,
    max_tokens=None,
    stream=False,
    include_usage=False,
    needs=frozenset(),
    backend=None,
    urgency="normal",
    task_type=None,
    fallback=True,
    continuation=True,
    hinted=False,
    session=None,
    prefix="hi",
)


def features(**values: Any) -> Features:
    return replace(AT_REST, **values)


def replica(name: str, load: float = 0.0, *, up: bool = True, in_flight: int = 0) -> ReplicaSnapshot:
    """Its load comes from the `waiting` gauge, its slots are too many to matter."""
    waiting = load * Routing().waiting_full
    scraped = Scrape(running=None, waiting=waiting, kv=None, at=0.0, stale_at=math.inf)
    return ReplicaSnapshot(name, up, in_flight, slots=1000, overcommit=0, scraped=scraped)


def backend(
    name: str,
    device_class: DeviceClass = "gpu",
    *,
    load: float = 0.0,
    replicas: tuple[ReplicaSnapshot, ...] = (),
    models: frozenset[str] = frozenset({"m"}),
    capabilities: frozenset[str] = NEEDS,
    context: int | None = 2048,
) -> BackendSnapshot:
    replicas = replicas or (replica(f"{name}-0", load),)
    in_flight = sum(each.in_flight for each in replicas)
    ring = ring_of(tuple(each.name for each in replicas))
    return BackendSnapshot(name, device_class, models, capabilities, context, replicas, in_flight, ring)


def gpu(load: float = 0.0, **values: Any) -> BackendSnapshot:
    return backend("vllm", "gpu", load=load, **values)


def cpu(load: float = 0.0, **values: Any) -> BackendSnapshot:
    return backend("llama_cpp", "cpu", load=load, **values)


def down(snapshot: BackendSnapshot) -> BackendSnapshot:
    return replace(snapshot, replicas=tuple(replace(each, up=False) for each in snapshot.replicas))
