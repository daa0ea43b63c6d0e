"""Health checks, discovery of what each replica serves, and load scraping, once a second for every replica.

A health check asks only whether the replica answers. It is one GET that takes no lock and waits for no slot. Any
complete answer below 500 is a sign of life, and so is 501, which llama-server gives for /metrics if it was started
without --metrics. Where the answer is a page of metrics, it is the load too.

What the replica serves (models, context, slots, capabilities) is read when it comes up, while holding a slot, since
llama-cpp-python's /v1/models waits for its lock, and then every few checks.

vLLM's API process answers health checks for an engine that hangs, with gauges that stand still. So a vLLM that has been
silent for a while gets a canary. A silent llama.cpp does not: it hangs as a whole, and the canary would evict a paused
chat from its cache. Any engine must answer a canary after its circuit breaker opened.
"""

from __future__ import annotations

import asyncio
import contextlib
import itertools
import logging
import random
import time
from collections.abc import Callable, Coroutine, Iterable
from typing import Any

import orjson

from xgen_proxy.config.settings import Settings
from xgen_proxy.dialects.backend_request import ReplicaInfo
from xgen_proxy.errors import (
    BadRequestError,
    UpstreamConnectError,
    UpstreamError,
    UpstreamLocalError,
    UpstreamOverloadedError,
    UpstreamProtocolError,
)
from xgen_proxy.fleet.admission import Admission
from xgen_proxy.fleet.backend import Backend, Fleet
from xgen_proxy.fleet.canary import ask_canary, ask_missing_media
from xgen_proxy.fleet.identity.tokenizers import Tokenizers
from xgen_proxy.fleet.load import Scrape, parse_metrics
from xgen_proxy.fleet.memory.watch import MemoryWatch
from xgen_proxy.fleet.replica import Replica
from xgen_proxy.request.json_body import check_structure
from xgen_proxy.supervision import supervise

log = logging.getLogger("xgen_proxy.health")

INITIAL_CHECKS_S = 3.0  # a little more than a health check may take
MISSES_BEFORE_DOWN = 3  # a busy server may miss a health check; a refused connection counts at once
CHECKS_PER_INFO = 5  # health checks from one reading of replica info to the next
MODELS_LOGGED = 20
UNKNOWN_MODEL_INTERVAL_S = 2.0  # between two readings because of requests for a model that is unknown
UNKNOWN_MODEL_WAIT_S = 1.0  # that such a request waits for the reading


