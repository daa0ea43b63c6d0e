"""A replica never holds more requests than it has slots, each slot is released once, and no request starves."""

from __future__ import annotations

import asyncio
import random
from collections.abc import Awaitable, Callable, Sequence
from dataclasses import dataclass, field

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from xgen_proxy.config.settings import Settings
from xgen_proxy.errors import QueueFullError, QueueTimeoutError, UpstreamConnectError
from xgen_proxy.fleet.admission import Admission
from xgen_proxy.fleet.backend import Fleet
from xgen_proxy.fleet.replica import Replica
from xgen_proxy.request.features import Urgency

URGENCIES: tuple[Urgency, ...] = ("high", "normal", "low")


@dataclass(frozen=True)
class Want:
    replica: Replica
    panic: bool = False
    slots: int = 1

    @property
    def usable(self) -> bool:
        return self.replica.up or (self.panic and self.replica.answers)


def replicas(*slots: int) -> list[Replica]:
    backends = {
        f"b{number}": {"urls": [f"http://127.0.0.1:{number + 1}"], "dialect": "openai", "slots": count}
        for number, count in enumerate(slots)
    }
    found = list(Fleet(Settings(backends=backends)).replicas)
    for replica in found:
        replica.set_state("up", "test")
    return found


async def acquire(admission: Admission, targets: Sequence[Want], urgency: Urgency) -> Want:
    """As forwarding/failover.py does."""
    return admission.try_acquire(targets) or await admission.wait(admission.enqueue(targets, urgency))


async def settle() -> None:
    """Run all tasks until each waits for something."""
    for _ in range(6):
        await asyncio.sleep(0)


async def test_free_slots_are_acquired_at_once_in_the_order_of_the_targets() -> None:
    first, second = replicas(1, 1)
    admission = Admission(10, 10)
    plan = [Want(first), Want(second)]
    assert [(await acquire(admission, plan, "normal")).replica for _ in range(2)] == [first, second]
    assert first.in_flight == 1
    admission.release(first)
    assert first.in_flight == 0


async def test_down_replica_is_skipped() -> None:
    first, second = replicas(1, 1)
    first.set_state("down", "test")
    assert (await acquire(Admission(10, 10), [Want(first), Want(second)], "normal")).replica is second


async def test_acquire_raises_at_once_if_all_targets_are_down() -> None:
    [replica] = replicas(1)
    replica.set_state("down", "test")
    with pytest.raises(UpstreamConnectError):
        await acquire(Admission(10, 10), [Want(replica)], "normal")


async def test_panic_lets_a_target_through_that_answers_but_is_not_up() -> None:
    [replica] = replicas(1)
    replica.record_answer()
    replica.set_state("suspect", "test")
    admission = Admission(10, 10)
    with pytest.raises(UpstreamConnectError):
        await acquire(admission, [Want(replica)], "normal")
    wanted = [Want(replica, panic=True)]
    await acquire(admission, wanted, "normal")
    second = asyncio.create_task(acquire(admission, wanted, "normal"))
    await settle()
    admission.on_replica_down()
    admission.release(replica)
    assert (await second).replica is replica
    third = asyncio.create_task(acquire(admission, wanted, "normal"))
    await settle()
    replica.set_state("down", "test")
    admission.on_replica_down()
    with pytest.raises(UpstreamConnectError):
        await third


async def test_request_that_is_several_takes_several_slots() -> None:
    """As soon as one is free: waiting for all of them it would starve behind small ones."""
    [replica] = replicas(4)
    admission = Admission(10, 10)
    await acquire(admission, [Want(replica)], "normal")
    large = await acquire(admission, [Want(replica, slots=4)], "normal")
    assert replica.in_flight == 5
    small = asyncio.create_task(acquire(admission, [Want(replica)], "normal"))
    await settle()
    admission.release(replica)
    await settle()
    assert not small.done(), "the large one fills the replica"
    admission.release(replica, large.slots)
    await small
    assert replica.in_flight == 1
    large = await acquire(admission, [Want(replica, slots=3)], "normal")
    cancelled = asyncio.create_task(acquire(admission, [Want(replica, slots=4)], "normal"))
    await settle()
    admission.release(replica, large.slots)  # granted: the future is done, its task has not run yet
    cancelled.cancel()
    await settle()
    assert replica.in_flight == 1, "all of its slots are returned"


