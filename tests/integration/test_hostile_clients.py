"""Hostile requests of every kind, and good ones beside them. With real engines: bench/chaos.py."""

from __future__ import annotations

import asyncio
import random
from itertools import islice

import httpx

from bench import hostile
from tests.support.fake_upstream import FakeUpstream
from tests.support.running_proxy import CHAT, RunningProxy
from tests.support.waiting import wait_until

KINDS = len(hostile.BODIES) + 3
ATTACKS = 3 * KINDS
AT_ONCE = 8


async def storm(proxy: RunningProxy) -> list[int]:
    """Attack with AT_ONCE clients at once, and return the statuses of the good requests meanwhile."""
    attacks = islice(hostile.requests(random.Random(5), silence_s=0.5), ATTACKS)
    statuses: list[int] = []

    async def attack() -> None:
        for _, steps in attacks:
            await hostile.attack(proxy.port, steps)

    async with httpx.AsyncClient(base_url=proxy.url, timeout=20, verify=False) as client:
        attackers = asyncio.gather(*(attack() for _ in range(AT_ONCE)))
        while not attackers.done():
            answer = await client.post("/v1/chat/completions", json={**CHAT, "stream": len(statuses) % 2 == 0})
            statuses.append(answer.status_code)
            await asyncio.sleep(0.01)
        await attackers
    return statuses


def test_good_requests_are_served_and_the_fleet_is_up(
    proxy: RunningProxy, gpu: FakeUpstream, cpu: FakeUpstream
) -> None:
    statuses = asyncio.run(storm(proxy))
    assert len(statuses) > 20
    assert set(statuses) == {200}
    assert all(replica.up for replica in proxy.gateway.fleet.replicas)
    wait_until(lambda: not any(replica.in_flight for replica in proxy.gateway.fleet.replicas))
