"""The fleet at one moment, as immutable values: what decide() reads, and what a replay or a simulator feeds it.

`now` and all times are seconds of time.monotonic(), or of a simulator's clock.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import field, fields, replace
from typing import TYPE_CHECKING, Any

from xgen_proxy.config.settings import Routing
from xgen_proxy.fleet.circuit_breaker import slow_start_fraction
from xgen_proxy.fleet.hash_ring import HashRing, ring_of
from xgen_proxy.fleet.load import LoadParts, Scrape, load_of
from xgen_proxy.fleet.memory.pressure import Pressure
from xgen_proxy.request.features import DeviceClass
from xgen_proxy.values import frozen

if TYPE_CHECKING:
    from _typeshed import DataclassInstance


@frozen
class ReplicaSnapshot:
    """`slots`: requests it runs at once. `overcommit`: requests it may hold beyond its slots. `slow_start_at`: when its
    slow start began, if it had one. `scraped`: its last scrape, if its engine has metrics. `answers`: it answers health
    checks, whether it is up or not."""

    name: str
    up: bool
    in_flight: int
    slots: int
    overcommit: int
    slow_start_at: float | None = None
    scraped: Scrape | None = None
    answers: bool = False
    pressure: Pressure | None = None

    @property
    def closed(self) -> bool:
        """It gets no new work while another replica can do it, since its memory is nearly full."""
        return self.pressure is not None and self.pressure.level == "closed"

    def open_slots(self, now: float) -> int:
        """The slots that may be used now: fewer than `slots` during a slow start, and while memory is short."""
        slots = self.slots if self.pressure is None else self.pressure.open_slots(self.slots)
        fraction = slow_start_fraction(self.slow_start_at, now)
        return slots if fraction == 1.0 else max(1, min(slots, int(self.slots * fraction)))

    def capacity(self, now: float) -> int:
        """How many requests it may hold now."""
        open_slots = self.open_slots(now)
        if open_slots < self.slots:
            return open_slots
        limit = None if self.pressure is None else self.pressure.limit
        most = self.slots + self.overcommit
        return most if limit is None else min(limit, most)

    def has_capacity(self, now: float) -> bool:
        return self.in_flight < self.capacity(now)

    def load(self, now: float, routing: Routing) -> float:
        """0 is idle, 1 full."""
        return self.load_parts(now, routing).total

    def load_parts(self, now: float, routing: Routing) -> LoadParts:
        slots = self.open_slots(now)
        parts = load_of(in_flight=self.in_flight, slots=slots, scraped=self.scraped, now=now, routing=routing)
        return replace(parts, total=1.0) if self.closed and parts.total < 1 else parts


@frozen
class Usable:
    """The indexes of the replicas that are up: those that the memory guard has not closed, and those that it has."""

    open: tuple[int, ...]
    closed: tuple[int, ...]


def usable_of(replicas: Sequence[ReplicaSnapshot]) -> Usable:
    opened: list[int] = []
    closed: list[int] = []
    for index, replica in enumerate(replicas):
        if replica.up:
            (closed if replica.closed else opened).append(index)
    return Usable(tuple(opened), tuple(closed))


@frozen
class BackendSnapshot:
    """`in_flight`: our requests on all its replicas, draining ones included. `ring`: over the names of `replicas`.
    `usable` follows from `replicas`; it is given where it is known already, since looking at 1,000 of them takes long.
    """

    name: str
    device_class: DeviceClass
    models: frozenset[str]
    capabilities: frozenset[str]
    context: int | None
    replicas: tuple[ReplicaSnapshot, ...]
    in_flight: int
    ring: HashRing = field(compare=False)  # it follows from the names
    usable: Usable | None = field(default=None, compare=False)


@frozen
class FleetSnapshot:
    backends: tuple[BackendSnapshot, ...]


def to_json(fleet: FleetSnapshot) -> dict[str, Any]:
    """Plain dicts and lists. What follows from the rest is left out."""
    return {"backends": [_backend_to_json(backend) for backend in fleet.backends]}


def _backend_to_json(backend: BackendSnapshot) -> dict[str, Any]:
    values = shallow_dict(backend)
    del values["ring"], values["usable"]
    replicas = [
        {
            **shallow_dict(replica),
            "scraped": shallow_dict(replica.scraped) if replica.scraped else None,
            "pressure": shallow_dict(replica.pressure) if replica.pressure else None,
        }
        for replica in backend.replicas
    ]
    models, capabilities = sorted(backend.models), sorted(backend.capabilities)
    return {**values, "models": models, "capabilities": capabilities, "replicas": replicas}


def shallow_dict(value: DataclassInstance) -> dict[str, Any]:
    return {each.name: getattr(value, each.name) for each in fields(value)}


def from_json(fleet: dict[str, Any]) -> FleetSnapshot:
    """Raises KeyError or TypeError for anything that to_json() did not make."""
    return FleetSnapshot(tuple(_backend_from_json(backend) for backend in fleet["backends"]))


def _backend_from_json(backend: dict[str, Any]) -> BackendSnapshot:
    replicas = tuple(
        ReplicaSnapshot(
            **{
                **replica,
                "scraped": Scrape(**replica["scraped"]) if replica["scraped"] else None,
                "pressure": Pressure(**replica["pressure"]) if replica["pressure"] else None,
            }
        )
        for replica in backend["replicas"]
    )
    return BackendSnapshot(
        name=backend["name"],
        device_class=backend["device_class"],
        models=frozenset(backend["models"]),
        capabilities=frozenset(backend["capabilities"]),
        context=backend["context"],
        replicas=replicas,
        in_flight=backend["in_flight"],
        ring=ring_of(tuple(replica.name for replica in replicas)),
    )