async def test_full_queue_rejects_requests() -> None:
    [replica] = replicas(1)
    admission = Admission(1, 10)
    await acquire(admission, [Want(replica)], "normal")
    waiting = asyncio.create_task(acquire(admission, [Want(replica)], "normal"))
    await settle()
    with pytest.raises(QueueFullError) as full:
        await acquire(admission, [Want(replica)], "high")
    assert (full.value.status, full.value.retry_after) == (429, 5)
    admission.release(replica)
    assert (await waiting).replica is replica


async def test_queued_request_times_out() -> None:
    [replica] = replicas(1)
    admission = Admission(10, 0.01)
    await acquire(admission, [Want(replica)], "normal")
    with pytest.raises(QueueFullError, match=r"within 0\.01 s"):
        await acquire(admission, [Want(replica)], "normal")
    assert admission.queue == []
    assert replica.in_flight == 1


async def test_queue_is_ordered_by_arrival_shifted_by_urgency() -> None:
    [replica] = replicas(1)
    admission = Admission(100, 100)
    await acquire(admission, [Want(replica)], "normal")
    served: list[str] = []

    async def work(name: str, urgency: Urgency) -> None:
        await acquire(admission, [Want(replica)], urgency)
        served.append(name)
        admission.release(replica)

    names: list[tuple[str, Urgency]] = [("low", "low"), ("first", "normal"), ("second", "normal"), ("high", "high")]
    tasks = [asyncio.create_task(work(name, urgency)) for name, urgency in names]
    await settle()
    admission.release(replica)
    await asyncio.gather(*tasks)
    assert served == ["high", "first", "second", "low"]


async def test_low_request_does_not_starve_behind_urgent_ones(monkeypatch: pytest.MonkeyPatch) -> None:
    clock = 0.0
    monkeypatch.setattr(asyncio.get_running_loop(), "time", lambda: clock)
    [replica] = replicas(1)
    admission = Admission(1000, 1000)
    await acquire(admission, [Want(replica)], "normal")
    low = asyncio.create_task(acquire(admission, [Want(replica)], "low"))
    urgent: list[asyncio.Task[Want]] = []
    for second in range(100):  # one arrives and one is served each second, behind a backlog of two
        clock = float(second)
        urgent += [
            asyncio.create_task(acquire(admission, [Want(replica)], "high")) for _ in range(1 + 2 * (not second))
        ]
        await settle()
        admission.release(replica)
        await settle()
        if low.done():
            break
    assert low.done()
    assert 60 <= clock <= 64
    for task in urgent:
        task.cancel()


async def test_slot_goes_to_the_first_request_that_can_use_it() -> None:
    first, second = replicas(1, 1)
    admission = Admission(10, 10)
    for replica in (first, second):
        await acquire(admission, [Want(replica)], "normal")
    for_first = asyncio.create_task(acquire(admission, [Want(first)], "high"))
    for_either = asyncio.create_task(acquire(admission, [Want(first), Want(second)], "low"))
    await settle()
    admission.release(second)
    await settle()
    assert for_either.done()
    assert not for_first.done()
    admission.release(first)
    assert (await for_first).replica is first


async def test_replica_going_down_fails_requests_without_another_target() -> None:
    first, second = replicas(1, 1)
    admission = Admission(10, 10)
    for replica in (first, second):
        await acquire(admission, [Want(replica)], "normal")
    for_first = asyncio.create_task(acquire(admission, [Want(first)], "normal"))
    for_either = asyncio.create_task(acquire(admission, [Want(first), Want(second)], "normal"))
    await settle()
    first.set_state("down", "test")
    admission.on_replica_down()
    with pytest.raises(UpstreamConnectError):
        await for_first
    assert not for_either.done()
    admission.release(first)  # the slot is released, but not granted to anyone while it is down
    await settle()
    assert not for_either.done()
    first.set_state("up", "test")
    admission.dispatch(first)
    assert (await for_either).replica is first


