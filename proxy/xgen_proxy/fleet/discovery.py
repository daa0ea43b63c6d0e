"""Which replicas there are: URLs from the settings, with host names looked up periodically.

    http://HOST:PORT   one replica
    dns://HOST:PORT    one per address of the name: compose's --scale, a headless Service of Kubernetes
    srv://NAME         one per target and port of its SRV records (RFC 2782), as _http._tcp.vllm.prod.example

A name that does not exist has no replicas. While no name server answers, the known replicas are kept.
"""

from __future__ import annotations

import asyncio
import contextlib
import logging
import socket
from collections.abc import Iterable
from functools import partial
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
LOOKUP_TIMEOUT_S = 5.0  # a name server that does not answer must not delay the start or other backends
NO_SUCH_NAME = (socket.EAI_NONAME, getattr(socket, "EAI_NODATA", socket.EAI_NONAME))


# A name server may drop one question. Asking again soon spares the replicas another interval without news.
ask_again = retry(
    retry=retry_if_exception_type((socket.gaierror, dns.exception.DNSException)),
    stop=stop_after_attempt(3),
    wait=wait_random_exponential(multiplier=0.1, max=0.5),
    reraise=True,
)


async def resolve(urls: Iterable[str]) -> list[str]:
    """The http:// URLs of all replicas. Raises OSError and DNSException if a lookup fails."""
    found = await asyncio.gather(*(_resolve(url) for url in urls))
    return [url for each in found for url in each]


async def _resolve(url: str) -> list[str]:
    parts = urlsplit(url)
    if parts.scheme == "dns":
        return await _addresses(parts.hostname or "", parts.port or 80)
    if parts.scheme == "srv":
        return await _services(parts.netloc)
    return [url]


@ask_again
async def _addresses(host: str, port: int) -> list[str]:
    """IPv4 if there is any: a pod with an address of each family is one replica, not two."""
    try:
        found = await asyncio.to_thread(socket.getaddrinfo, host, port, type=socket.SOCK_STREAM)
    except socket.gaierror as error:
        if error.errno in NO_SUCH_NAME:
            return []
        raise
    ipv4 = [f"http://{address[0]}:{port}" for family, _, _, _, address in found if family == socket.AF_INET]
    ipv6 = [f"http://[{address[0]}]:{port}" for family, _, _, _, address in found if family == socket.AF_INET6]
    return ipv4 or ipv6


@ask_again
async def _services(name: str) -> list[str]:
    """Ignores priority and weight: the load of each replica decides."""
    try:
        answer = await dns.asyncresolver.resolve(name, "SRV", lifetime=LOOKUP_INTERVAL_S)
    except (dns.resolver.NXDOMAIN, dns.resolver.NoAnswer):
        return []
    return [f"http://{record.target.to_text(omit_final_dot=True)}:{record.port}" for record in answer]


class Discovery:
    """Looks the names of every backend up again and again, and hands the replicas found to the health monitor."""

    def __init__(self, fleet: Fleet, monitor: HealthMonitor) -> None:
        self.fleet = fleet
        self.monitor = monitor
        self._resolved: set[Backend] = set()  # replicas that they gain from now on joined later
        self._failing: set[Backend] = set()  # their last lookup failed, which was logged
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
            self._lookup_all()

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
                urls = await resolve(backend.settings.urls)
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