class HealthMonitor:
    """`forget`: called with the name of each replica that is gone for good."""

    def __init__(self, fleet: Fleet, admission: Admission, memory: MemoryWatch, forget: Callable[[str], None]) -> None:
        self.fleet = fleet
        self.admission = admission
        self.tokenizers = Tokenizers(fleet, admission)
        self.memory = memory
        self._forget = forget
        self._watching: dict[Replica, asyncio.Task[None]] = {}
        self._canaries: dict[Replica, asyncio.Task[None]] = {}
        self._draining: dict[Replica, asyncio.Task[None]] = {}
        self._without_load: set[Replica] = set()  # their engine would report one, but was started without it
        self._rereading: asyncio.Task[bool] | None = None
        self._reread_at = -UNKNOWN_MODEL_INTERVAL_S
        self._memory_task: asyncio.Task[None] | None = None

    @property
    def settings(self) -> Settings:
        return self.fleet.settings

    def start(self) -> None:
        self.tokenizers.start()
        self._memory_task = supervise("memory", self.memory.run)
        for backend in self.fleet.backends:
            self._watch_all(backend)

    async def initial_checks(self) -> None:
        """Wait until each replica was checked, so that a new proxy does not reject what its neighbour can serve."""
        with contextlib.suppress(TimeoutError):
            async with asyncio.timeout(INITIAL_CHECKS_S):
                while any(each.state == "starting" and not each.answers for each in self.fleet.replicas):  # noqa: ASYNC110  once
                    await asyncio.sleep(0.01)

    async def stop(self) -> None:
        tasks: list[asyncio.Task[Any]] = [*self._watching.values(), *self._canaries.values(), *self._draining.values()]
        tasks += [task for task in (self._rereading, self._memory_task) if task is not None]
        for task in tasks:
            task.cancel()
        await asyncio.gather(*tasks, return_exceptions=True)
        await self.tokenizers.stop()

    def _start(
        self, tasks: dict[Replica, asyncio.Task[None]], replica: Replica, work: Coroutine[Any, Any, None]
    ) -> None:
        def done(task: asyncio.Task[None]) -> None:
            if tasks.get(replica) is task:
                del tasks[replica]
            if not task.cancelled() and (error := task.exception()) is not None:
                log.error("a background task of %s failed", replica.name, exc_info=error)

        tasks[replica] = asyncio.create_task(work)
        tasks[replica].add_done_callback(done)

    # replicas that come and go

    def reconcile(self, backend: Backend, urls: Iterable[str], *, joined_later: bool) -> None:
        """Make the backend's replicas match `urls`: start checking new ones, and let removed ones drain."""
        removed = backend.reconcile(urls, joined_later=joined_later)
        self._watch_all(backend)
        for replica in removed:
            log.info("%s is no longer listed: draining %d requests", replica.name, replica.in_flight)
            if watching := self._watching.pop(replica, None):
                watching.cancel()
            self._start(self._draining, replica, self._drain(backend, replica))
        if removed:
            self.admission.on_replica_down()

    def _watch_all(self, backend: Backend) -> None:
        for replica in backend.replicas:
            if replica not in self._watching:
                if replica in self._draining:
                    self._draining[replica].cancel()
                log.info("%s is listed", replica.name)
                self._start(self._watching, replica, self._watch(backend, replica))

    async def _drain(self, backend: Backend, replica: Replica) -> None:
        if replica.in_flight:
            await replica.drained.wait()
        del backend.draining[replica.url]
        self._without_load.discard(replica)
        self.memory.forget(replica)
        replica.close()
        self._forget(replica.name)

    # health checks

    async def _watch(self, backend: Backend, replica: Replica) -> None:
        misses = 0
        for number in itertools.count():
            try:
                misses = await self._check_or_miss(backend, replica, number, misses)
            except Exception:
                log.exception("health check of %s", replica.name)
            await asyncio.sleep(self.settings.scrape_interval_s * random.uniform(0.9, 1.1))

    async def _check_or_miss(self, backend: Backend, replica: Replica, number: int, misses: int) -> int:
        """Returns the number of checks in a row that were not answered."""
        try:
            await self.check(backend, replica, reread=number % CHECKS_PER_INFO == CHECKS_PER_INFO - 1)
        except UpstreamConnectError as error:
            self.mark_down(replica, str(error) or "no connection")
        except UpstreamLocalError as error:
            log.error("no health check of %s, since the proxy is out of resources: %s", replica.name, error)
            return misses
        except UpstreamError as error:
            misses += 1
            if misses >= MISSES_BEFORE_DOWN or not replica.answers:
                self.mark_down(replica, f"{misses} health checks in a row failed: {error}")
            return misses
        return 0

    async def check(self, backend: Backend, replica: Replica, *, reread: bool = False) -> None:
        """`reread`: read what it serves, although it is up. Raises UpstreamError if the replica does not answer."""
        before, dialect = replica.in_flight, replica.dialect
        path = dialect.health_path_in_use if before and dialect.health_path_in_use else dialect.health_path
        status, page = await self._get(replica, path)
        if status >= 500 and status != 501:
            raise UpstreamProtocolError(f"{path} returned {status}")
        if path == dialect.metrics_path:
            self._record_load(replica, status, page, before)
        else:
            replica.record_scrape(None)  # of the time when requests ran there
        await self.memory.observe_scrape(replica)
        if replica.state in ("starting", "down"):
            await self._come_up(backend, replica)
        elif reread and dialect.models_change:
            await self._reread(backend, replica)
        replica.record_answer()
        self.admission.dispatch(replica)
        self._start_canary_if_due(replica)

    def doubt(self, replica: Replica) -> None:
        """Its engine answered a request with 5xx. If that is the last of several, a canary decides whether it is ill.

        The replica serves on until the canary fails. Where tokens may cost money, health checks have to do.
        """
        asks = replica.dialect.uses_canary and replica not in self._canaries
        if replica.breaker.doubted(time.monotonic()) and asks:
            log.info("%s answered several requests in a row with 5xx: asking for a canary", replica.name)
            self._start(self._canaries, replica, self._canary(replica))

    def convict(self, replica: Replica, request: int) -> None:
        """Its engine answered a request with 5xx that another replica served. `request`: its hash.

        That decides where no canary can. No single request, however often a client repeats it, closes a replica to the
        others; and if no other can serve them, they are sent there all the same.
        """
        if replica.dialect.uses_canary or not replica.breaker.convicted(request, time.monotonic()):
            return
        if replica.state != "down" and replica.set_state("suspect", "it failed requests that others served"):
            log.warning("%s is suspect: %s", replica.name, replica.reason)
        self.admission.on_replica_down()

    async def _get(self, replica: Replica, path: str) -> tuple[int, bytes]:
        return await replica.ask(path, timeout_s=self.settings.scrape_timeout_s)

    def _record_load(self, replica: Replica, status: int, page: bytes, before: int) -> None:
        """`before`: our requests there when the page was asked for."""
        gauges = parse_metrics(page) if status == 200 else {}
        if all(value is None for value in gauges.values()):
            replica.record_scrape(None)
            if replica not in self._without_load:
                self._without_load.add(replica)
                path = replica.dialect.metrics_path
                log.warning(
                    "%s reports no load (%s: %d), so only our own requests count; llama-server needs --metrics",
                    replica.name,
                    path,
                    status,
                )
            return
        self._without_load.discard(replica)
        now = time.monotonic()
        ours = max(before, replica.in_flight)  # requests that started or ended during the scrape are ours too
        stale_at = now + self.settings.stale_after_s
        replica.record_scrape(Scrape(**gauges, at=now, stale_at=stale_at, ours=ours), page)

    def mark_down(self, replica: Replica, reason: str) -> None:
        if replica.set_state("down", reason):
            replica.record_scrape(None)
            self.memory.forget(replica)
            log.warning("%s is down: %s", replica.name, reason)
            self.admission.on_replica_down()

    # what a replica serves

    async def _come_up(self, backend: Backend, replica: Replica) -> None:
        """It answers. Whether it is up depends on what it says about itself."""
        try:
            with self.admission.slot_for_check(replica):
                info = await self._read_info(replica) or ReplicaInfo(())
                missing = await self._ask_missing(backend, replica, info)
        except UpstreamConnectError:
            raise
        except UpstreamError as error:
            if replica.set_state("starting", f"it answers health checks, but {error}"):
                log.warning("%s is not up: %s", replica.name, replica.reason)
            return
        backend.record_info(replica, info, missing)
        if replica.joined_later and replica.state == "starting" and replica.dialect.uses_canary:
            replica.mark_suspect("new: must answer a canary first")
        else:
            replica.mark_up("healthy")
        self.tokenizers.forget(replica)
        self.tokenizers.check_soon()
        log.info(
            "%s is %s: models %s, context %s%s",
            replica.name,
            replica.state,
            sorted(info.models)[:MODELS_LOGGED],
            backend.context,
            f", without {', '.join(sorted(missing))}" if missing else "",
        )

    async def _reread(self, backend: Backend, replica: Replica) -> bool:
        """Returns whether anything is new. What was known is kept where it cannot be read now."""
        try:
            info = await self._read_info(replica)
        except UpstreamError:
            return False
        if info is None or info == replica.info:
            return False
        with self.admission.slot_for_check(replica):
            missing = await self._ask_missing(backend, replica, info)
        if replica.state in ("down", "draining"):
            return False
        backend.record_info(replica, info, missing)
        self.tokenizers.check_soon()
        log.info("%s serves %s now, context %s", replica.name, sorted(info.models)[:MODELS_LOGGED], backend.context)
        return True

    async def _ask_missing(self, backend: Backend, replica: Replica, info: ReplicaInfo) -> frozenset[str]:
        """The capabilities that its engine says it lacks."""
        model = backend.served(min(backend.settings.models or info.models, default=""))
        missing = await replica.missing_routes()
        return missing | await ask_missing_media(replica, model, self.settings.scrape_timeout_s)

    async def _read_info(self, replica: Replica) -> ReplicaInfo | None:
        """None if it does not say, or not in the shape that its engine would. Raises UpstreamError."""
        answers = {path: await self._get_json(replica, path) for path in replica.dialect.info_paths}
        try:
            return replica.dialect.parse_info(answers)
        except Exception:  # any shape may come from a server that is not what the settings say
            return None

    async def _get_json(self, replica: Replica, path: str) -> Any:
        """None for an answer that is no JSON or has no 200."""
        status, answer = await self._get(replica, path)
        if status in (401, 403):
            raise UpstreamProtocolError(f"{path} returned {status}: set the backend's api_key")
        if status == 503:
            raise UpstreamOverloadedError(f"{path} returned 503: it is still loading")
        if status >= 500 and status != 501:
            raise UpstreamProtocolError(f"{path} returned {status}")
        with contextlib.suppress(BadRequestError, orjson.JSONDecodeError):
            check_structure(answer, self.settings.limits)
            return orjson.loads(answer) if status == 200 else None
        return None

    async def look_for_new_models(self) -> bool:
        """Read what all replicas serve again, since a request names a model that none does. Returns whether anything is
        new. Reads at most once in UNKNOWN_MODEL_INTERVAL_S, and waits UNKNOWN_MODEL_WAIT_S for it."""
        now = time.monotonic()
        if self._rereading is None or self._rereading.done():
            if now - self._reread_at < UNKNOWN_MODEL_INTERVAL_S:
                return False
            self._reread_at = now
            self._rereading = asyncio.create_task(self._reread_all())
        with contextlib.suppress(TimeoutError):
            return await asyncio.wait_for(asyncio.shield(self._rereading), UNKNOWN_MODEL_WAIT_S)
        return False

    async def _reread_all(self) -> bool:
        rereads = [
            self._reread(backend, replica)
            for backend in self.fleet.backends
            if backend.dialect.models_change
            for replica in backend.replicas
            if replica.answers and replica.info is not None
        ]
        return any(await asyncio.gather(*rereads))

    # canaries

    def _start_canary_if_due(self, replica: Replica) -> None:
        now = time.monotonic()
        dialect = replica.dialect
        if not dialect.uses_canary:
            if replica.breaker.try_half_open(now):  # tokens may cost money here: the next request is the trial
                replica.mark_up("its circuit breaker was open long enough")
                replica.breaker.on_trial = True
        elif replica not in self._canaries and (self._is_silent(replica, now) or replica.breaker.try_half_open(now)):
            self._start(self._canaries, replica, self._canary(replica))

    def _is_silent(self, replica: Replica, now: float) -> bool:
        interval = self.settings.canary_interval_s
        return bool(
            replica.dialect.hides_hangs
            and interval
            and replica.up
            and now - replica.pool.last_activity >= interval
            and replica.has_capacity
        )

    async def _canary(self, replica: Replica) -> None:
        backend = self.fleet.backends_by_name.get(replica.backend_name)
        if backend is None:
            return  # new settings removed it meanwhile
        model = backend.served(min(backend.models, default=""))
        with self.admission.slot_for_check(replica):
            try:
                answered = await ask_canary(replica, model)
            except UpstreamError as error:
                self._canary_failed(replica, error)
            except Exception as error:  # a bug of ours; the breaker must not stay half-open
                log.exception("canary to %s", replica.name)
                self._canary_failed(replica, UpstreamProtocolError(repr(error)))
            else:
                replica.record_activity()
                if replica.state == "suspect":
                    log.info("%s is up again", replica.name)
                    replica.mark_up("answered a canary" if answered else "healthy; it serves no route for a canary")

    def _canary_failed(self, replica: Replica, error: UpstreamError) -> None:
        """One failure is enough, since the canary had as much time as a request."""
        if isinstance(error, UpstreamConnectError):
            self.mark_down(replica, str(error))
            return
        if error.blame == "proxy":  # nothing was learnt: ask again
            if replica.state == "suspect":
                replica.breaker.open_until_canary()
            return
        replica.breaker.open(time.monotonic())
        if replica.state != "down" and replica.set_state("suspect", f"canary failed: {error.reason}"):
            log.warning("%s is suspect: %s", replica.name, replica.reason)
        self.admission.on_replica_down()