async def leaves(admission: Admission, task: asyncio.Task[Want], replica: Replica) -> None:
    task.cancel()
    with pytest.raises(asyncio.CancelledError):
        await task


async def loses_its_replica(admission: Admission, task: asyncio.Task[Want], replica: Replica) -> None:
    """The slot was granted before the replica went down, so the waiter keeps it."""
    replica.set_state("down", "test")
    admission.on_replica_down()
    assert (await task).replica is replica
    admission.release(replica)


@pytest.mark.parametrize("then", [leaves, loses_its_replica])
async def test_slot_granted_in_the_moment_the_wait_ends(
    then: Callable[[Admission, asyncio.Task[Want], Replica], Awaitable[None]],
) -> None:
    [replica] = replicas(1)
    admission = Admission(10, 10)
    await acquire(admission, [Want(replica)], "normal")
    waiting = asyncio.create_task(acquire(admission, [Want(replica)], "normal"))
    await settle()
    admission.release(replica)  # granted: the future is done, its task has not run yet
    await then(admission, waiting, replica)
    assert replica.in_flight == 0
    assert admission.queue == []


async def test_slot_granted_to_a_cancelled_request_goes_to_the_next() -> None:
    [replica] = replicas(1)
    admission = Admission(10, 10)
    await acquire(admission, [Want(replica)], "normal")
    first, second = (asyncio.create_task(acquire(admission, [Want(replica)], "normal")) for _ in range(2))
    await settle()
    admission.release(replica)
    await leaves(admission, first, replica)
    assert (await second).replica is replica
    assert replica.in_flight == 1


async def test_cancelling_while_the_replica_goes_down_leaks_nothing() -> None:
    [replica] = replicas(1)
    admission = Admission(10, 10)
    await acquire(admission, [Want(replica)], "normal")
    waiting = asyncio.create_task(acquire(admission, [Want(replica)], "normal"))
    await settle()
    replica.set_state("down", "test")
    admission.on_replica_down()
    await leaves(admission, waiting, replica)
    assert (replica.in_flight, admission.queue) == (1, [])


async def test_checks_get_a_slot_whatever_the_state_and_load() -> None:
    [replica] = replicas(1)
    admission = Admission(10, 10)
    await acquire(admission, [Want(replica)], "normal")
    waiting = asyncio.create_task(acquire(admission, [Want(replica)], "normal"))
    await settle()
    with admission.slot_for_check(replica):
        assert replica.in_flight == 2
        admission.release(replica)
        await settle()
        assert not waiting.done(), "the check holds the only slot"
    assert (await waiting).replica is replica
    admission.release(replica)
    replica.set_state("down", "test")
    with pytest.raises(ZeroDivisionError), admission.slot_for_check(replica):
        raise ZeroDivisionError
    assert replica.in_flight == 0


# Any sequence of arrivals, ends, cancellations, and replicas becoming suspect, going down and coming up

MOST = 3  # slots that one request takes


