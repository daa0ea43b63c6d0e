"""The live fleet: backends, their replicas, what is configured and known about them, and what they are doing now.

Replica and Backend refer to each other, so they share a module.
"""

from __future__ import annotations

import asyncio
import time
from collections.abc import Iterable, Iterator
from typing import Any, Literal
from urllib.parse import urlsplit

import orjson

from xgen_proxy.config.settings import BackendSettings, Routing, Settings
from xgen_proxy.dialects.backend_request import ReplicaInfo
from xgen_proxy.dialects.dialect import Dialect
from xgen_proxy.dialects.llama_cpp_python.chat_template import load_template
from xgen_proxy.dialects.registry import DIALECTS
from xgen_proxy.errors import UpstreamProtocolError
from xgen_proxy.fleet.circuit_breaker import CircuitBreaker
from xgen_proxy.fleet.hash_ring import HashRing, ring_of
from xgen_proxy.fleet.load import LoadParts, Scrape
from xgen_proxy.fleet.snapshot import BackendSnapshot, FleetSnapshot, ReplicaSnapshot
from xgen_proxy.upstream.pool import Pool

State = Literal["starting", "up", "suspect", "down", "draining"]


class Replica:
    """One server process of a backend.

    `state`: starting (not checked yet), up, suspect (answers health checks but its circuit breaker is not closed), down
    (does not answer), draining (no longer listed: finishes its requests). `in_flight`: our requests that hold one of
    its slots. `joined_later`: the backend had other replicas already. `missing`: capabilities that its engine denied
    having. Only the methods change these. `response_headers` name it to clients.
    """

    def __init__(self, backend: Backend, url: str, *, joined_later: bool = False) -> None:
        parts = urlsplit(url)
        self.backend = backend
        self.url = url
        self.name = f"{backend.name}@{parts.netloc}"
        self.response_headers = (b"x-backend", backend.name.encode()), (b"x-replica", self.name.encode())
        self.joined_later = joined_later
        self.pool = Pool(parts.hostname or "", parts.port or 80, connect_timeout_s=backend.settings.connect_timeout_s)
        self.state: State = "starting"
        self.reason = "not checked yet"
        self.since = time.monotonic()
        self.in_flight = 0
        self.drained = asyncio.Event()
        self.scraped: Scrape | None = None
        self.info: ReplicaInfo | None = None
        self.missing: frozenset[str | None] = frozenset()
        self.breaker = CircuitBreaker()
        self.record_activity()
        self.configure()

    def configure(self) -> None:
        """Apply the backend's current settings."""
        self.pool.connect_timeout_s = self.backend.settings.connect_timeout_s
        self.head = self._head()
        self._set_slots()

    def _head(self) -> bytes:
        """The request headers that every request has. Hop-by-hop and client headers are never copied."""
        key = self.backend.settings.api_key
        lines = [
            f"host: {urlsplit(self.url).netloc}",
            "content-type: application/json",
            "accept: application/json, text/event-stream",
            "accept-encoding: identity",
        ]
        if key is not None:
            lines.append(f"authorization: Bearer {key.get_secret_value()}")
        return ("\r\n".join(lines) + "\r\n").encode()

    def _set_slots(self) -> None:
        reported = self.info.slots if self.info else None
        self.slots = self.backend.settings.slots or reported or self.backend.dialect.slots
        self.backend.replica_changed(self)

    def record_info(self, info: ReplicaInfo) -> None:
        self.info = info
        self._set_slots()

    def lost_capability(self, name: str | None) -> bool:
        """Its engine says that it was started without it; believed until it goes down. Returns whether that is news."""
        if name in self.missing:
            return False
        self.missing |= {name}
        self.backend.merge_infos()
        return True

    def record_scrape(self, scrape: Scrape | None) -> None:
        self.scraped = scrape
        self.backend.replica_changed(self)

    def record_activity(self) -> None:
        """Remember that it sent something just now."""
        self.pool.last_activity = time.monotonic()

    # slots and load

    def acquire(self) -> None:
        self.in_flight += 1
        self.backend.in_flight += 1
        self.backend.replica_changed(self)

    def release(self) -> None:
        self.in_flight -= 1
        self.backend.in_flight -= 1
        self.backend.replica_changed(self)
        if not self.in_flight:
            self.drained.set()

    def snapshot(self) -> ReplicaSnapshot:
        return ReplicaSnapshot(
            self.name,
            self.state == "up",
            self.in_flight,
            self.slots,
            self.backend.dialect.overcommit,
            self.breaker.slow_start_at,
            self.scraped,
        )

    @property
    def open_slots(self) -> int:
        return self.snapshot().open_slots(time.monotonic())

    @property
    def capacity(self) -> int:
        return self.snapshot().capacity(time.monotonic())

    @property
    def has_capacity(self) -> bool:
        if self.breaker.slow_start_at is None:  # the common case, without making a snapshot
            return self.in_flight < self.slots + self.backend.dialect.overcommit
        return self.snapshot().has_capacity(time.monotonic())

    @property
    def load_parts(self) -> LoadParts:
        return self.snapshot().load_parts(time.monotonic(), self.backend.routing)

    @property
    def load(self) -> float:
        return self.load_parts.total

    # state

    @property
    def up(self) -> bool:
        return self.state == "up"

    def set_state(self, state: State, reason: str) -> bool:
        """Returns whether the state changed. A draining replica keeps draining until undrain()."""
        return self.state != "draining" and self._change_state(state, reason)

    def _change_state(self, state: State, reason: str) -> bool:
        changed = state != self.state
        if changed:
            self.since = time.monotonic()
        if state == "down":
            self.missing = frozenset()  # its next start may have other flags
        self.state, self.reason = state, reason
        self.backend.replica_changed(self)
        return changed

    def drain(self) -> None:
        self._change_state("draining", "no longer listed")
        self.drained.clear()

    def undrain(self) -> None:
        """It is listed again before it finished draining."""
        self._change_state("starting", "listed again")

    def mark_up(self, reason: str) -> None:
        """It works. It starts slowly if it was down or suspect, or joined later."""
        if self.joined_later or self.state != "starting":
            self.breaker.close(time.monotonic())
        self.record_activity()
        self.set_state("up", reason)

    def mark_suspect(self, reason: str) -> None:
        """It answers health checks, but gets no requests until it has answered a canary, which is due at once."""
        self.set_state("suspect", reason)
        self.breaker.open_until_canary()

    def succeeded(self) -> None:
        """Record a successful request."""
        self.breaker.succeeded()

    def failed(self, reason: str) -> None:
        """Record a request that failed after a connection was made."""
        if self.breaker.failed(time.monotonic()) and self.state != "down":
            self.set_state("suspect", f"{self.breaker.failures} requests failed in a row, the last one: {reason}")

    async def post_json(self, path: str, body: dict[str, Any]) -> tuple[int, Any]:
        """Send a small request while holding a slot. Returns the status and the parsed JSON. Raises UpstreamError."""
        limit = self.backend.settings.first_byte_timeout_s
        payload = orjson.dumps(body)
        head = b"POST %b HTTP/1.1\r\n%bcontent-length: %d\r\n\r\n" % (path.encode(), self.head, len(payload))
        connection = await self.pool.exchange(head + payload, limit)
        try:
            return connection.status, orjson.loads(await connection.read_all(limit))
        except orjson.JSONDecodeError:
            raise UpstreamProtocolError(f"{path} did not answer with JSON") from None
        finally:
            self.pool.release(connection)


