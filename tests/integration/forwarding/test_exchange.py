from __future__ import annotations

from tests.support.fake_upstream import FakeUpstream, Talk, whole
from tests.support.running_proxy import RunningProxy, chat, text_of


def test_a_reused_connection_that_died_costs_no_attempt(proxy: RunningProxy, gpu: FakeUpstream) -> None:
    async def answer_and_close_later(talk: Talk) -> None:
        await talk.answer(200, whole())
        data = await talk.reader.read(1)  # the next request begins: close without a byte
        assert data
        talk.reset()

    gpu.scripts.append(answer_and_close_later)
    assert chat(proxy).status_code == 200
    again = chat(proxy)
    assert again.headers["x-backend"] == "vllm"
    assert again.headers["x-attempts"] == "1"


def test_connections_are_reused(proxy: RunningProxy, gpu: FakeUpstream) -> None:
    for _ in range(5):
        assert text_of(chat(proxy, stream=True)) == "hello"
    [replica] = [each for each in proxy.gateway.fleet.replicas if each.backend_name == "vllm"]
    assert replica.pool.opened == 1


def test_only_our_headers_pass_in_either_direction(proxy: RunningProxy, gpu: FakeUpstream) -> None:
    async def chatty(talk: Talk) -> None:
        await talk.answer(200, whole(), "server: evil\r\nset-cookie: a=b\r\nx-internal: 1\r\n")

    gpu.scripts.append(chatty)
    given = {
        "x-conversation-id": "abc", "authorization": "Bearer secret", "x-request-id": "mine-1", "cookie": "c=d",
        "traceparent": "00-0af7651916cd43dd8448eb211c80319c-b7ad6b7169203331-01",
    }  # fmt: skip
    answer = chat(proxy, headers=given)
    assert answer.headers["x-request-id"] == "mine-1"
    assert not {"server", "set-cookie", "x-internal"} & set(answer.headers)
    sent = gpu.talks[0].headers
    assert sent["x-request-id"] == "mine-1"
    assert sent["traceparent"].startswith("00-0af7")
    assert not {"x-conversation-id", "authorization", "cookie"} & set(sent)
