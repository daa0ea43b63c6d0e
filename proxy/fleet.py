"""The backends and their replicas: what is configured, what was learnt of them, and what they are doing now."""

from __future__ import annotations

import asyncio
import time
from collections.abc import Iterable
from typing import Literal
from urllib.parse import urlsplit

from proxy.breaker import Breaker
from proxy.dialects import DIALECTS, Dialect, Probe
from proxy.load import Load, LoadParts, load_of
from proxy.ring import Ring
from proxy.settings import BackendSettings, Settings
from proxy.template import load_template
from proxy.upstream import Pool

State = Literal["starting", "up", "suspect", "down", "leaving"]


class Replica:
    """One server process.

    `state`: starting (never seen), up, suspect (answers looks but fails requests: its breaker is not closed), down
    (does not answer), leaving (no longer listed: it ends what it began). `in_flight`: requests of ours that hold one
    of its slots; only hold() and let_go() change it. `late`: it came when others were there already.
    """

    def __init__(self, backend: Backend, url: str, *, late: bool = False) -> None:
        parts = urlsplit(url)
        self.backend = backend
        self.url = url
        self.name = f"{backend.name}@{parts.netloc}"
        self.late = late
        self.pool = Pool(parts.hostname or "", parts.port or 80, connect_timeout_s=backend.settings.connect_timeout_s)
        self.state: State = "starting"
        self.why = "not seen yet"
        self.since = time.monotonic()
        self.in_flight = 0
        self.emptied = asyncio.Event()
        self.scraped: Load | None = None
        self.probe: Probe | None = None
        self.breaker = Breaker()
        self.heard()
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
    def room(self) -> int:
        """How many requests it may have at once now."""
        slots, now = self.slots, self.open_slots
        return now if now < slots else slots + self.backend.dialect.margin

    @property
    def has_room(self) -> bool:
        return self.in_flight < self.room

    def hold(self) -> None:
        self.in_flight += 1
        self.backend.in_flight += 1

    def let_go(self) -> None:
        self.in_flight -= 1
        self.backend.in_flight -= 1
        if not self.in_flight:
            self.emptied.set()

    def leave(self) -> None:
        self.turn("leaving", "no longer listed")
        self.emptied.clear()

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

    def turn(self, state: State, why: str) -> bool:
        """Returns whether the state changed. One that is leaving does so until it is listed again."""
        if self.state == "leaving":
            return False
        changed = state != self.state
        if changed:
            self.since = time.monotonic()
        self.state, self.why = state, why
        return changed

    def heard(self) -> None:
        """It has said something."""
        self.pool.heard = time.monotonic()

    def succeeded(self) -> None:
        self.breaker.succeeded()

    def failed(self, why: str) -> None:
        """A request failed here though a connection was made: a replica that only fails is left alone for a while."""
        if self.breaker.failed(time.monotonic()) and self.state != "down":
            self.turn("suspect", f"{self.breaker.failures} requests failed in a row, the last one: {why}")

    def doubted(self, why: str) -> None:
        """It answers looks, but gets no requests before it has answered a probe, which is due at once."""
        self.turn("suspect", why)
        self.breaker.doubt()

    def returned(self, why: str) -> None:
        """It was down or suspect, or is new, and works."""
        if self.late or self.state != "starting":
            self.breaker.close(time.monotonic())
        self.heard()
        self.turn("up", why)


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
        self.leaving: dict[str, Replica] = {}
        self.ring: Ring[Replica] = Ring(())
        self.configure(settings, shared)
        self.settle([url for url in settings.urls if url.startswith("http://")])

    def configure(self, settings: BackendSettings, shared: Settings) -> None:
        """`settings.dialect` is the same as ever: another one is another backend."""
        self.settings, self.shared = settings, shared
        self.path = settings.path
        self.template = load_template(settings.chat_template) if settings.chat_template else None
        self.context = settings.context
        self.models = frozenset(settings.models)
        self.can = self._can(self.dialect.can)
        for replica in self.replicas:
            replica.configure()
        self._know()

    def settle(self, urls: Iterable[str], *, late: bool = False) -> list[Replica]:
        """Its replicas are those at `urls` from now on. Returns those that go, each to be ended once it holds nothing.
        `late`: who comes is given work slowly."""
        now, wanted = {replica.url: replica for replica in self.replicas}, set(urls)
        if now.keys() == wanted:
            return []
        come = [self._returning(url) or Replica(self, url, late=late) for url in sorted(wanted - now.keys())]
        gone = [now[url] for url in sorted(now.keys() - wanted)]
        for replica in gone:
            replica.leave()
            self.leaving[replica.url] = replica
        stay = [replica for replica in self.replicas if replica.url in wanted]
        self.replicas = tuple(sorted([*stay, *come], key=lambda replica: replica.name))
        self.ring = Ring(self.replicas)
        return gone

    def _returning(self, url: str) -> Replica | None:
        replica = self.leaving.pop(url, None)
        if replica is not None:
            replica.state, replica.why = "starting", "listed again"
        return replica

    def _can(self, base: frozenset[str]) -> frozenset[str]:
        for need in ("tools", "images", "embeddings"):
            said = getattr(self.settings, need)
            if said is not None:
                base = base | {need} if said else base - {need}
        return base

    def served(self, alias: str) -> str:
        return self.settings.models.get(alias, alias)

    def learn(self, replica: Replica, probe: Probe) -> None:
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
        can = [each.can for each in probes if each.can is not None]
        self.can = self._can(frozenset.intersection(*can) if can else self.dialect.can)


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
        for backend in sorted(self.backends, key=lambda backend: backend.path != "gpu"):
            if backend.models:
                return min(backend.models)
        return None

    def close(self) -> None:
        for backend in self.backends:
            for replica in (*backend.replicas, *backend.leaving.values()):
                replica.pool.close()
