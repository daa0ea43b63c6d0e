"""The backends and their replicas: what is configured, what was learnt of them, and what they are doing now."""

from __future__ import annotations

import asyncio
import time
from collections.abc import Iterable
from typing import Any, Literal
from urllib.parse import urlsplit

import orjson

from xgen_proxy.config.settings import BackendSettings, Settings
from xgen_proxy.dialects.backend_request import ReplicaInfo
from xgen_proxy.dialects.dialect import Dialect
from xgen_proxy.dialects.llama_cpp_python.chat_template import load_template
from xgen_proxy.dialects.registry import DIALECTS
from xgen_proxy.errors import UpstreamProtocolError
from xgen_proxy.fleet.circuit_breaker import CircuitBreaker
from xgen_proxy.fleet.hash_ring import HashRing
from xgen_proxy.fleet.load import Load, LoadParts, load_of
from xgen_proxy.request.features import Json
from xgen_proxy.upstream import Pool

State = Literal["starting", "up", "suspect", "down", "draining"]


class Replica:
    """One server process.

    `state`: starting (never seen), up, suspect (answers looks but fails requests: its breaker is not closed), down
    (does not answer), leaving (no longer listed: it ends what it began). `in_flight`: requests of ours that hold one
    of its slots; only hold() and let_go() change it. `late`: it came when others were there already.
    """

    def __init__(self, backend: Backend, url: str, *, joined_later: bool = False) -> None:
        parts = urlsplit(url)
        self.backend = backend
        self.url = url
        self.name = f"{backend.name}@{parts.netloc}"
        self.joined_later = joined_later
        self.pool = Pool(parts.hostname or "", parts.port or 80, connect_timeout_s=backend.settings.connect_timeout_s)
        self.state: State = "starting"
        self.reason = "not seen yet"
        self.since = time.monotonic()
        self.in_flight = 0
        self.drained = asyncio.Event()
        self.scraped: Load | None = None
        self.probe: ReplicaInfo | None = None
        self.breaker = CircuitBreaker()
        self.record_activity()
        self.configure()

    def configure(self) -> None:
        """Takes what its backend's settings say now."""
        self.pool.connect_timeout_s = self.backend.settings.connect_timeout_s
        self.head = self._head()

    def _head(self) -> bytes:
        """The request headers that are the same for every request; hop-by-hop and client headers are never copied."""
        key = self.backend.settings.api_key
        lines = [
            f"host: {urlsplit(self.url).netloc}",
            "content-type: application/json",
            "accept: application/json, text/event-stream",
        ]
        if key is not None:
            lines.append(f"authorization: Bearer {key.get_secret_value()}")
        return ("\r\n".join(lines) + "\r\n").encode()

    @property
    def up(self) -> bool:
        return self.state == "up"

    @property
    def slots(self) -> int:
        reported = self.probe.slots if self.probe else None
        return self.backend.settings.slots or reported or self.backend.dialect.slots

    @property
    def open_slots(self) -> int:
        """After a return or a failure its slots are given out slowly."""
        share = self.breaker.share(time.monotonic())
        return self.slots if share == 1.0 else max(1, int(self.slots * share))

    @property
    def capacity(self) -> int:
        """How many requests it may have at once now."""
        slots, now = self.slots, self.open_slots
        return now if now < slots else slots + self.backend.dialect.overcommit

    @property
    def has_capacity(self) -> bool:
        return self.in_flight < self.capacity

    def acquire(self) -> None:
        self.in_flight += 1
        self.backend.in_flight += 1

    def release(self) -> None:
        self.in_flight -= 1
        self.backend.in_flight -= 1
        if not self.in_flight:
            self.drained.set()

    def drain(self) -> None:
        self.set_state("draining", "no longer listed")
        self.drained.clear()

    @property
    def load_parts(self) -> LoadParts:
        shared = self.backend.shared
        return load_of(
            in_flight=self.in_flight,
            slots=self.open_slots,
            scraped=self.scraped,
            now=time.monotonic(),
            stale_after_s=shared.stale_after_s,
            routing=shared.routing,
        )

    @property
    def load(self) -> float:
        return self.load_parts.total

    def set_state(self, state: State, why: str) -> bool:
        """Returns whether the state changed. One that is leaving does so until it is listed again."""
        if self.state == "draining":
            return False
        changed = state != self.state
        if changed:
            self.since = time.monotonic()
        self.state, self.reason = state, why
        return changed

    def record_activity(self) -> None:
        """It has said something."""
        self.pool.last_activity = time.monotonic()

    async def post_json(self, path: str, body: Json) -> tuple[int, Any]:
        """Asks the replica a small question, while a slot of it is held. Returns (status, JSON). Raises UpstreamError."""
        limit = self.backend.settings.first_byte_timeout_s
        payload = orjson.dumps(body)
        start = b"POST %b HTTP/1.1\r\n%b" % (path.encode(), self.head)
        connection = await self.pool.exchange(b"%bcontent-length: %d\r\n\r\n%b" % (start, len(payload), payload), limit)
        try:
            return connection.status, orjson.loads(await connection.read_all(limit))
        except orjson.JSONDecodeError:
            raise UpstreamProtocolError(f"{path} did not answer with JSON") from None
        finally:
            self.pool.release(connection)

    def succeeded(self) -> None:
        self.breaker.succeeded()

    def failed(self, why: str) -> None:
        """A request failed here though a connection was made: a replica that only fails is left alone for a while."""
        if self.breaker.failed(time.monotonic()) and self.state != "down":
            self.set_state("suspect", f"{self.breaker.failures} requests failed in a row, the last one: {why}")

    def mark_suspect(self, why: str) -> None:
        """It answers looks, but gets no requests before it has answered a probe, which is due at once."""
        self.set_state("suspect", why)
        self.breaker.doubt()

    def mark_up(self, why: str) -> None:
        """It was down or suspect, or is new, and works."""
        if self.joined_later or self.state != "starting":
            self.breaker.close(time.monotonic())
        self.record_activity()
        self.set_state("up", why)


