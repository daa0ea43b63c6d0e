"""Small questions to a replica: one deadline and one size cap for all of the answer."""

from __future__ import annotations

import asyncio
import contextlib
import gzip
import socket
import time
from collections.abc import Iterator
from typing import Any

import pytest

from tests.support.fake_upstream import FakeUpstream, Talk, silent, status
from xgen_proxy.config.settings import Settings
from xgen_proxy.errors import UpstreamError, UpstreamProtocolError, UpstreamTimeoutError
from xgen_proxy.fleet import replica as module
from xgen_proxy.fleet.backend import Fleet
from xgen_proxy.fleet.replica import Replica


@pytest.fixture
def fake() -> Iterator[FakeUpstream]:
    made = FakeUpstream()
    yield made
    made.close()


def replica_of(fake: FakeUpstream, **values: Any) -> Replica:
    [made] = Fleet(Settings(backends={"b": {"urls": [fake.url], "dialect": "vllm", **values}})).replicas
    return made


async def test_get_and_post(fake: FakeUpstream) -> None:
    replica = replica_of(fake, api_key="hush")
    fake.default = status(201, {"ok": True})
    checked: list[Talk] = []

    async def answer_check(talk: Talk) -> None:
        checked.append(talk)
        await talk.answer(204, b"")

    fake.answer_check = answer_check  # type: ignore[method-assign]
    assert await replica.ask("/metrics", timeout_s=5) == (204, b"")
    assert await replica.ask("/v1/completions", {"prompt": "1"}, timeout_s=5) == (201, b'{"ok":true}')
    assert await replica.post_json("/v1/completions", {"prompt": "1"}) == (201, {"ok": True})
    assert fake.talks[0].json == {"prompt": "1"}
    for talk in (*checked, *fake.talks):
        assert (talk.headers["accept-encoding"], talk.headers["authorization"]) == ("identity", "Bearer hush")
    assert fake.connections == 1, "the connection is reused"
    assert replica.pool.opened == 0, "and none is taken from requests"
    replica.close()


async def test_compressed_answer_stays_compressed(fake: FakeUpstream) -> None:
    page = gzip.compress(bytes(2**20))
    fake.default = status(200, page, headers="content-encoding: gzip\r\n")
    assert await replica_of(fake).ask("/x", {}, timeout_s=5) == (200, page)


async def drips(talk: Talk) -> None:
    await talk.start_stream()
    for _ in range(200):
        await talk.chunk(b"#")
        await asyncio.sleep(0.02)


@pytest.mark.parametrize("script", [silent, drips])
async def test_the_deadline_is_for_the_whole_answer(fake: FakeUpstream, script: Any) -> None:
    replica = replica_of(fake)
    fake.default = script
    before = time.monotonic()
    with pytest.raises(UpstreamTimeoutError, match=r"/x was not answered within 0.2 s"):
        await replica.ask("/x", {}, timeout_s=0.2)
    assert time.monotonic() - before < 2
    fake.default = status(200, [1])
    assert await replica.ask("/x", {}, timeout_s=5) == (200, b"[1]")


async def test_the_deadline_includes_connecting() -> None:
    with contextlib.ExitStack() as sockets:
        full = sockets.enter_context(socket.socket())
        full.bind(("127.0.0.1", 0))
        full.listen(0)
        for _ in range(4):  # more than its backlog holds, and nothing accepts them
            client = sockets.enter_context(socket.socket())
            client.setblocking(False)
            client.connect_ex(full.getsockname())
        url = f"http://127.0.0.1:{full.getsockname()[1]}"
        [replica] = Fleet(Settings(backends={"b": {"urls": [url], "dialect": "vllm"}})).replicas
        before = time.monotonic()
        with pytest.raises(UpstreamTimeoutError):
            await replica.ask("/x", timeout_s=0.2)
        assert time.monotonic() - before < 2


async def test_the_answer_has_a_size_limit(fake: FakeUpstream, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(module, "ANSWER_BYTES", 1000)
    fake.default = status(200, b"x" * 1000)
    assert (await replica_of(fake).ask("/x", {}, timeout_s=5))[0] == 200
    fake.default = status(200, b"x" * 1001)
    with pytest.raises(UpstreamError):
        await replica_of(fake).ask("/x", {}, timeout_s=5)


async def test_post_json_wants_json(fake: FakeUpstream) -> None:
    fake.default = status(404, b"<html>")
    with pytest.raises(UpstreamProtocolError, match="/x did not answer with JSON"):
        await replica_of(fake).post_json("/x", {})
