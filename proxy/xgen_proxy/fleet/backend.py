"""The live fleet: the backends, their replicas, and what is configured and known about them."""

from __future__ import annotations

from collections.abc import Iterable, Iterator

from xgen_proxy.config.fallback import Pair
from xgen_proxy.config.settings import BackendSettings, Routing, Settings
from xgen_proxy.dialects.backend_request import ReplicaInfo
from xgen_proxy.dialects.dialect import Dialect
from xgen_proxy.dialects.llama_cpp_python.chat_template import load_template
from xgen_proxy.dialects.registry import DIALECTS
from xgen_proxy.fleet.hash_ring import HashRing, ring_of
from xgen_proxy.fleet.replica import Replica
from xgen_proxy.fleet.snapshot import BackendSnapshot, FleetSnapshot, ReplicaSnapshot, Usable, usable_of


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
        self._usable: Usable | None = None  # of these snapshots
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
            replica.configure(settings, routing)
        self._merge_infos()

    def reconcile(self, urls: Iterable[str], *, joined_later: bool = False) -> list[Replica]:
        """Make the replicas match `urls`. Returns the removed ones, which are draining.

        `joined_later`: new replicas start slowly.
        """
        current, wanted = {replica.url: replica for replica in self.replicas}, set(urls)
        if current.keys() == wanted:
            return []
        added = [
            self._undrain(url) or self._new(url, joined_later=joined_later) for url in sorted(wanted - current.keys())
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
        self._usable = None
        self._ring = ring_of(tuple(self.replicas_by_name))
        self._merge_infos()  # what only a removed one served is gone
        return removed

    def _new(self, url: str, *, joined_later: bool) -> Replica:
        return Replica(
            self.name, url, self.dialect, self.settings, self.routing, self._replica_changed, joined_later=joined_later
        )

    def _undrain(self, url: str) -> Replica | None:
        replica = self.draining.pop(url, None)
        if replica is not None:
            replica.undrain()
        return replica

    def served(self, alias: str) -> str:
        """The name under which the engine knows the public model name `alias`."""
        return self.settings.models.get(alias, alias)

    # what its replicas report

    def record_info(self, replica: Replica, info: ReplicaInfo, missing: frozenset[str] = frozenset()) -> None:
        """`missing`: the capabilities that its engine says it lacks."""
        if info != replica.info:
            replica.missing = frozenset()  # of what it served before
        replica.missing |= missing
        replica.record_info(info)
        self._merge_infos()

    def lost_capability(self, replica: Replica, name: str) -> bool:
        """Its engine says that it was started without it; believed until it goes down or serves something else.

        Not of an engine with several models, of which the others may have it. Returns whether that is news.
        """
        if name in replica.missing or replica.swaps_models:
            return False
        replica.missing |= {name}
        self._merge_infos()
        return True

    def _merge_infos(self) -> None:
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
        """The settings `tools`, `images` and `embeddings` add or remove a capability. One that an engine denies is gone
        when all replicas have denied it: a request for it fails over to one that has not."""
        settings = self.settings
        for setting, names in (
            (settings.tools, {"tools", "forced_tool"}),
            (settings.images, {"images"}),
            (settings.embeddings, {"embeddings"}),
        ):
            if setting is not None:
                capabilities = capabilities | names if setting else capabilities - names
        denied = [replica.missing for replica in self.replicas]
        return capabilities - frozenset.intersection(*denied) if denied else capabilities

    # snapshots

    def _replica_changed(self, replica: Replica, in_flight: int) -> None:
        """`in_flight`: the change of its requests in flight."""
        self.in_flight += in_flight
        self._changed.add(replica)

    def snapshot(self) -> BackendSnapshot:
        """Cached until something changes. A change costs the snapshots of the changed replicas and one tuple of
        pointers: 4 µs with 1,000 replicas (bench/parts.py)."""
        if self._snapshot is not None and not self._changed:
            return self._snapshot
        for replica in self._changed:
            index = self._indexes.get(replica)
            if index is not None:  # else it is draining
                before, after = self._replica_snapshots[index], replica.snapshot()
                self._replica_snapshots[index] = after
                if (before.up, before.closed) != (after.up, after.closed):
                    self._usable = None
        self._changed.clear()
        if self._usable is None:
            self._usable = usable_of(self._replica_snapshots)
        self._snapshot = BackendSnapshot(
            self.name,
            self.device_class,
            self.models,
            self.capabilities,
            self.context,
            tuple(self._replica_snapshots),
            self.in_flight,
            self._ring,
            self._usable,
        )
        return self._snapshot


class Fleet:
    """The backends in the order of their names."""

    def __init__(self, settings: Settings) -> None:
        self.settings = settings
        self._different: frozenset[Pair] = frozenset()
        self.nearness = settings.fallback.nearness()
        self._set_backends(Backend(name, each, settings.routing) for name, each in sorted(settings.backends.items()))

    def _set_backends(self, backends: Iterable[Backend]) -> None:
        self.backends = tuple(backends)
        self.backends_by_name = {backend.name: backend for backend in self.backends}

    def configure(self, settings: Settings) -> list[Backend]:
        """Apply new settings. A backend that is still configured keeps its replicas and its requests, unless its
        dialect changed. Returns the removed backends."""
        old, self.settings = {backend.name: backend for backend in self.backends}, settings
        self.nearness = settings.fallback.nearness(self._different)
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

    def set_different(self, pairs: Iterable[Pair]) -> None:
        """The pairs of backends that serve different models under the same name."""
        pairs = frozenset(pairs)
        self._different = pairs | {(other, one, model) for one, other, model in pairs}
        self.nearness = self.settings.fallback.nearness(self._different)

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
                replica.close()
