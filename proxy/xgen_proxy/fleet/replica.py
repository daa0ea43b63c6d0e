"""One server process of a backend: what is known about it, and what it is doing now."""

from __future__ import annotations

import asyncio
import math
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any, Literal
from urllib.parse import urlsplit

import orjson

from xgen_proxy.config.settings import BackendSettings, Routing
from xgen_proxy.dialects.backend_request import ReplicaInfo
from xgen_proxy.dialects.dialect import Dialect
from xgen_proxy.errors import UpstreamProtocolError, UpstreamTimeoutError
from xgen_proxy.fleet.circuit_breaker import CircuitBreaker
from xgen_proxy.fleet.load import LearntSlots, LoadParts, Scrape
from xgen_proxy.fleet.memory.pressure import MemoryPressure, Pressure
from xgen_proxy.fleet.snapshot import ReplicaSnapshot
from xgen_proxy.upstream.pool import Pool

ANSWER_BYTES = 4 * 1024 * 1024  # of a health check, replica info or a canary: a page of vLLM has 70 KB

MAX_COUNTING = 4  # a long prompt takes vLLM's tokenizer, which chats share, 100 ms
ROUTES_TIMEOUT_S = 5.0  # for each question about an engine's routes

# Called at every change that the replica's snapshot shows, with the change of its requests in flight.
OnChange = Callable[["Replica", int], None]

State = Literal["starting", "up", "suspect", "down", "draining"]


