"""Looks at every replica once a second: is it there, what can it do, how busy is it?

A look is one GET that takes no lock and waits for no slot. /metrics is both the sign of life and the load where the
engine has one; llama-cpp-python has only the sign of life. What a replica can do (models, context, slots) is asked when
it comes up, holding a slot, since llama-cpp-python's /v1/models waits for its lock.

A hung engine answers looks: vLLM's API process does so for a stopped engine, with gauges that stand still. So a replica
that has said nothing for a while is asked for one token now and then, and one whose breaker is open before it gets
requests again.
"""

from __future__ import annotations

import asyncio
import contextlib
import logging
import random
import time
from typing import Any

import httpx

from proxy.admission import Admission
from proxy.attempt import ask
from proxy.dialects import Probe
from proxy.errors import Broken, ConnectFailed, UpstreamFailed
from proxy.fleet import Fleet, Replica
from proxy.load import Load, parse_metrics

log = logging.getLogger("xgen_proxy.health")

PROBE = {"prompt": "1", "max_tokens": 1}
MISSES_BEFORE_DOWN = 3  # a busy server may miss a look; a refused connection is believed at once


class Monitor:
    def __init__(self, fleet: Fleet, admission: Admission) -> None:
        self.fleet = fleet
        self.admission = admission
        self.settings = fleet.settings
        self._client = httpx.AsyncClient(timeout=self.settings.scrape_timeout_s, trust_env=False)
        self._tasks: list[asyncio.Task[None]] = []
        self._probing: dict[Replica, asyncio.Task[None]] = {}

    def start(self) -> None:
        self._tasks = [asyncio.create_task(self._watch(replica)) for replica in self.fleet.replicas]

    async def stop(self) -> None:
        tasks = [*self._tasks, *self._probing.values()]
        for task in tasks:
            task.cancel()
        await asyncio.gather(*tasks, return_exceptions=True)
        await self._client.aclose()

    async def _watch(self, replica: Replica) -> None:
        misses = 0
        while True:
            try:
                await self.look(replica)
                misses = 0
            except httpx.ConnectError as error:
                self.down(replica, str(error) or "no connection")
            except (httpx.HTTPError, ValueError, LookupError, TypeError, AttributeError) as error:
                misses += 1
                if misses >= MISSES_BEFORE_DOWN or replica.state == "starting":
                    self.down(replica, f"{misses} looks in a row failed: {error or type(error).__name__}")
            except Exception:
                log.exception("looking at %s", replica.name)
            await asyncio.sleep(self.settings.scrape_interval_s * random.uniform(0.9, 1.1))

    async def look(self, replica: Replica) -> None:
        sent = replica.sent_since_scrape
        page = await self._get(replica, replica.backend.dialect.look_path)
        if page.status_code >= 500:
            raise ValueError(f"{page.url.path} says {page.status_code}")
        if replica.backend.dialect.has_metrics and page.status_code == 200:
            replica.scraped = Load(**parse_metrics(page.text), at=time.monotonic())
            replica.sent_since_scrape -= sent
        if replica.state in ("starting", "down"):
            await self._discover(replica)
        self.admission.offer(replica)
        self._probe_when_due(replica)

    def _probe_when_due(self, replica: Replica) -> None:
        now = time.monotonic()
        every = self.settings.probe_interval_s
        silent = every and replica.up and now - replica.pool.heard >= every and replica.has_room
        if not replica.backend.dialect.probed:
            if replica.breaker.try_again(now):  # a token may cost money there: the next request is the trial
                replica.returned("left alone for a while")
        elif replica not in self._probing and (silent or replica.breaker.try_again(now)):
            task = asyncio.create_task(self._probe(replica))
            self._probing[replica] = task
            task.add_done_callback(lambda _: self._probing.pop(replica, None))

    async def _probe(self, replica: Replica) -> None:
        """One token, for nobody. Any answer but a 5xx shows that the engine runs."""
        replica.in_flight += 1
        try:
            status, _ = await ask(replica, "/v1/completions", {**PROBE, "model": self._served(replica)})
            if status >= 500 and status != 503:
                raise Broken(f"says {status}")
        except UpstreamFailed as error:
            self._failed_probe(replica, error)
        except Exception as error:  # a fault of ours: half-open must not last for ever
            log.exception("probing %s", replica.name)
            self._failed_probe(replica, Broken(repr(error)))
        else:
            replica.heard()
            if replica.state == "suspect":
                log.info("%s is up again", replica.name)
                replica.returned("answers a probe again")
        finally:
            self.admission.release(replica)

    def _failed_probe(self, replica: Replica, error: UpstreamFailed) -> None:
        """Once is enough: nobody waits for a probe, and it had as long as a request has."""
        if isinstance(error, ConnectFailed):
            self.down(replica, str(error))
            return
        replica.breaker.open(time.monotonic())
        if replica.state != "down" and replica.turn("suspect", f"no token for a probe: {error.why}"):
            log.warning("%s is suspect: %s", replica.name, replica.why)
        self.admission.gone()

    def _served(self, replica: Replica) -> str:
        return replica.backend.served(min(replica.backend.models, default=""))

    async def _discover(self, replica: Replica) -> None:
        replica.in_flight += 1
        try:
            answers = {path: await self._json(replica, path) for path in replica.backend.dialect.probe_paths}
        finally:
            replica.in_flight -= 1
        probe: Probe = replica.backend.dialect.read_probe(answers)
        replica.backend.learn(replica, probe)
        replica.returned("answers")
        log.info("%s is up: models %s, context %s", replica.name, sorted(probe.models), replica.backend.context)

    def down(self, replica: Replica, why: str) -> None:
        if replica.turn("down", why):
            replica.scraped = None
            log.warning("%s is down: %s", replica.name, why)
            self.admission.gone()

    async def _get(self, replica: Replica, path: str) -> httpx.Response:
        key = replica.backend.settings.api_key
        headers = {"authorization": f"Bearer {key.get_secret_value()}"} if key else {}
        answer = await self._client.get(replica.url + path, headers=headers)
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
