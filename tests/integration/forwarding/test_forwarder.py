from __future__ import annotations

import json
import socket

from tests.support.fake_upstream import FakeUpstream, Talk, delta
from tests.support.running_proxy import CHAT, RunningProxy
from tests.support.waiting import wait_until


def test_a_client_that_disconnects_cancels_the_request_upstream(proxy: RunningProxy, gpu: FakeUpstream) -> None:
    cancelled: list[bool] = []

    async def endless(talk: Talk) -> None:
        await talk.start_stream()
        await talk.event(delta("hel"))
        await talk.until_client_leaves()
        cancelled.append(True)

    for stream in (True, False):
        gpu.scripts.append(endless)
        body = json.dumps({**CHAT, "stream": stream}).encode()
        head = f"POST /v1/chat/completions HTTP/1.1\r\nhost: x\r\ncontent-length: {len(body)}\r\n\r\n"
        with socket.create_connection(("127.0.0.1", proxy.port)) as client:
            client.sendall(head.encode() + body)
            wait_until(lambda: gpu.talks)
        wait_until(lambda: cancelled, seconds=1)
        gpu.talks.clear()
        cancelled.clear()
        wait_until(lambda: not any(replica.in_flight for replica in proxy.gateway.fleet.replicas), seconds=1)
