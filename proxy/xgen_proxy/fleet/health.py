"""Health checks, discovery of what each replica serves, and load scraping, once a second for every replica.

A health check is one GET that takes no lock and waits for no slot. Where the engine has /metrics, that page is both the
sign of life and the load; llama-cpp-python has no load to scrape. Replica info (models, context, slots, capabilities)
is read when a replica comes up, while holding a slot, since llama-cpp-python's /v1/models waits for its lock.

vLLM's API process answers health checks for an engine that hangs, with gauges that stand still. So a vLLM that has been
silent for a while gets a canary, a request for one token. A silent llama.cpp does not: it hangs as a whole, and the
canary would evict a paused chat from its cache. Any engine must answer a canary after its circuit breaker opened.
"""

from __future__ import annotations

import asyncio
import contextlib
import logging
import random
import time
from collections.abc import Callable, Coroutine, Iterable
from typing import Any

import httpx

from xgen_proxy.config.settings import Settings
from xgen_proxy.errors import UpstreamConnectError, UpstreamError, UpstreamProtocolError
from xgen_proxy.fleet.admission import Admission
from xgen_proxy.fleet.backend import Backend, Fleet, Replica
from xgen_proxy.fleet.load import Scrape, parse_metrics
from xgen_proxy.own_limits import is_exhausted

log = logging.getLogger("xgen_proxy.health")

CANARY = {"prompt": "1", "max_tokens": 1}
INITIAL_CHECKS_S = 3.0  # a little more than a health check may take
MISSES_BEFORE_DOWN = 3  # a busy server may miss a health check; a refused connection counts at once