class Backend:
    """Interchangeable replicas of one engine.

    `routing`: thresholds for the load. `in_flight`: our requests on all its replicas. `draining`: replicas by URL that
    are no longer listed and still have requests. `models`, `context` and `capabilities` are kept while all replicas are
    down, so that an unknown model differs from one that is not running.
    """

    def __init__(self, name: str, settings: BackendSettings, routing: Routing) -> None:
        self.name = name
        self.dialect: Dialect = DIALECTS[settings.dialect]
        self.in_flight = 0
        self.replicas: tuple[Replica, ...] = ()
        self.draining: dict[str, Replica] = {}
        self.replicas_by_name: dict[str, Replica] = {}
        self._changed: set[Replica] = set()  # since the last snapshot
        self._indexes: dict[Replica, int] = {}  # in `replicas` and in the snapshots
        self._replica_snapshots: list[ReplicaSnapshot] = []
        self._ring: HashRing = ring_of(())
        self._snapshot: BackendSnapshot | None = None
        self.configure(settings, routing)
        self.reconcile([url for url in settings.urls if url.startswith("http://")])

    def configure(self, settings: BackendSettings, routing: Routing) -> None:
        """Apply new settings. The dialect must be the same."""
        self.settings, self.routing = settings, routing
        self.device_class = settings.device_class
        self.template = load_template(settings.chat_template) if settings.chat_template else None
        self.context = settings.context
        self.models = frozenset(settings.models)
        self.capabilities = self._with_overrides(self.dialect.capabilities)
        for replica in self.replicas:
            replica.configure()
        self.merge_infos()

    def reconcile(self, urls: Iterable[str], *, joined_later: bool = False) -> list[Replica]:
        """Make the replicas match `urls`. Returns the removed ones, which are draining.

        `joined_later`: new replicas start slowly.
        """
        current, wanted = {replica.url: replica for replica in self.replicas}, set(urls)
        if current.keys() == wanted:
            return []
        added = [
            self._undrain(url) or Replica(self, url, joined_later=joined_later)
            for url in sorted(wanted - current.keys())
        ]
        removed = [current[url] for url in sorted(current.keys() - wanted)]
        for replica in removed:
            replica.drain()
            self.draining[replica.url] = replica
        kept = [replica for replica in self.replicas if replica.url in wanted]
        self.replicas = tuple(sorted([*kept, *added], key=lambda replica: replica.name))
        self.replicas_by_name = {replica.name: replica for replica in self.replicas}
        self._indexes = {replica: index for index, replica in enumerate(self.replicas)}
        self._replica_snapshots = [replica.snapshot() for replica in self.replicas]
        self._ring = ring_of(tuple(self.replicas_by_name))
        self._snapshot = None
        return removed

    def _undrain(self, url: str) -> Replica | None:
        replica = self.draining.pop(url, None)
        if replica is not None:
            replica.undrain()
        return replica

    def served(self, alias: str) -> str:
        """The name under which the engine knows the public model name `alias`."""
        return self.settings.models.get(alias, alias)

    # what its replicas report

    def record_info(self, replica: Replica, info: ReplicaInfo) -> None:
        replica.record_info(info)
        self.merge_infos()

    def merge_infos(self) -> None:
        """Capabilities and context are those that all replicas have; the last known ones are kept until a replica
        reports again."""
        self._snapshot = None
        infos = [replica.info for replica in self.replicas if replica.info]
        if not infos:
            return
        if not self.settings.models:
            self.models = frozenset(name for info in infos for name in info.models)
        if self.settings.context is None:
            self.context = min((info.context for info in infos if info.context), default=None)
        reported = [info.capabilities for info in infos if info.capabilities is not None]
        self.capabilities = self._with_overrides(
            frozenset.intersection(*reported) if reported else self.dialect.capabilities
        )

    def _with_overrides(self, capabilities: frozenset[str]) -> frozenset[str]:
        """The settings `tools`, `images` and `embeddings` add or remove a capability; engines deny some."""
        for name in ("tools", "images", "embeddings"):
            setting = getattr(self.settings, name)
            if setting is not None:
                capabilities = capabilities | {name} if setting else capabilities - {name}
        return capabilities.difference(*(replica.missing for replica in self.replicas))

    # snapshots

    def replica_changed(self, replica: Replica) -> None:
        """Called at every change of a replica that its snapshot shows."""
        self._changed.add(replica)

    def snapshot(self) -> BackendSnapshot:
        """Cached until something changes. A change costs the snapshots of the changed replicas and one tuple of
        pointers: 4 µs with 1,000 replicas (bench/parts.py)."""
        if self._snapshot is not None and not self._changed:
            return self._snapshot
        for replica in self._changed:
            index = self._indexes.get(replica)
            if index is not None:  # else it is draining
                self._replica_snapshots[index] = replica.snapshot()
        self._changed.clear()
        self._snapshot = BackendSnapshot(
            self.name,
            self.device_class,
            self.models,
            self.capabilities,
            self.context,
            tuple(self._replica_snapshots),
            self.in_flight,
            self._ring,
        )
        return self._snapshot


