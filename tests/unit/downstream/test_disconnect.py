"""DisconnectMonitor, with a scripted receive(). With real clients: tests/integration/downstream."""

from __future__ import annotations

import asyncio

import pytest
from starlette.types import Message

from xgen_proxy.downstream import disconnect
from xgen_proxy.downstream.disconnect import DisconnectMonitor
from xgen_proxy.errors import ClientDisconnectedError


class Receive:
    """An ASGI receive(). `called`: somebody waits for its next message."""

    def __init__(self, *messages: Message) -> None:
        self.called = asyncio.Event()
        self.queue: asyncio.Queue[Message] = asyncio.Queue()
        for message in messages:
            self.queue.put_nowait(message)

    async def __call__(self) -> Message:
        self.called.set()
        return await self.queue.get()

    def disconnect(self) -> None:
        self.queue.put_nowait({"type": "http.disconnect"})


@pytest.fixture(autouse=True)
def watch_at_once(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(disconnect, "WATCH_AFTER_S", 0)


async def others_finished() -> None:
    if others := asyncio.all_tasks() - {asyncio.current_task()}:
        _, pending = await asyncio.wait(others, timeout=10)
        assert not pending


async def test_disconnect_cancels_the_work_and_the_task_continues() -> None:
    receive = Receive({"type": "http.request", "body": b"more", "more_body": False})
    receive.disconnect()
    cleaned: list[bool] = []

    async def work() -> None:
        with DisconnectMonitor().watch(receive):
            try:
                async with asyncio.timeout(10):
                    await asyncio.Event().wait()
            finally:
                cleaned.append(True)

    with pytest.raises(ClientDisconnectedError):
        await work()
    assert cleaned
    task = asyncio.current_task()
    assert task
    assert task.cancelling() == 0
    await asyncio.sleep(0)  # is not cancelled a second time
    await others_finished()


async def test_short_work_starts_no_watcher() -> None:
    receive = Receive()
    with DisconnectMonitor().watch(receive):
        pass
    receive.disconnect()
    for _ in range(3):
        await asyncio.sleep(0)
    assert not receive.called.is_set()
    await others_finished()


async def test_watcher_ends_with_the_work() -> None:
    receive = Receive()
    with DisconnectMonitor().watch(receive):
        await receive.called.wait()
    await others_finished()


async def test_one_timer_starts_each_watcher_when_it_is_due(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(disconnect, "WATCH_AFTER_S", 0.05)
    monitor = DisconnectMonitor()
    short, first, second = Receive(), Receive(), Receive()
    with monitor.watch(short):
        pass
    with monitor.watch(first):
        await asyncio.sleep(0.03)
        with monitor.watch(second):
            async with asyncio.timeout(10):
                await first.called.wait()
                assert not second.called.is_set()
                await second.called.wait()
    assert not short.called.is_set()
    await others_finished()


async def test_errors_pass_through() -> None:
    with pytest.raises(ZeroDivisionError), DisconnectMonitor().watch(Receive()):
        raise ZeroDivisionError


async def test_disconnect_in_the_same_turn_as_the_end_is_ignored() -> None:
    receive = Receive()
    with DisconnectMonitor().watch(receive):
        await receive.called.wait()
        receive.disconnect()
    await others_finished()


async def test_cancellation_from_outside_is_not_a_disconnect() -> None:
    receive = Receive()

    async def work() -> None:
        with DisconnectMonitor().watch(receive):
            await asyncio.Event().wait()

    task = asyncio.create_task(work())
    await receive.called.wait()
    task.cancel()
    with pytest.raises(asyncio.CancelledError):
        await task
    await others_finished()