@dataclass
class World:
    fleet: list[Replica]
    admission: Admission
    tasks: list[asyncio.Task[Want]] = field(default_factory=list)
    held: list[Want] = field(default_factory=list)

    def arrive(self, mask: int, urgency: Urgency, panic: bool, slots: int) -> None:
        chosen = [replica for number, replica in enumerate(self.fleet) if mask & 1 << number]
        wanted = [Want(replica, panic, min(slots, replica.slots)) for replica in chosen]
        self.tasks.append(asyncio.create_task(self._serve(wanted, urgency)))

    async def _serve(self, wanted: Sequence[Want], urgency: Urgency) -> Want:
        want = await acquire(self.admission, wanted, urgency)
        assert any(want is each for each in wanted)
        self.held.append(want)
        return want

    def end(self, number: int) -> None:
        if self.held:
            want = self.held.pop(number % len(self.held))
            self.admission.release(want.replica, want.slots)

    def cancel(self, number: int) -> None:
        if self.tasks:
            self.tasks[number % len(self.tasks)].cancel()

    def set_state(self, number: int) -> None:
        replica = self.fleet[number % len(self.fleet)]
        if replica.state == "up":
            replica.record_answer()
            replica.set_state("suspect", "test")
            self.admission.on_replica_down()
        elif replica.state == "suspect":
            replica.set_state("down", "test")
            self.admission.on_replica_down()
        else:
            replica.set_state("up", "test")
            self.admission.dispatch(replica)

    def check_bounds(self) -> None:
        for replica in self.fleet:
            assert 0 <= replica.in_flight < replica.slots + MOST, "beyond its slots by a request that is several, once"

    def check_settled(self) -> None:
        for replica in self.fleet:
            assert replica.in_flight == sum(want.slots for want in self.held if want.replica is replica)
        assert len(self.admission.queue) == sum(not task.done() for task in self.tasks)
        for waiter in self.admission.queue:
            assert any(want.usable for want in waiter.targets), "queued without a live target"
            assert not any(want.usable and want.replica.has_capacity for want in waiter.targets), (
                "queued beside a free slot"
            )
        assert self.admission.queue == sorted(self.admission.queue)

    async def close(self) -> None:
        for task in self.tasks:
            task.cancel()
        results = await asyncio.gather(*self.tasks, return_exceptions=True)
        wrong = [each for each in results if isinstance(each, BaseException)]
        assert all(
            isinstance(each, asyncio.CancelledError | UpstreamConnectError | QueueFullError) for each in wrong
        ), wrong
        while self.held:
            self.end(0)


numbers = st.integers(0, 50)
steps = st.one_of(
    st.tuples(st.just("arrive"), st.integers(1, 7), st.sampled_from(URGENCIES), st.booleans(), st.integers(1, MOST)),
    st.tuples(st.just("end"), numbers),
    st.tuples(st.just("cancel"), numbers),
    st.tuples(st.just("set_state"), numbers),
    st.tuples(st.just("settle")),
)


async def run(slots: list[int], sequence: list[tuple[object, ...]], queue: int) -> None:
    world = World(replicas(*slots), Admission(queue, 100))
    for name, *values in sequence:
        if name == "settle":
            await settle()
            world.check_settled()
        else:
            getattr(world, str(name))(*values)
        world.check_bounds()
    await settle()
    world.check_settled()
    await world.close()
    assert [replica.in_flight for replica in world.fleet] == [0] * len(slots)
    assert world.admission.queue == []


@given(st.lists(st.integers(1, 3), min_size=3, max_size=3), st.lists(steps, max_size=60), st.integers(0, 12))
@settings(max_examples=150, deadline=None)
def test_any_sequence(slots: list[int], sequence: list[tuple[object, ...]], queue: int) -> None:
    asyncio.run(run(slots, sequence, queue))


async def test_concurrent_requests_with_timeouts_and_cancellations_leak_nothing() -> None:
    """Real timers, so that timeouts, cancellations and grants coincide."""
    rng = random.Random(7)
    fleet = replicas(1, 2, 3)
    admission = Admission(300, 0.01)
    outcomes: list[str] = []

    async def client(number: int) -> None:
        wanted = [Want(replica) for replica in rng.sample(fleet, rng.randint(1, 3))]
        try:
            want = await acquire(admission, wanted, rng.choice(URGENCIES))
        except QueueTimeoutError:
            outcomes.append("late")
            return
        try:
            assert want.replica.in_flight <= want.replica.slots
            await asyncio.sleep(rng.choice([0, 0.0005, 0.001]))
            outcomes.append("served")
        finally:
            admission.release(want.replica)

    tasks = [asyncio.create_task(client(number)) for number in range(300)]
    for task in rng.sample(tasks, 100):
        await asyncio.sleep(0 if rng.random() < 0.7 else 0.001)
        task.cancel()
    results = await asyncio.gather(*tasks, return_exceptions=True)
    assert {type(each) for each in results} == {type(None), asyncio.CancelledError}
    assert {*outcomes} == {"served", "late"}
    assert [replica.in_flight for replica in fleet] == [0, 0, 0]
    assert admission.queue == []