class Fleet:
    """The backends in the order of their names."""

    def __init__(self, settings: Settings) -> None:
        self.settings = settings
        self._set_backends(Backend(name, each, settings.routing) for name, each in sorted(settings.backends.items()))

    def _set_backends(self, backends: Iterable[Backend]) -> None:
        self.backends = tuple(backends)
        self.backends_by_name = {backend.name: backend for backend in self.backends}

    def configure(self, settings: Settings) -> list[Backend]:
        """Apply new settings. A backend that is still configured keeps its replicas and its requests, unless its
        dialect changed. Returns the removed backends."""
        old, self.settings = {backend.name: backend for backend in self.backends}, settings
        kept = []
        for name, wanted in sorted(settings.backends.items()):
            backend = old.get(name)
            if backend is None or backend.settings.dialect != wanted.dialect:
                backend = Backend(name, wanted, settings.routing)
            else:
                backend.configure(wanted, settings.routing)
            kept.append(backend)
        self._set_backends(kept)
        return [backend for backend in old.values() if backend not in kept]

    def snapshot(self) -> FleetSnapshot:
        return FleetSnapshot(tuple([backend.snapshot() for backend in self.backends]))

    @property
    def replicas(self) -> Iterator[Replica]:
        return (replica for backend in self.backends for replica in backend.replicas)

    @property
    def models(self) -> list[str]:
        """Public names, the default first."""
        names = sorted({name for backend in self.backends for name in backend.models})
        default = self.settings.default_model
        return sorted(names, key=lambda name: name != default) if default else names

    @property
    def default_model(self) -> str | None:
        """The configured one, else the first name of the first backend that has any, GPU backends first."""
        if self.settings.default_model:
            return self.settings.default_model
        for backend in sorted(self.backends, key=lambda backend: backend.device_class != "gpu"):
            if backend.models:
                return min(backend.models)
        return None

    def close(self) -> None:
        for backend in self.backends:
            for replica in (*backend.replicas, *backend.draining.values()):
                replica.pool.close()
