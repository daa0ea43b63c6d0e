"""Watches the memory of all replicas: tells the log what changed, and relieves engines that can be.

The KV cache is read with every scrape of the load. RAM is read here, only for replicas at a loopback address.
"""

from __future__ import annotations

import asyncio
import contextlib
import logging
import time
from collections.abc import Callable

import orjson

from xgen_proxy.config.memory_guard import MemoryGuard
from xgen_proxy.errors import UpstreamError
from xgen_proxy.fleet.admission import Admission
from xgen_proxy.fleet.backend import Fleet
from xgen_proxy.fleet.memory.pressure import MemoryPressure
from xgen_proxy.fleet.memory.process import is_local
from xgen_proxy.fleet.memory.ram import LocalRooms
from xgen_proxy.fleet.replica import Replica

log = logging.getLogger("xgen_proxy.memory")

RELIEF_INTERVAL_S = 60.0  # between two of the same replica; a reset costs it every cached prompt
WORDS = ("takes as much work as before", "takes less work", "takes no new work while another replica can do it")


class MemoryWatch:
    """`on_relief`: called with backend, replica and result each time that a replica was asked for relief."""

    def __init__(self, fleet: Fleet, admission: Admission, on_relief: Callable[[str, str, str], None]) -> None:
        self.fleet = fleet
        self.admission = admission
        self._on_relief = on_relief
        self._rooms = LocalRooms()
        self._levels: dict[Replica, int] = {}  # logged last
        self._due: set[Replica] = set()  # to be relieved as soon as nothing runs there
        self._relieved_at: dict[Replica, float] = {}
        self._cannot: set[Replica] = set()  # they have no such route

    @property
    def settings(self) -> MemoryGuard:
        return self.fleet.settings.memory_guard

    def forget(self, replica: Replica) -> None:
        """It is down, or gone for good. It may come back as another process, with other flags."""
        self._levels.pop(replica, None)
        self._relieved_at.pop(replica, None)
        self._due.discard(replica)
        self._cannot.discard(replica)

    async def observe_scrape(self, replica: Replica) -> None:
        """Its scrape was just recorded."""
        if self.settings.enabled:
            args = replica.scraped, replica.in_flight, replica.full_capacity, self.settings, time.monotonic()
            replica.memory.observe_scrape(*args)
        elif replica.pressure is not None:
            replica.memory = MemoryPressure()
        self._tell(replica)
        if replica in self._due and _is_idle(replica):
            await self._relieve(replica)

    async def run(self) -> None:
        """Reads RAM for as long as the proxy runs."""
        while True:
            await self.read_ram()
            await asyncio.sleep(self.fleet.settings.scrape_interval_s)

    async def read_ram(self) -> None:
        """In a thread, since files and the search for processes block."""
        local = [replica for replica in self.fleet.replicas if replica.answers and is_local(replica.pool.host)]
        if not local or not self.settings.enabled:
            return
        rooms = await asyncio.to_thread(self._rooms.read, [replica.pool.port for replica in local])
        for replica in local:
            if replica.answers:  # else it went down meanwhile, and is forgotten
                args = replica.in_flight, replica.full_capacity, self.settings, time.monotonic()
                replica.memory.observe_ram(rooms.get(replica.pool.port), *args)
                self._tell(replica)
                self.admission.dispatch(replica)

    def _tell(self, replica: Replica) -> None:
        replica.record_pressure()
        before, level = self._levels.get(replica, 0), replica.memory.level
        if level == before:
            return
        self._levels[replica] = level
        pressure = replica.pressure
        say = log.warning if level > before else log.info
        say("%s %s: %s", replica.name, WORDS[level], pressure.reason if pressure else "memory: enough again")
        if level > before == 0 and self.settings.relief != "none" and replica.dialect.relief_paths:
            self._due.add(replica)
        elif level == 0:
            self._due.discard(replica)

    # relief

    async def _relieve(self, replica: Replica) -> None:
        """Once for each time that memory ran short."""
        self._due.discard(replica)
        path = replica.dialect.relief_paths.get(self.settings.relief)
        now = time.monotonic()
        recently = now - self._relieved_at.get(replica, -RELIEF_INTERVAL_S) < RELIEF_INTERVAL_S
        if path is None or replica in self._cannot or recently:
            return
        self._relieved_at[replica] = now
        result = await self._ask(replica, path)
        self._on_relief(replica.backend_name, replica.name, result)
        if result == "missing":
            self._cannot.add(replica)
            log.warning(
                "%s has no %s, so it is not asked again before a restart; vLLM needs VLLM_SERVER_DEV_MODE=1",
                replica.name,
                path,
            )
        else:
            log.info("%s was asked for %s: %s", replica.name, path, result)

    async def _ask(self, replica: Replica, path: str) -> str:
        try:
            status, answer = await replica.ask(path, {}, timeout_s=self.fleet.settings.scrape_timeout_s)
        except UpstreamError:
            return "failed"
        if status in (404, 405):
            return "missing"
        with contextlib.suppress(orjson.JSONDecodeError):
            if orjson.loads(answer) == {"success": False}:
                return "refused"  # something has begun to run
        return "done" if status == 200 else "failed"


def _is_idle(replica: Replica) -> bool:
    scraped = replica.scraped
    return not replica.in_flight and scraped is not None and not scraped.running and not scraped.waiting
