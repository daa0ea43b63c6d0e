"""Which replicas there are: URLs from the settings, with host names looked up periodically.

    http://HOST:PORT   one replica
    dns://HOST:PORT    one per address of the name: compose's --scale, a headless Service of Kubernetes
    srv://NAME         one per target and port of its SRV records (RFC 2782), as _http._tcp.vllm.prod.example

A name that does not exist has no replicas. While no name server answers, the known replicas are kept. Names are looked
up without threads: getaddrinfo() in a thread cannot be cancelled, so that one name that hangs would take them all.
"""

from __future__ import annotations

import asyncio
import contextlib
import ipaddress
import logging
from collections.abc import Sequence
from functools import partial
from pathlib import Path
from urllib.parse import urlsplit

import dns.asyncresolver
import dns.exception
import dns.resolver
from tenacity import retry, retry_if_exception_type, stop_after_attempt, wait_random_exponential

from xgen_proxy.fleet.backend import Backend, Fleet
from xgen_proxy.fleet.health import HealthMonitor
from xgen_proxy.supervision import supervise

log = logging.getLogger("xgen_proxy.discovery")

LOOKUP_INTERVAL_S = 2.0  # a new replica should be found, checked and used within 5 s
LOOKUP_TIMEOUT_S = 5.0  # for all lookups of a backend together: they must delay neither the start nor other backends
MAX_ADDRESSES = 512  # of one name; a hash ring of that many takes 25 ms at each change, and each gets a check a second
HOSTS_FILE = Path("/etc/hosts")  # which Docker's extra_hosts and Kubernetes' hostAliases write


@retry(  # a name server may fail once, and asking again soon spares the replicas another interval without news
    retry=retry_if_exception_type(dns.exception.DNSException),
    stop=stop_after_attempt(3),
    wait=wait_random_exponential(multiplier=0.1, max=0.5),
    reraise=True,
)
async def records(name: str, kind: str) -> list[str]:
    """Raises DNSException if no name server answers. A name that does not exist has no records."""
    try:
        answer = await dns.asyncresolver.resolve(name, kind, search=True, lifetime=LOOKUP_TIMEOUT_S)
    except (dns.resolver.NXDOMAIN, dns.resolver.NoAnswer):
        return []
    return [record.to_text() for record in answer]


async def resolve(url: str) -> list[str]:
    """The http:// URLs of the replicas behind one URL of the settings. Raises DNSException."""
    parts = urlsplit(url)
    if parts.scheme == "dns":
        return [f"http://{address}:{parts.port or 80}" for address in await addresses(parts.hostname or "")]
    if parts.scheme == "srv":  # priority and weight are ignored: the load of each replica decides
        found = [record.split() for record in await records(parts.netloc, "SRV")]
        return [f"http://{target.rstrip('.')}:{port}" for _, _, port, target in found]
    return [url]


async def addresses(host: str) -> list[str]:
    """IPv4 if there is any: a pod with an address of each family is one replica, not two. IPv6 in brackets."""
    found = [host] if is_address(host) else in_hosts_file(host)
    if not found:
        found = await records(host, "A") or await records(host, "AAAA")
    return [each for each in found if ":" not in each] or [f"[{each}]" for each in found]


def is_address(host: str) -> bool:
    with contextlib.suppress(ValueError):
        return bool(ipaddress.ip_address(host))
    return False


def in_hosts_file(host: str) -> list[str]:
    with contextlib.suppress(OSError):
        lines = [line.partition("#")[0].split() for line in HOSTS_FILE.read_text(errors="replace").splitlines()]
        return [line[0] for line in lines if host.lower() in map(str.lower, line[1:]) and is_address(line[0])]
    return []


class Discovery:
    """Looks the names of every backend up again and again, and hands the replicas found to the health monitor."""

    def __init__(self, fleet: Fleet, monitor: HealthMonitor) -> None:
        self.fleet = fleet
        self.monitor = monitor
        self._resolved: set[Backend] = set()  # replicas that they gain from now on joined later
        self._failing: set[Backend] = set()  # their last lookup failed, which was logged
        self._cut: set[str] = set()  # URLs with too many addresses, which was logged
        self._lookups: dict[Backend, asyncio.Task[None]] = {}
        self._due = asyncio.Event()
        self._task: asyncio.Task[None] | None = None

    def lookup_soon(self) -> None:
        """Do not wait for the interval to end, since the settings changed."""
        self._due.set()

    async def start(self) -> None:
        """Returns when each name was looked up once."""
        self._lookup_all()
        await asyncio.gather(*self._lookups.values())
        self._task = supervise("discovery", self._run)

    async def stop(self) -> None:
        tasks = [*self._lookups.values(), *([self._task] if self._task else [])]
        for task in tasks:
            task.cancel()
        await asyncio.gather(*tasks, return_exceptions=True)

    async def _run(self) -> None:
        while True:
            with contextlib.suppress(TimeoutError):
                async with asyncio.timeout(LOOKUP_INTERVAL_S):
                    await self._due.wait()
            self._due.clear()
            try:
                self._lookup_all()
            except Exception:
                log.exception("lookups")

    def _lookup_all(self) -> None:
        """One task per backend, so that a slow lookup delays no other backend."""
        self._resolved &= set(self.fleet.backends)
        for backend in self.fleet.backends:
            if backend not in self._lookups:
                task = self._lookups[backend] = asyncio.create_task(self._lookup(backend))
                task.add_done_callback(partial(self._lookup_done, backend))

    def _lookup_done(self, backend: Backend, _: asyncio.Task[None]) -> None:
        del self._lookups[backend]

    async def _lookup(self, backend: Backend) -> None:
        try:
            await self._reconcile(backend)
        except Exception:
            log.exception("lookup for %s", backend.name)

    async def _reconcile(self, backend: Backend) -> None:
        try:
            async with asyncio.timeout(LOOKUP_TIMEOUT_S):
                urls = await self._resolve_all(backend.settings.urls)
        except (OSError, dns.exception.DNSException) as error:
            if backend not in self._failing:
                log.warning("%s: its names cannot be looked up, so its replicas stay: %r", backend.name, error)
            self._failing.add(backend)
            return
        self._failing.discard(backend)
        if backend not in self.fleet.backends:
            return  # new settings removed it meanwhile
        self.monitor.reconcile(backend, urls, joined_later=backend in self._resolved)
        self._resolved.add(backend)

    async def _resolve_all(self, urls: Sequence[str]) -> list[str]:
        found = await asyncio.gather(*map(resolve, urls))
        return [each for url, replicas in zip(urls, found, strict=True) for each in self._limited(url, replicas)]

    def _limited(self, url: str, replicas: list[str]) -> list[str]:
        """The same ones at each lookup, in whatever order the name server lists them."""
        if len(replicas) <= MAX_ADDRESSES:
            return replicas
        if url not in self._cut:
            self._cut.add(url)
            log.warning("%s has %d addresses; only %d of them are used", url, len(replicas), MAX_ADDRESSES)
        return sorted(replicas)[:MAX_ADDRESSES]
