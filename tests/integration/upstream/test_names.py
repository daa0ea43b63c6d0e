"""Host names of backends, with a name server that hangs, fails or forgets, on both event loops."""

from __future__ import annotations

import asyncio
import contextlib
import socket
import threading
from collections.abc import Iterator
from typing import Any

import pytest

from tests.support.raw_server import OK, REQUEST, answers, ask, serving, until
from xgen_proxy.errors import UpstreamConnectError, UpstreamLocalError
from xgen_proxy.upstream import names
from xgen_proxy.upstream.names import is_address
from xgen_proxy.upstream.pool import Pool

real = socket.getaddrinfo


class Resolver:
    """In place of getaddrinfo(). A name in `hanging` blocks its thread until release(); `failing` raise this error."""

    def __init__(self) -> None:
        self.addresses: dict[str, list[str]] = {"engine.test": ["127.0.0.1"]}
        self.hanging: set[str] = set()
        self.failing: dict[str, int] = {}
        self.lookups: list[str] = []
        self.released = threading.Event()

    def __call__(self, name: str, port: Any, *rest: Any, **more: Any) -> Any:
        if is_address(name):
            return real(name, port, *rest, **more)
        self.lookups.append(name)
        if name in self.hanging:
            self.released.wait(30)
        if name in self.failing:
            raise socket.gaierror(self.failing[name], "failed")
        return [(socket.AF_INET, socket.SOCK_STREAM, 6, "", (each, 0)) for each in self.addresses.get(name, ())]

    def release(self) -> None:
        self.hanging.clear()
        self.released.set()


@pytest.fixture
def resolver(monkeypatch: pytest.MonkeyPatch) -> Iterator[Resolver]:
    resolver = Resolver()
    monkeypatch.setattr(socket, "getaddrinfo", resolver)
    monkeypatch.setattr(names, "HANGING_S", 0.01)
    yield resolver
    resolver.release()


def named(pool: Pool, name: str = "engine.test") -> Pool:
    return Pool(name, pool.port, connect_timeout_s=10)


async def lost(pool: Pool) -> None:
    """Close the connections, so that the next request needs an address again."""
    pool.close()
    await until(lambda: not pool.live)


async def test_names_that_hang_take_no_thread_from_another(resolver: Resolver) -> None:
    hanging = [Pool(f"hangs{number}.test", 80) for number in range(50)]
    resolver.hanging = {each.host for each in hanging}
    async with serving(answers(OK)) as server:
        asked = [asyncio.create_task(ask(each)) for each in hanging for _ in range(3)]
        await until(lambda: len(resolver.lookups) == len(hanging))
        pool = named(server)
        assert await ask(pool) == (200, b"ok")
        await lost(pool)
    for each in asked:
        each.cancel()
    await asyncio.gather(*asked, return_exceptions=True)
    assert sorted(set(resolver.lookups)) == sorted({*resolver.hanging, "engine.test"})
    assert len(resolver.lookups) == len(hanging) + 1, "a name that hangs has one lookup, however often it is needed"


async def test_a_name_that_hangs_is_a_connection_that_fails(resolver: Resolver) -> None:
    resolver.hanging = {"engine.test"}
    with pytest.raises(UpstreamConnectError, match=r"no connection within 0\.05 s"):
        await Pool("engine.test", 80, connect_timeout_s=0.05).exchange(REQUEST, 10)


@pytest.mark.parametrize("trouble", ["it hangs", "no name server answers"])
async def test_the_last_known_addresses_are_used_meanwhile(resolver: Resolver, trouble: str) -> None:
    async with serving(answers(OK)) as server:
        pool = named(server)
        assert await ask(pool) == (200, b"ok")
        if trouble == "it hangs":
            resolver.hanging = {"engine.test"}
        else:
            resolver.failing = {"engine.test": socket.EAI_AGAIN}
        for _ in range(3):
            await lost(pool)
            assert await ask(pool) == (200, b"ok")
        await lost(pool)
        assert len(resolver.lookups) == (2 if trouble == "it hangs" else 4)


async def test_a_late_answer_is_used(resolver: Resolver) -> None:
    async with serving(answers(OK)) as server:
        pool = named(server)
        resolver.addresses["engine.test"] = ["127.0.0.3"]  # nothing listens there
        with pytest.raises(UpstreamConnectError):
            await ask(pool)
        resolver.addresses["engine.test"] = ["127.0.0.1"]
        resolver.hanging = {"engine.test"}
        with pytest.raises(UpstreamConnectError):
            await ask(pool)
        resolver.release()
        for _ in range(1000):
            with contextlib.suppress(UpstreamConnectError):
                assert await ask(pool) == (200, b"ok")
                break
            await asyncio.sleep(0.005)
        await lost(pool)


async def test_a_name_that_is_gone_has_no_address(resolver: Resolver) -> None:
    async with serving(answers(OK)) as server:
        pool = named(server)
        assert await ask(pool) == (200, b"ok")
        await lost(pool)
        resolver.failing = {"engine.test": socket.EAI_NONAME}
        with pytest.raises(UpstreamConnectError):
            await ask(pool)


async def test_each_address_of_a_name_is_tried(resolver: Resolver) -> None:
    """localhost has two on most machines, and a server listens on one of them only."""
    resolver.addresses["engine.test"] = ["127.0.0.3", "127.0.0.1"]
    async with serving(answers(OK)) as server:
        pool = named(server)
        assert await ask(pool) == (200, b"ok")
        await lost(pool)


async def test_a_request_that_is_cancelled_ends_the_lookup_of_no_other(resolver: Resolver) -> None:
    resolver.hanging = {"engine.test"}
    async with serving(answers(OK)) as server:
        pool = named(server)
        first, second = asyncio.create_task(ask(pool)), asyncio.create_task(ask(pool))
        await until(lambda: resolver.lookups)
        first.cancel()
        await asyncio.wait([first])
        resolver.release()
        assert await second == (200, b"ok")
        await lost(pool)
    assert resolver.lookups == ["engine.test"]


@pytest.mark.parametrize("name", ["a" * 64, "a..b", "é" * 70, "\ud800"])
async def test_a_name_that_cannot_be_one(name: str) -> None:
    with pytest.raises(UpstreamConnectError):
        await Pool(name, 80).exchange(REQUEST, 10)


async def test_no_thread_left_is_our_own_failure(monkeypatch: pytest.MonkeyPatch) -> None:
    def no_more(_: object) -> None:
        raise RuntimeError("can't start new thread")

    monkeypatch.setattr(threading.Thread, "start", no_more)
    with pytest.raises(UpstreamLocalError):
        await Pool("engine.test", 80).exchange(REQUEST, 10)


@pytest.mark.parametrize(
    ("host", "expected"),
    [("127.0.0.1", True), ("::1", True), ("fe80::1%eth0", True), ("localhost", False), ("1.2.3", False), ("", False)],
)
def test_what_is_an_address(host: str, expected: bool) -> None:
    assert is_address(host) is expected
