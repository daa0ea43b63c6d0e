"""Which replicas there are: URLs that are written down, and names that are looked up again and again.

    http://HOST:PORT   one replica
    dns://HOST:PORT    one at each address of the name: compose's --scale, a headless Service of Kubernetes
    srv://NAME         one at each target and port of its SRV records (RFC 2782), as _http._tcp.vllm.prod.example

A name that does not exist has no replicas; while no name server answers, those that were known stay.
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

from xgen_proxy.fleet.backend import Backend, Fleet
from xgen_proxy.fleet.health import HealthMonitor

log = logging.getLogger("xgen_proxy.discovery")

LOOKUP_INTERVAL_S = 2.0  # a new replica is to be found, probed and used within 5 s
LOOKUP_TIMEOUT_S = 5.0  # a name server that does not answer must hold up neither the start nor other backends
NO_SUCH_NAME = (socket.EAI_NONAME, getattr(socket, "EAI_NODATA", socket.EAI_NONAME))


async def resolve(urls: Iterable[str]) -> list[str]:
    """The http:// URLs that `urls` stand for. Raises OSError and DNSException while the names cannot be looked up."""
    found = await asyncio.gather(*(_resolve(url) for url in urls))
    return [url for each in found for url in each]


async def _resolve(url: str) -> list[str]:
    parts = urlsplit(url)
    if parts.scheme == "dns":
        return await _addresses(parts.hostname or "", parts.port or 80)
    if parts.scheme == "srv":
        return await _services(parts.netloc)
    return [url]


async def _addresses(host: str, port: int) -> list[str]:
    """IPv4 where there is any: a pod with an address of each family is one replica, not two."""
    try:
        found = await asyncio.to_thread(socket.getaddrinfo, host, port, type=socket.SOCK_STREAM)
    except socket.gaierror as error:
        if error.errno in NO_SUCH_NAME:
            return []
        raise
    four = [f"http://{where[0]}:{port}" for family, _, _, _, where in found if family == socket.AF_INET]
    six = [f"http://[{where[0]}]:{port}" for family, _, _, _, where in found if family == socket.AF_INET6]
    return four or six


async def _services(name: str) -> list[str]:
    """Priority and weight are not heeded: the load of each decides."""
    try:
        answer = await dns.asyncresolver.resolve(name, "SRV", lifetime=LOOKUP_INTERVAL_S)
    except (dns.resolver.NXDOMAIN, dns.resolver.NoAnswer):
        return []
    return [f"http://{each.target.to_text(omit_final_dot=True)}:{each.port}" for each in answer]


class Discovery:
    def __init__(self, fleet: Fleet, monitor: HealthMonitor) -> None:
        self.fleet = fleet
        self.monitor = monitor
        self._seen: set[Backend] = set()
        self._silent: set[Backend] = set()
        self._looking: dict[Backend, asyncio.Task[None]] = {}
        self._due = asyncio.Event()
        self._task: asyncio.Task[None] | None = None

    def look_soon(self) -> None:
        self._due.set()

    async def start(self) -> None:
        self._look_at_each()
        await asyncio.gather(*self._looking.values())
        self._task = asyncio.create_task(self._watch())

    async def stop(self) -> None:
        tasks = [*self._looking.values(), *([self._task] if self._task else [])]
        for task in tasks:
            task.cancel()
        await asyncio.gather(*tasks, return_exceptions=True)

    async def _watch(self) -> None:
        while True:
            with contextlib.suppress(TimeoutError):
                async with asyncio.timeout(LOOKUP_INTERVAL_S):
                    await self._due.wait()
            self._due.clear()
            self._look_at_each()

    def _look_at_each(self) -> None:
        """Each by itself: one whose name takes long to look up holds up no other."""
        self._seen &= set(self.fleet.backends)
        for backend in self.fleet.backends:
            if backend not in self._looking:
                task = self._looking[backend] = asyncio.create_task(self._look(backend))
                task.add_done_callback(partial(self._looked, backend))

    def _looked(self, backend: Backend, _: asyncio.Task[None]) -> None:
        del self._looking[backend]

    async def _look(self, backend: Backend) -> None:
        try:
            await self._reconcile(backend)
        except Exception:
            log.exception("looking up the names of %s", backend.name)

    async def _reconcile(self, backend: Backend) -> None:
        try:
            async with asyncio.timeout(LOOKUP_TIMEOUT_S):
                urls = await resolve(backend.settings.urls)
        except (OSError, dns.exception.DNSException) as error:
            if backend not in self._silent:
                log.warning("%s: its names cannot be looked up, its replicas stay: %r", backend.name, error)
            self._silent.add(backend)
            return
        self._silent.discard(backend)
        if backend not in self.fleet.backends:
            return  # new settings have taken it away meanwhile
        self.monitor.reconcile(backend, urls, joined_later=backend in self._seen)
        self._seen.add(backend)
