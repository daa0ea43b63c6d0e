"""How short of memory a replica is: normal, reduced or closed. Does no I/O; the caller passes readings and the time.

    normal   takes all that its slots and its overcommit allow
    reduced  holds fewer requests: nine tenths of those that it ran when memory ran short
    closed   gets no new work while another replica can do it; otherwise it holds nine tenths again

Memory is short when the share in use is at a threshold in three readings in a row. One reading of a full wave of
requests says nothing. A preemption does: vLLM threw away a running request's KV cache and will compute it again. So the
first one reduces at once. A replica without requests of ours gets its limit once it has some and memory is still short
in three readings in a row. A replica is closed only while it holds no more than it may: before that, its requests need
time to end, and it gets no new ones anyway. Preemptions that go on lower a closed replica further, down to one request
where not even two fit. Short RAM says nothing about how many fit, since it may be taken by something else, so it leaves
at least an eighth of them: one at a time cost seven eighths of the throughput (bench/memory_guard.py).

It gets better step by step: first the level, then the number of requests, which grows as TCP's window does after a
loss. Without that, all waiting requests would enter at once and fill the cache again. A step takes three readings in a
row that are well below the threshold, and never less than a few seconds, so that the end of one wave and the beginning
of the next do not swing it. A minute below the threshold will do, too, so that no replica is held back for good. KV
cache and RAM each have their own level and limit, and the lower limit counts. https://www.rfc-editor.org/rfc/rfc5681
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
LEAST_OF_RAM = 8  # short RAM leaves at least one in so many of the requests that the replica may hold
GROWTH_S = 3.0  # between two steps by which the requests that it may hold grow again, by one or an eighth
SLOWLY_S = 60.0  # for a step when memory is not well below its threshold, or its share is unknown
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
    """The level of one kind of memory, and the limit that follows from it. `level` is an index of LEVELS. `lowers`: the
    last reading asks for a lower limit."""

    def __init__(self) -> None:
        self.level = 0
        self.limit: int | None = None
        self.lowers = False
        self._hot = self._cool = 0  # readings in a row that would make it worse, or better
        self._unlimited = 0  # readings in a row that found it short, with requests of ours and without a limit
        self._stepped_at = self._short_at = -math.inf

    def observe(
        self,
        share: float | None,
        enter: tuple[float, float],
        now: float,
        *,
        lost: bool = False,
        settled: bool = True,
        busy: bool = True,
    ) -> None:
        """`share`: in use; None: unknown. `enter`: the shares at which `reduced` and `closed` begin. `lost`: requests
        lost their memory since the last reading. `settled`: the replica holds no more than it may. Before that, it is
        too early to close it, or to lower its limit. `busy`: it holds requests of ours; else others took the memory."""
        used = math.nan if share is None else share  # which is neither over a threshold nor under it
        begins = enter[max(self.level, 1) - 1]
        full = lost or (self.level < 2 and used >= enter[self.level])
        short = lost or used >= begins
        unlimited = short and self.level > 0 and self.limit is None
        self._hot = self._hot + 1 if full and (self.level == 0 or settled) else 0
        self._cool = self._cool + 1 if used < begins - GAP and not lost else 0
        self._unlimited = self._unlimited + 1 if unlimited and busy and settled else 0
        if short:
            self._short_at = now
        worse = self._hot >= READINGS or (lost and self.level == 0)
        self.lowers = (worse or self._unlimited >= READINGS) and busy and settled
        if worse:
            self._move(min(self.level + 1, 2), now)
        elif self._is_better(now):
            self._step(now)

    def forget(self) -> None:
        """Nothing reports it any more. What it limited opens step by step."""
        self.level = 0

    def lower(self, held: int, least: int) -> None:
        """`held`: the requests of ours that had memory."""
        self.limit = max(1, least, int(KEPT * min(held, self.limit or held)))

    def _is_better(self, now: float) -> bool:
        pause = DWELL_S if self.level else GROWTH_S
        quickly = self._cool >= READINGS and now - self._stepped_at >= pause
        return quickly or now - max(self._short_at, self._stepped_at) >= SLOWLY_S

    def _step(self, now: float) -> None:
        if self.level:
            self._move(self.level - 1, now)
        elif self.limit is not None:
            self.limit += max(1, self.limit // 8)
            self._stepped_at = now

    def _move(self, level: int, now: float) -> None:
        self.level, self._stepped_at = level, now
        self._hot = self._cool = 0


class MemoryPressure:
    """What is known about one replica's memory. `pressure` is None while nothing holds the replica back.

    `in_flight`: our requests on the replica. `capacity`: as many as it may hold while memory is not short.
    """

    def __init__(self) -> None:
        self.pressure: Pressure | None = None
        self.kv, self.ram = Signal(), Signal()
        self._kv_words = self._ram_words = ""
        self._counted: float | None = None  # preemptions, at the last scrape
        self._preempted = 0  # since memory was last normal

    @property
    def level(self) -> int:
        return max(self.kv.level, self.ram.level)

    @property
    def limit(self) -> int | None:
        return min((each.limit for each in (self.kv, self.ram) if each.limit is not None), default=None)

    def observe_scrape(
        self, scrape: Scrape | None, in_flight: int, capacity: int, settings: MemoryGuard, now: float
    ) -> None:
        """An engine without a KV gauge has no such pressure, unless it counts preemptions; unknown is never full."""
        enter, settled = (settings.kv_reduce, settings.kv_close), self._is_settled(in_flight)
        share, count = (None, None) if scrape is None else (scrape.kv, scrape.preemptions)
        lost = self._newly_preempted(count)
        self._preempted = lost + (self._preempted if self.level else 0)
        if share is None and count is None:
            self.kv.forget()
        self.kv.observe(share, enter, now, lost=lost > 0, settled=settled, busy=in_flight > 0)
        preempted = f", {self._preempted} requests preempted" if self._preempted else ""
        self._kv_words = f"KV cache {'use unknown' if share is None else f'{share:.0%} used'}{preempted}"
        self._update(self.kv, _held(scrape, in_flight), 1, capacity)

    def observe_ram(self, room: Room | None, in_flight: int, capacity: int, settings: MemoryGuard, now: float) -> None:
        """`room`: the tightest that the replica's process lives in. None: unknown, which has no effect."""
        enter, settled = (settings.ram_reduce, settings.ram_close), self._is_settled(in_flight)
        if room is None:
            self.ram.forget()
        share = None if room is None else room.share
        self.ram.observe(share, enter, now, settled=settled, busy=in_flight > 0)
        self._ram_words = str(room)
        self._update(self.ram, in_flight, capacity // LEAST_OF_RAM, capacity)

    def _is_settled(self, in_flight: int) -> bool:
        return self.limit is None or in_flight <= self.limit

    def _newly_preempted(self, count: float | None) -> int:
        before, self._counted = self._counted, count
        return 0 if before is None or count is None else max(0, int(count - before))  # a restart begins at 0

    def _update(self, seen: Signal, held: int, least: int, capacity: int) -> None:
        """`seen`: the signal that was read. `held`: the requests of ours that had memory."""
        if seen.lowers:
            seen.lower(held, least)
        if seen.level == 0 and seen.limit is not None and seen.limit >= capacity:
            seen.limit = None
        self.pressure = self._described()

    def _described(self) -> Pressure | None:
        level, limit = LEVELS[self.level], self.limit
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
