"""How short of memory a replica is: normal, reduced or closed. Does no I/O; the caller passes readings and the time.

    normal   takes all that its slots and its overcommit allow
    reduced  holds fewer requests: nine tenths of those that it ran when memory ran short
    closed   gets no new work while another replica can do it; otherwise it holds nine tenths again

Memory is short when the share in use is at a threshold in three readings in a row. One reading of a full wave of
requests says nothing. A preemption does: vLLM threw away a running request's KV cache and will compute it again. So the
first one reduces at once. A replica is closed only while it holds no more than it may: before that, its requests need
time to end, and it gets no new ones anyway. Preemptions that go on lower a closed replica further, but never to one
request at a time: that cost seven eighths of the throughput (bench/memory_guard.py). It gets better when three readings
in a row are well below the threshold, and never within five seconds, so that the end of one wave and the beginning of
the next do not swing it.

Once memory is back to normal the number of requests grows step by step, as TCP's window does after a loss. Without
that, all waiting requests would enter at once and fill the cache again. https://www.rfc-editor.org/rfc/rfc5681
"""

from __future__ import annotations

import math
from typing import Literal, get_args

from xgen_proxy.config.memory_guard import MemoryGuard
from xgen_proxy.fleet.load import Scrape
from xgen_proxy.values import frozen

Level = Literal["normal", "reduced", "closed"]
LEVELS: tuple[Level, ...] = get_args(Level)

READINGS = 3  # in a row, to get worse or better
DWELL_S = 5.0  # that a level lasts before it gets better
GAP = 0.1  # below its threshold, for a level to get better
KEPT = 0.9  # of the requests that it held when memory ran short
GROWTH_S = 3.0  # between two steps by which the requests that it may hold grow again, by one or an eighth
MOST = 20 * 1024**3  # bytes of RAM that count: of a machine of 512 GiB, 95 % leave 25 GiB, which is plenty


@frozen
class Pressure:
    """`limit`: requests of ours that the replica may hold; None: as many as its slots and its overcommit allow.
    `reason`: for people."""

    level: Level
    limit: int | None
    reason: str

    def open_slots(self, slots: int) -> int:
        return slots if self.limit is None else min(self.limit, slots)


@frozen
class Room:
    """Bytes of RAM. `what`: whose they are, for people."""

    left: int
    size: int
    what: str

    @property
    def share(self) -> float:
        """The share in use, of the last MOST bytes."""
        size = min(self.size, MOST)
        return 1 - min(self.left, size) / size

    def __str__(self) -> str:
        return f"{self.left / 1024**3:.1f} of {self.size / 1024**3:.1f} GiB of {self.what} left"


class Signal:
    """The level of one kind of memory. `level` is an index of LEVELS. `worse`: the last reading made it worse, or found
    that its worst level is not enough."""

    def __init__(self) -> None:
        self.level = 0
        self.worse = False
        self._hot = self._cool = 0  # readings in a row that would make it worse, or better
        self._since = -math.inf

    def observe(
        self, share: float, enter: tuple[float, float], now: float, *, lost: bool = False, settled: bool = True
    ) -> None:
        """`enter`: the shares at which `reduced` and `closed` begin. `lost`: requests lost their memory since the last
        reading. `settled`: the replica holds no more than it may. Before that, it is too early to close it."""
        full = lost or (self.level < 2 and share >= enter[self.level])
        hot = full and (self.level == 0 or settled)
        cool = self.level > 0 and not lost and share < enter[self.level - 1] - GAP
        self._hot = self._hot + 1 if hot else 0
        self._cool = self._cool + 1 if cool else 0
        self.worse = self._hot >= READINGS or (lost and self.level == 0)
        if self.worse:
            self._move(min(self.level + 1, 2), now)
        elif self._cool >= READINGS and now - self._since >= DWELL_S:
            self._move(self.level - 1, now)

    def _move(self, level: int, now: float) -> None:
        self.level, self._since = level, now
        self._hot = self._cool = 0


