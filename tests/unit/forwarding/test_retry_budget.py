from __future__ import annotations

import asyncio

import pytest

from xgen_proxy.errors import QueueFullError
from xgen_proxy.forwarding.retry_budget import MINIMUM, RetryBudget


async def settle() -> None:
    for _ in range(5):
        await asyncio.sleep(0)


class Crowd:
    """Retries that hold their place until `may_end` is released."""

    def __init__(self, budget: RetryBudget, size: int) -> None:
        self.inside = 0
        self.order: list[int] = []
        self.may_end = asyncio.Semaphore(0)
        self.budget = budget
        self.tasks = [asyncio.create_task(self.retry(number)) for number in range(size)]

    async def retry(self, number: int) -> None:
        await self.budget.acquire()
        self.inside += 1
        self.order.append(number)
        try:
            await self.may_end.acquire()
        finally:
            self.inside -= 1
            self.budget.release()


@pytest.mark.parametrize(("in_flight", "capacity"), [(0, 3), (10, 3), (15, 3), (20, 4), (100, 20)])
async def test_budget_is_a_fifth_of_the_requests_in_flight_and_at_least_three(in_flight: int, capacity: int) -> None:
    budget = RetryBudget(10)
    for _ in range(in_flight):
        budget.request_started()
    crowd = Crowd(budget, capacity + 5)
    await settle()
    assert crowd.inside == capacity
    for _ in crowd.tasks:
        crowd.may_end.release()
    await asyncio.gather(*crowd.tasks)
    assert crowd.order == list(range(capacity + 5)), "served in order, and none is lost"
    assert budget.retrying == 0


async def test_waiting_too_long_raises() -> None:
    budget = RetryBudget(0.01)
    crowd = Crowd(budget, MINIMUM)
    await settle()
    with pytest.raises(QueueFullError, match="no retry was free"):
        await budget.acquire()
    for task in crowd.tasks:
        task.cancel()
    await asyncio.gather(*crowd.tasks, return_exceptions=True)
    assert budget.retrying == 0


async def test_a_cancelled_waiter_holds_nothing() -> None:
    budget = RetryBudget(10)
    crowd = Crowd(budget, MINIMUM + 2)
    await settle()
    crowd.tasks[MINIMUM].cancel()
    crowd.may_end.release()
    await settle()
    assert crowd.inside == MINIMUM, "the next in the queue took the place"
    crowd.tasks[-1].cancel()
    for task in crowd.tasks:
        task.cancel()
    await asyncio.gather(*crowd.tasks, return_exceptions=True)
    assert (budget.retrying, budget.queued) == (0, 0)


async def test_a_place_granted_to_a_cancelled_waiter_comes_back() -> None:
    budget = RetryBudget(10)
    crowd = Crowd(budget, MINIMUM + 1)
    await settle()
    crowd.tasks[0].cancel()  # its place goes to the last waiter …
    await asyncio.sleep(0)
    crowd.tasks[-1].cancel()  # … which is cancelled before it runs
    await settle()
    assert budget.retrying == MINIMUM - 1
    for task in crowd.tasks:
        task.cancel()
    await asyncio.gather(*crowd.tasks, return_exceptions=True)
    assert budget.retrying == 0