class Replica:
    """One server process of a backend.

    `state`: starting (not checked yet, or it answers health checks but not what it serves), up, suspect (answers health
    checks but its circuit breaker is not closed), down (does not answer), draining (no longer listed: finishes its
    requests). `answers`: its last health check was answered. `in_flight`: the slots that our requests hold.
    `joined_later`: the backend had other replicas already. `missing`: capabilities that its engine denied having, which
    the backend sets. `memory`: what is known about its memory, and `pressure` what follows from it. Only the methods
    change the others. `response_headers` name it to clients.
    """

    def __init__(
        self,
        backend_name: str,
        url: str,
        dialect: Dialect,
        settings: BackendSettings,
        routing: Routing,
        on_change: OnChange,
        *,
        joined_later: bool = False,
    ) -> None:
        parts = urlsplit(url)
        host, port = parts.hostname or "", parts.port or 80
        self.backend_name = backend_name
        self.url = url
        self.dialect = dialect
        self.name = f"{backend_name}@{parts.netloc}"
        self.response_headers = (b"x-backend", backend_name.encode()), (b"x-replica", self.name.encode())
        self.joined_later = joined_later
        self._on_change = on_change
        self.pool = Pool(host, port)
        # Of its own, so that a check takes no connection from a request. ask() has one deadline for all it does.
        self._question_pool = Pool(host, port, connect_timeout_s=math.inf)
        self.state: State = "starting"
        self.reason = "not checked yet"
        self.answers = False
        self.since = time.monotonic()
        self.in_flight = 0
        self._counting = 0
        self.drained = asyncio.Event()
        self.scraped: Scrape | None = None
        self.metrics_page = b""
        self.info: ReplicaInfo | None = None
        self.missing: frozenset[str] = frozenset()
        self._learnt_slots = LearntSlots()
        self.memory = MemoryPressure()
        self.pressure: Pressure | None = None
        self.breaker = CircuitBreaker()
        self.record_activity()
        self.configure(settings, routing)

    def configure(self, settings: BackendSettings, routing: Routing) -> None:
        """Apply the backend's current settings."""
        self.settings, self.routing = settings, routing
        self.pool.connect_timeout_s = settings.connect_timeout_s
        self.head = self._head()
        self._set_slots()

    def _head(self) -> bytes:
        """The request headers that every request has. Hop-by-hop and client headers are never copied."""
        lines = [
            f"host: {urlsplit(self.url).netloc}",
            "content-type: application/json",
            "accept: application/json, text/event-stream",
            "accept-encoding: identity",
        ]
        if self.settings.api_key is not None:
            lines.append(f"authorization: Bearer {self.settings.api_key.get_secret_value()}")
        return ("\r\n".join(lines) + "\r\n").encode()

    def _set_slots(self) -> None:
        reported = self.info.slots if self.info else None
        self.slots = self.settings.slots or reported or self._learnt_slots.slots or self.dialect.slots
        self._on_change(self, 0)

    def record_info(self, info: ReplicaInfo) -> None:
        self.info = info
        self._set_slots()

    def record_scrape(self, scrape: Scrape | None, page: bytes = b"") -> None:
        """`page`: the one that the scrape was read from."""
        if scrape is None and self.scraped is None:
            return
        self.scraped, self.metrics_page = scrape, page
        if scrape is not None and self._learnt_slots.observe(scrape):
            self._set_slots()
        self._on_change(self, 0)

    def record_pressure(self) -> None:
        """`memory` has observed something."""
        if self.memory.pressure != self.pressure:
            self.pressure = self.memory.pressure
            self._on_change(self, 0)

    def record_answer(self) -> None:
        """Remember that it answered its last health check, unless a request has found it down meanwhile."""
        self.breaker.end_slow_start(time.monotonic())
        if not self.answers and self.state != "down":
            self.answers = True
            self._on_change(self, 0)

    def record_activity(self) -> None:
        """Remember that it sent something just now."""
        self.pool.last_activity = time.monotonic()

    @property
    def swaps_models(self) -> bool:
        """Whether it has several models, each of which a request may load."""
        return self.dialect.swaps_models and self.info is not None and len(self.info.models) > 1

    # slots and load

    def acquire(self, slots: int = 1) -> None:
        self.in_flight += slots
        self._on_change(self, slots)

    def release(self, slots: int = 1) -> None:
        self.in_flight -= slots
        self._on_change(self, -slots)
        if not self.in_flight:
            self.drained.set()

    def snapshot(self) -> ReplicaSnapshot:
        return ReplicaSnapshot(
            self.name,
            self.state == "up",
            self.in_flight,
            self.slots,
            self.dialect.overcommit,
            self.breaker.slow_start_at,
            self.scraped,
            self.answers,
            self.pressure,
        )

    @property
    def open_slots(self) -> int:
        return self.snapshot().open_slots(time.monotonic())

    @property
    def full_capacity(self) -> int:
        """How many requests it may hold unless it starts slowly or is short of memory."""
        return self.slots + self.dialect.overcommit

    @property
    def capacity(self) -> int:
        return self.snapshot().capacity(time.monotonic())

    @property
    def has_capacity(self) -> bool:
        if self.breaker.slow_start_at is None and self.pressure is None:  # the common case, without making a snapshot
            return self.in_flight < self.full_capacity
        return self.snapshot().has_capacity(time.monotonic())

    @property
    def load_parts(self) -> LoadParts:
        return self.snapshot().load_parts(time.monotonic(), self.routing)

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
        self.state, self.reason = state, reason
        if state == "down":
            self.answers = False
            self._learnt_slots = LearntSlots()  # it may be started again with other flags
            self.memory, self.pressure = MemoryPressure(), None
            self.missing = frozenset()
        self._on_change(self, 0)
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

    # small questions: health checks, replica info, canaries, token counts

    async def ask(self, path: str, body: Any = None, *, timeout_s: float) -> tuple[int, bytes]:
        """Send a GET, or a POST if there is a `body`. Returns the status and the body as it came, never decompressed.

        `timeout_s` is for all of it, from connecting to the last byte. Raises UpstreamError, also for an answer of more
        than ANSWER_BYTES.
        """
        payload = b"" if body is None else orjson.dumps(body)
        parts = b"GET" if body is None else b"POST", path.encode(), self.head, len(payload), payload
        message = b"%b %b HTTP/1.1\r\n%bcontent-length: %d\r\n\r\n%b" % parts
        try:
            async with asyncio.timeout(timeout_s):
                connection = await self._question_pool.exchange(message, math.inf)
                try:
                    return connection.status, await connection.read_all(math.inf, ANSWER_BYTES)
                finally:
                    self._question_pool.release(connection)
        except TimeoutError:
            raise UpstreamTimeoutError(f"{path} was not answered within {timeout_s:g} s") from None

    @contextmanager
    def counting(self) -> Iterator[bool]:
        """Whether it may count a prompt's tokens now. That takes no slot, so only a few may do so at once."""
        may_count = self._counting < MAX_COUNTING
        self._counting += may_count
        try:
            yield may_count
        finally:
            self._counting -= may_count

    async def post_json(self, path: str, body: Any, timeout_s: float | None = None) -> tuple[int, Any]:
        """Send a small request while holding a slot; a GET if `body` is None. Returns the status and the parsed JSON.
        Raises UpstreamError."""
        status, answer = await self.ask(path, body, timeout_s=timeout_s or self.settings.first_byte_timeout_s)
        try:
            return status, orjson.loads(answer)
        except orjson.JSONDecodeError:
            raise UpstreamProtocolError(f"{path} did not answer with JSON") from None

    async def missing_routes(self) -> frozenset[str]:
        """What its engine says that it has no route for; nothing if it does not say."""

        async def ask(path: str, body: Any) -> tuple[int, Any]:
            return await self.post_json(path, body, ROUTES_TIMEOUT_S)

        try:
            return frozenset(await self.dialect.missing_routes(ask))
        except Exception:  # any shape may come from a server that is not what the settings say
            return frozenset()

    def close(self) -> None:
        self.pool.close()
        self._question_pool.close()
