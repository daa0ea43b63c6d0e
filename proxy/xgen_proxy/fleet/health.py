"""Looks at every replica once a second: is it there, what can it do, how busy is it?

A look is one GET that takes no lock and waits for no slot. /metrics is both the sign of life and the load where the
engine has one; llama-cpp-python has only the sign of life. What a replica can do (models, context, slots) is asked when
it comes up, holding a slot, since llama-cpp-python's /v1/models waits for its lock.

vLLM's API process answers looks for an engine that hangs, with gauges that stand still. So a vLLM that has said nothing
for a while is asked for one token now and then; not llama.cpp, which hangs as a whole, and where the token would cost a
chat that pauses its place in the cache. Any engine is asked for one before it gets requests again that failed many.
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
from xgen_proxy.dialects.backend_request import ReplicaInfo
from xgen_proxy.errors import UpstreamConnectError, UpstreamError, UpstreamProtocolError
from xgen_proxy.fleet.admission import Admission
from xgen_proxy.fleet.backend import Backend, Fleet, Replica
from xgen_proxy.fleet.load import Load, parse_metrics

log = logging.getLogger("xgen_proxy.health")

CANARY = {"prompt": "1", "max_tokens": 1}
INITIAL_CHECKS_S = 3.0  # a little more than a look may take
MISSES_BEFORE_DOWN = 3  # a busy server may miss a look; a refused connection is believed at once


class HealthMonitor:
    """`forget`: told the name of each replica that is gone for good."""

    def __init__(self, fleet: Fleet, admission: Admission, forget: Callable[[str], None]) -> None:
        self.fleet = fleet
        self.admission = admission
        self._forget = forget
        self._client = httpx.AsyncClient(trust_env=False)
        self._watching: dict[Replica, asyncio.Task[None]] = {}
        self._canaries: dict[Replica, asyncio.Task[None]] = {}
        self._ending: dict[Replica, asyncio.Task[None]] = {}

    @property
    def settings(self) -> Settings:
        return self.fleet.settings

    def start(self) -> None:
        for backend in self.fleet.backends:
            self._watch_each(backend)

    async def initial_checks(self) -> None:
        """Until each replica was looked at. Before, a proxy would refuse what the one beside it can do."""
        with contextlib.suppress(TimeoutError):
            async with asyncio.timeout(INITIAL_CHECKS_S):
                while any(replica.state == "starting" for replica in self.fleet.replicas):  # noqa: ASYNC110  once
                    await asyncio.sleep(0.01)

    async def stop(self) -> None:
        tasks = [*self._watching.values(), *self._canaries.values(), *self._ending.values()]
        for task in tasks:
            task.cancel()
        await asyncio.gather(*tasks, return_exceptions=True)
        await self._client.aclose()

    def _start(
        self, tasks: dict[Replica, asyncio.Task[None]], replica: Replica, work: Coroutine[Any, Any, None]
    ) -> None:
        task = tasks[replica] = asyncio.create_task(work)
        task.add_done_callback(lambda _: tasks.pop(replica) if tasks.get(replica) is task else None)

    def reconcile(self, backend: Backend, urls: Iterable[str], *, joined_later: bool) -> None:
        """The backend's replicas are those at `urls` from now on: who comes is looked at, who goes may end its work."""
        gone = backend.reconcile(urls, joined_later=joined_later)
        self._watch_each(backend)
        for replica in gone:
            log.info("%s is no longer listed: %d requests end there", replica.name, replica.in_flight)
            if watching := self._watching.pop(replica, None):
                watching.cancel()
            self._start(self._ending, replica, self._end(replica))
        if gone:
            self.admission.on_replica_down()

    def _watch_each(self, backend: Backend) -> None:
        for replica in backend.replicas:
            if replica not in self._watching:
                if replica in self._ending:
                    self._ending[replica].cancel()
                log.info("%s is listed", replica.name)
                self._start(self._watching, replica, self._watch(replica))

    async def _end(self, replica: Replica) -> None:
        if replica.in_flight:
            await replica.drained.wait()
        del replica.backend.draining[replica.url]
        replica.pool.close()
        self._forget(replica.name)

    async def _watch(self, replica: Replica) -> None:
        misses = 0
        while True:
            try:
                await self.check(replica)
                misses = 0
            except httpx.ConnectError as error:
                self.mark_down(replica, str(error) or "no connection")
            except (httpx.HTTPError, ValueError, LookupError, TypeError, AttributeError) as error:
                misses += 1
                if misses >= MISSES_BEFORE_DOWN or replica.state == "starting":
                    self.mark_down(replica, f"{misses} looks in a row failed: {error or type(error).__name__}")
            except Exception:
                log.exception("looking at %s", replica.name)
            await asyncio.sleep(self.settings.scrape_interval_s * random.uniform(0.9, 1.1))

    async def check(self, replica: Replica) -> None:
        before = replica.in_flight
        page = await self._get(replica, replica.backend.dialect.health_path)
        if page.status_code >= 500:
            raise ValueError(f"{page.url.path} says {page.status_code}")
        if replica.backend.dialect.has_metrics and page.status_code == 200:
            ours = max(before, replica.in_flight)  # who came or went meanwhile is not to be taken for another's
            replica.scraped = Load(**parse_metrics(page.text), at=time.monotonic(), ours=ours)
        if replica.state in ("starting", "down"):
            await self._discover(replica)
        self.admission.dispatch(replica)
        self._canary_when_due(replica)

    def _canary_when_due(self, replica: Replica) -> None:
        now = time.monotonic()
        dialect, every = replica.backend.dialect, self.settings.canary_interval_s
        silent = (
            dialect.hides_hangs
            and every
            and replica.up
            and now - replica.pool.last_activity >= every
            and replica.has_capacity
        )
        if not dialect.uses_canary:
            if replica.breaker.try_again(now):  # a token may cost money there: the next request is the trial
                replica.mark_up("left alone for a while")
        elif replica not in self._canaries and (silent or replica.breaker.try_again(now)):
            self._start(self._canaries, replica, self._canary(replica))

    async def _canary(self, replica: Replica) -> None:
        """One token, for nobody. Any answer but a 5xx shows that the engine runs."""
        replica.acquire()
        try:
            status, _ = await replica.post_json("/v1/completions", {**CANARY, "model": self._served(replica)})
            if status >= 500 and status != 503:
                raise UpstreamProtocolError(f"says {status}")
        except UpstreamError as error:
            self._canary_failed(replica, error)
        except Exception as error:  # a fault of ours: half-open must not last for ever
            log.exception("probing %s", replica.name)
            self._canary_failed(replica, UpstreamProtocolError(repr(error)))
        else:
            replica.record_activity()
            if replica.state == "suspect":
                log.info("%s is up again", replica.name)
                replica.mark_up("answers a probe again")
        finally:
            self.admission.release(replica)

    def _canary_failed(self, replica: Replica, error: UpstreamError) -> None:
        """Once is enough: nobody waits for a probe, and it had as long as a request has."""
        if isinstance(error, UpstreamConnectError):
            self.mark_down(replica, str(error))
            return
        replica.breaker.open(time.monotonic())
        if replica.state != "down" and replica.set_state("suspect", f"no token for a probe: {error.reason}"):
            log.warning("%s is suspect: %s", replica.name, replica.reason)
        self.admission.on_replica_down()

    def _served(self, replica: Replica) -> str:
        return replica.backend.served(min(replica.backend.models, default=""))

    async def _discover(self, replica: Replica) -> None:
        replica.acquire()
        try:
            answers = {path: await self._json(replica, path) for path in replica.backend.dialect.info_paths}
        finally:
            replica.release()
        probe: ReplicaInfo = replica.backend.dialect.parse_info(answers)
        replica.backend.learn(replica, probe)
        if replica.joined_later and replica.state == "starting" and replica.backend.dialect.uses_canary:
            replica.mark_suspect("new here: asked for a token first")
        else:
            replica.mark_up("answers")
        log.info(
            "%s is %s: models %s, context %s",
            replica.name,
            replica.state,
            sorted(probe.models),
            replica.backend.context,
        )

    def mark_down(self, replica: Replica, why: str) -> None:
        if replica.set_state("down", why):
            replica.scraped = None
            log.warning("%s is down: %s", replica.name, why)
            self.admission.on_replica_down()

    async def _get(self, replica: Replica, path: str) -> httpx.Response:
        key = replica.backend.settings.api_key
        headers = {"authorization": f"Bearer {key.get_secret_value()}"} if key else {}
        answer = await self._client.get(replica.url + path, headers=headers, timeout=self.settings.scrape_timeout_s)
        if answer.status_code in (401, 403):
            raise ValueError(f"{path} says {answer.status_code}: set the backend's api_key")
        return answer

    async def _json(self, replica: Replica, path: str) -> Any:
        answer = await self._get(replica, path)
        if answer.status_code == 503:
            raise ValueError(f"{path} says 503: it is still loading")
        with contextlib.suppress(ValueError):
            return answer.json() if answer.status_code == 200 else None
        return None