class Backend:
    """Interchangeable replicas of one engine. What it knows of models, context and
    capabilities is kept when the replicas are down, so that "does not exist" and "not running now" stay apart.

    `shared`: the settings that are not of one backend. `in_flight`: of all its replicas. `leaving`: by URL, replicas
    that are no longer listed and still have something to end.
    """

    def __init__(self, name: str, settings: BackendSettings, shared: Settings) -> None:
        self.name = name
        self.dialect: Dialect = DIALECTS[settings.dialect]
        self.in_flight = 0
        self.replicas: tuple[Replica, ...] = ()
        self.draining: dict[str, Replica] = {}
        self.ring: HashRing[Replica] = HashRing(())
        self.configure(settings, shared)
        self.reconcile([url for url in settings.urls if url.startswith("http://")])

    def configure(self, settings: BackendSettings, shared: Settings) -> None:
        """`settings.dialect` is the same as ever: another one is another backend."""
        self.settings, self.shared = settings, shared
        self.device_class = settings.device_class
        self.template = load_template(settings.chat_template) if settings.chat_template else None
        self.context = settings.context
        self.models = frozenset(settings.models)
        self.capabilities = self._can(self.dialect.capabilities)
        for replica in self.replicas:
            replica.configure()
        self._know()

    def reconcile(self, urls: Iterable[str], *, joined_later: bool = False) -> list[Replica]:
        """Its replicas are those at `urls` from now on. Returns those that go, each to be ended once it holds nothing.
        `late`: who comes is given work slowly."""
        now, wanted = {replica.url: replica for replica in self.replicas}, set(urls)
        if now.keys() == wanted:
            return []
        come = [
            self._returning(url) or Replica(self, url, joined_later=joined_later) for url in sorted(wanted - now.keys())
        ]
        gone = [now[url] for url in sorted(now.keys() - wanted)]
        for replica in gone:
            replica.drain()
            self.draining[replica.url] = replica
        stay = [replica for replica in self.replicas if replica.url in wanted]
        self.replicas = tuple(sorted([*stay, *come], key=lambda replica: replica.name))
        self.ring = HashRing(self.replicas)
        return gone

    def _returning(self, url: str) -> Replica | None:
        replica = self.draining.pop(url, None)
        if replica is not None:
            replica.state, replica.reason = "starting", "listed again"
        return replica

    def _can(self, base: frozenset[str]) -> frozenset[str]:
        for need in ("tools", "images", "embeddings"):
            said = getattr(self.settings, need)
            if said is not None:
                base = base | {need} if said else base - {need}
        return base

    def served(self, alias: str) -> str:
        return self.settings.models.get(alias, alias)

    def learn(self, replica: Replica, probe: ReplicaInfo) -> None:
        replica.probe = probe
        self._know()

    def _know(self) -> None:
        """Replicas are interchangeable: the backend can do what each of them can. What it knew of those that are gone
        holds until another one tells."""
        probes = [replica.probe for replica in self.replicas if replica.probe]
        if not probes:
            return
        if not self.settings.models:
            self.models = frozenset(name for each in probes for name in each.models)
        if self.settings.context is None:
            self.context = min((each.context for each in probes if each.context), default=None)
        capabilities = [each.capabilities for each in probes if each.capabilities is not None]
        self.capabilities = self._can(
            frozenset.intersection(*capabilities) if capabilities else self.dialect.capabilities
        )


class Fleet:
    def __init__(self, settings: Settings) -> None:
        self.settings = settings
        self.backends = tuple(Backend(name, backend, settings) for name, backend in sorted(settings.backends.items()))

    def configure(self, settings: Settings) -> list[Backend]:
        """Takes new settings; who is there already and is still wanted stays as it is. Returns the backends that are no
        longer there, all of their replicas leaving."""
        old, self.settings = {backend.name: backend for backend in self.backends}, settings
        kept = []
        for name, wanted in sorted(settings.backends.items()):
            backend = old.get(name)
            if backend is None or backend.settings.dialect != wanted.dialect:
                backend = Backend(name, wanted, settings)
            else:
                backend.configure(wanted, settings)
            kept.append(backend)
        self.backends = tuple(kept)
        return [backend for backend in old.values() if backend not in kept]

    @property
    def replicas(self) -> Iterable[Replica]:
        return (replica for backend in self.backends for replica in backend.replicas)

    @property
    def models(self) -> list[str]:
        """Public names, the default first."""
        names = sorted({name for backend in self.backends for name in backend.models})
        default = self.settings.default_model
        return sorted(names, key=lambda name: name != default) if default else names

    @property
    def default_model(self) -> str | None:
        """The configured one, else the first name of the first backend that has one, the GPU path first."""
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