class MemoryPressure:
    """What is known about one replica's memory. `pressure` is None while nothing holds the replica back.

    `in_flight`: our requests on the replica. `capacity`: as many as it may hold while memory is not short.
    """

    def __init__(self) -> None:
        self.pressure: Pressure | None = None
        self.kv, self.ram = Signal(), Signal()
        self._kv_words = self._ram_words = ""
        self._limit: int | None = None
        self._grown_at = -math.inf
        self._counted: float | None = None  # preemptions, at the last scrape
        self._preempted = 0  # since memory was last normal

    @property
    def level(self) -> int:
        return max(self.kv.level, self.ram.level)

    def observe_scrape(
        self, scrape: Scrape | None, in_flight: int, capacity: int, settings: MemoryGuard, now: float
    ) -> None:
        """An engine without a KV gauge has no such pressure; unknown is never full."""
        before = self.level
        if scrape is None or (scrape.kv is None and scrape.preemptions is None):
            self.kv, self._counted = Signal(), None
            share = 0.0
        else:
            share = scrape.kv or 0.0
            lost = self._newly_preempted(scrape.preemptions)
            self._preempted = lost + (self._preempted if before else 0)
            self.kv.observe(
                share, (settings.kv_reduce, settings.kv_close), now, lost=lost > 0, settled=self._settled(in_flight)
            )
            preempted = f", {self._preempted} requests preempted" if self._preempted else ""
            self._kv_words = f"KV cache {share:.0%} used{preempted}"
        self._update(self.kv, in_flight, _held(scrape, in_flight), capacity, share < settings.kv_reduce - GAP, now)

    def observe_ram(self, room: Room | None, in_flight: int, capacity: int, settings: MemoryGuard, now: float) -> None:
        """`room`: the tightest that the replica's process lives in. None: unknown, which has no effect."""
        share = 0.0
        if room is None:
            self.ram = Signal()
        else:
            share = room.share
            enter = settings.ram_reduce, settings.ram_close
            self.ram.observe(share, enter, now, settled=self._settled(in_flight))
            self._ram_words = str(room)
        self._update(self.ram, in_flight, in_flight, capacity, share < settings.ram_reduce - GAP, now)

    def _settled(self, in_flight: int) -> bool:
        return self._limit is None or in_flight <= self._limit

    def _newly_preempted(self, count: float | None) -> int:
        before, self._counted = self._counted, count
        return 0 if before is None or count is None else max(0, int(count - before))  # a restart begins at 0

    def _update(self, seen: Signal, in_flight: int, held: int, capacity: int, calm: bool, now: float) -> None:
        """`seen`: the signal that was read. `held`: the requests of ours that had memory. A limit that was not reached
        yet is not lowered again: requests that run need time to end."""
        if seen.worse and in_flight and self._settled(in_flight):  # else it was another proxy's load
            self._limit = max(1, int(KEPT * min(held, self._limit or held)))
        if self.level or not calm:
            self._grown_at = now
        elif self._limit is not None and now - self._grown_at >= GROWTH_S:
            self._limit += max(1, self._limit // 8)
            self._grown_at = now
        if self.level == 0 and self._limit is not None and self._limit >= capacity:
            self._limit = None
        self.pressure = self._described()

    def _described(self) -> Pressure | None:
        level, limit = LEVELS[self.level], self._limit
        if level == "normal":
            reason = f"memory: enough again, opening step by step, {limit} requests now"
            return None if limit is None else Pressure(level, limit, reason)
        words = [(self.kv, self._kv_words), (self.ram, self._ram_words)]
        return Pressure(level, limit, "memory: " + ", ".join(each for signal, each in words if signal.level))


def _held(scrape: Scrape | None, in_flight: int) -> int:
    """Our part of the requests in the engine's batch. Those that it keeps waiting have no KV cache."""
    if scrape is None or scrape.running is None:
        return in_flight
    ours = min(1.0, scrape.ours / max(1.0, scrape.running + (scrape.waiting or 0)))
    return int(scrape.running * ours)