class HealthMonitor:
    """`forget`: called with the name of each replica that is gone for good."""

    def __init__(self, fleet: Fleet, admission: Admission, forget: Callable[[str], None]) -> None:
        self.fleet = fleet
        self.admission = admission
        self._forget = forget
        self._client = httpx.AsyncClient(trust_env=False)
        self._watching: dict[Replica, asyncio.Task[None]] = {}
        self._canaries: dict[Replica, asyncio.Task[None]] = {}
        self._draining: dict[Replica, asyncio.Task[None]] = {}

    @property
    def settings(self) -> Settings:
        return self.fleet.settings

    def start(self) -> None:
        for backend in self.fleet.backends:
            self._watch_all(backend)

    async def initial_checks(self) -> None:
        """Wait until each replica was checked, so that a new proxy does not reject what its neighbour can serve."""
        with contextlib.suppress(TimeoutError):
            async with asyncio.timeout(INITIAL_CHECKS_S):
                while any(replica.state == "starting" for replica in self.fleet.replicas):  # noqa: ASYNC110  once
                    await asyncio.sleep(0.01)

    async def stop(self) -> None:
        tasks = [*self._watching.values(), *self._canaries.values(), *self._draining.values()]
        for task in tasks:
            task.cancel()
        await asyncio.gather(*tasks, return_exceptions=True)
        await self._client.aclose()

    def _start(
        self, tasks: dict[Replica, asyncio.Task[None]], replica: Replica, work: Coroutine[Any, Any, None]
    ) -> None:
        task = tasks[replica] = asyncio.create_task(work)
        task.add_done_callback(lambda _: tasks.pop(replica) if tasks.get(replica) is task else None)

    # replicas that come and go

    def reconcile(self, backend: Backend, urls: Iterable[str], *, joined_later: bool) -> None:
        """Make the backend's replicas match `urls`: start checking new ones, and let removed ones drain."""
        removed = backend.reconcile(urls, joined_later=joined_later)
        self._watch_all(backend)
        for replica in removed:
            log.info("%s is no longer listed: draining %d requests", replica.name, replica.in_flight)
            if watching := self._watching.pop(replica, None):
                watching.cancel()
            self._start(self._draining, replica, self._drain(replica))
        if removed:
            self.admission.on_replica_down()

    def _watch_all(self, backend: Backend) -> None:
        for replica in backend.replicas:
            if replica not in self._watching:
                if replica in self._draining:
                    self._draining[replica].cancel()
                log.info("%s is listed", replica.name)
                self._start(self._watching, replica, self._watch(replica))

    async def _drain(self, replica: Replica) -> None:
        if replica.in_flight:
            await replica.drained.wait()
        del replica.backend.draining[replica.url]
        replica.pool.close()
        self._forget(replica.name)

    # health checks

    async def _watch(self, replica: Replica) -> None:
        misses = 0
        while True:
            try:
                await self.check(replica)
                misses = 0
            except httpx.ConnectError as error:
                if is_exhausted(error):
                    log.error("no health check of %s, since the proxy is out of resources: %s", replica.name, error)
                else:
                    self.mark_down(replica, str(error) or "no connection")
            except (httpx.HTTPError, ValueError, LookupError, TypeError, AttributeError) as error:
                misses += 1
                if misses >= MISSES_BEFORE_DOWN or replica.state == "starting":
                    self.mark_down(replica, f"{misses} health checks in a row failed: {error or type(error).__name__}")
            except Exception:
                log.exception("health check of %s", replica.name)
            await asyncio.sleep(self.settings.scrape_interval_s * random.uniform(0.9, 1.1))

    async def check(self, replica: Replica) -> None:
        """Raises httpx.HTTPError, and ValueError, LookupError, TypeError or AttributeError for a malformed answer."""
        before = replica.in_flight
        dialect = replica.backend.dialect
        page = await self._get(replica, dialect.health_path)
        if page.status_code >= 500:
            raise ValueError(f"{page.url.path} returned {page.status_code}")
        if dialect.has_metrics and page.status_code == 200:
            now = time.monotonic()
            ours = max(before, replica.in_flight)  # requests that started or ended during the scrape are ours too
            stale_at = now + self.settings.stale_after_s
            replica.record_scrape(Scrape(**parse_metrics(page.text), at=now, stale_at=stale_at, ours=ours))
        if replica.state in ("starting", "down"):
            await self._read_info(replica)
        self.admission.dispatch(replica)
        self._start_canary_if_due(replica)

    def doubt(self, replica: Replica) -> None:
        """Its engine answered a request with 5xx. If that is the last of several, a canary decides whether it is ill.

        The replica serves on until the canary fails. Where tokens may cost money, health checks have to do.
        """
        asks = replica.backend.dialect.uses_canary and replica not in self._canaries
        if replica.breaker.doubted(time.monotonic()) and asks:
            log.info("%s answered several requests in a row with 5xx: asking for a canary", replica.name)
            self._start(self._canaries, replica, self._canary(replica))

    def mark_down(self, replica: Replica, reason: str) -> None:
        if replica.set_state("down", reason):
            replica.record_scrape(None)
            log.warning("%s is down: %s", replica.name, reason)
            self.admission.on_replica_down()

    async def _read_info(self, replica: Replica) -> None:
        dialect = replica.backend.dialect
        with self.admission.slot_for_check(replica):
            answers = {path: await self._get_json(replica, path) for path in dialect.info_paths}
        info = dialect.parse_info(answers)
        replica.backend.record_info(replica, info)
        if replica.joined_later and replica.state == "starting" and dialect.uses_canary:
            replica.mark_suspect("new: must answer a canary first")
        else:
            replica.mark_up("healthy")
        state, context = replica.state, replica.backend.context
        log.info("%s is %s: models %s, context %s", replica.name, state, sorted(info.models), context)

    # canaries

    def _start_canary_if_due(self, replica: Replica) -> None:
        now = time.monotonic()
        dialect = replica.backend.dialect
        if not dialect.uses_canary:
            if replica.breaker.try_half_open(now):  # tokens may cost money here: the next request is the trial
                replica.mark_up("its circuit breaker was open long enough")
        elif replica not in self._canaries and (self._is_silent(replica, now) or replica.breaker.try_half_open(now)):
            self._start(self._canaries, replica, self._canary(replica))

    def _is_silent(self, replica: Replica, now: float) -> bool:
        interval = self.settings.canary_interval_s
        return bool(
            replica.backend.dialect.hides_hangs
            and interval
            and replica.up
            and now - replica.pool.last_activity >= interval
            and replica.has_capacity
        )

    async def _canary(self, replica: Replica) -> None:
        """Request one token. Any answer but a 5xx shows that the engine runs; 503 means that it is busy."""
        model = replica.backend.served(min(replica.backend.models, default=""))
        with self.admission.slot_for_check(replica):
            try:
                status, _ = await replica.post_json("/v1/completions", {**CANARY, "model": model})
                if status >= 500 and status != 503:
                    raise UpstreamProtocolError(f"returned {status}")
            except UpstreamError as error:
                self._canary_failed(replica, error)
            except Exception as error:  # a bug of ours; the breaker must not stay half-open
                log.exception("canary to %s", replica.name)
                self._canary_failed(replica, UpstreamProtocolError(repr(error)))
            else:
                replica.record_activity()
                if replica.state == "suspect":
                    log.info("%s is up again", replica.name)
                    replica.mark_up("answered a canary")

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

    # HTTP

    async def _get(self, replica: Replica, path: str) -> httpx.Response:
        key = replica.backend.settings.api_key
        headers = {"authorization": f"Bearer {key.get_secret_value()}"} if key else {}
        answer = await self._client.get(replica.url + path, headers=headers, timeout=self.settings.scrape_timeout_s)
        if answer.status_code in (401, 403):
            raise ValueError(f"{path} returned {answer.status_code}: set the backend's api_key")
        return answer

    async def _get_json(self, replica: Replica, path: str) -> Any:
        """None for an answer that is no JSON or has no 200."""
        answer = await self._get(replica, path)
        if answer.status_code == 503:
            raise ValueError(f"{path} returned 503: it is still loading")
        with contextlib.suppress(ValueError):
            return answer.json() if answer.status_code == 200 else None
        return None
