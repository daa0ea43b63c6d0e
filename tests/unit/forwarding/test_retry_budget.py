from __future__ import annotations

import asyncio

import pytest

from xgen_proxy.errors import QueueFullError
from xgen_proxy.forwarding.retry_budget import AT_LEAST, RetryBudget


async def reconcile() -> None:
    for _ in range(5):
        await asyncio.sleep(0)


class Crowd:
    """Retries that hold their place until they are told to end."""

    def __init__(self, budget: RetryBudget, size: int) -> None:
        self.inside = 0
        self.order: list[int] = []
        self.go = asyncio.Semaphore(0)
        self.budget = budget
        self.tasks = [asyncio.create_task(self.retry(number)) for number in range(size)]

    async def retry(self, number: int) -> None:
        async with self.budget:
            self.inside += 1
            self.order.append(number)
            try:
                await self.go.acquire()
            finally:
                self.inside -= 1


@pytest.mark.parametrize(("in_flight", "room"), [(0, 3), (10, 3), (15, 3), (20, 4), (100, 20)])
async def test_a_fifth_of_what_is_in_flight_but_at_least_three(in_flight: int, room: int) -> None:
    budget = RetryBudget(10)
    budget.in_flight = in_flight
    crowd = Crowd(budget, room + 5)
    await reconcile()
    assert crowd.inside == room
    for _ in crowd.tasks:
        crowd.go.release()
    await asyncio.gather(*crowd.tasks)
    assert crowd.order == list(range(room + 5)), "first come, first served, and nobody is lost"
    assert budget.retrying == 0


async def test_who_waits_too_long_is_told_so() -> None:
    budget = RetryBudget(0.01)
    crowd = Crowd(budget, AT_LEAST)
    await reconcile()
    with pytest.raises(QueueFullError, match="no retry was free"):
        async with budget:
            pass
    for task in crowd.tasks:
        task.cancel()
    await asyncio.gather(*crowd.tasks, return_exceptions=True)
    assert budget.retrying == 0


async def test_who_leaves_while_waiting_holds_nothing() -> None:
    budget = RetryBudget(10)
    crowd = Crowd(budget, AT_LEAST + 2)
    await reconcile()
    crowd.tasks[AT_LEAST].cancel()
    crowd.go.release()
    await reconcile()
    assert crowd.inside == AT_LEAST, "the place went to the one behind"
    crowd.tasks[-1].cancel()
    for task in crowd.tasks:
        task.cancel()
    await asyncio.gather(*crowd.tasks, return_exceptions=True)
    assert (budget.retrying, len(budget._waiting)) == (0, 0)


async def test_granted_in_the_moment_of_leaving() -> None:
    budget = RetryBudget(10)
    crowd = Crowd(budget, AT_LEAST + 1)
    await reconcile()
    crowd.tasks[0].cancel()  # gives its place to the last one …
    await asyncio.sleep(0)
    crowd.tasks[-1].cancel()  # … which leaves before it knows
    await reconcile()
    assert budget.retrying == AT_LEAST - 1
    for task in crowd.tasks:
        task.cancel()
    await asyncio.gather(*crowd.tasks, return_exceptions=True)
    assert budget.retrying == 0
