from __future__ import annotations

from collections.abc import Callable

import pytest

from tests.support.fake_upstream import FakeUpstream
from tests.support.running_proxy import CHAT, RunningProxy, backend, get, post
from xgen_proxy.api.api_keys import new_key

Start = Callable[..., RunningProxy]


@pytest.mark.parametrize("path", ["/v1/chat/completions", "/v1/completions", "/v1/embeddings", "/generate"])
def test_other_methods_are_refused(proxy: RunningProxy, path: str) -> None:
    answer = get(proxy.url + path)
    assert (answer.status_code, answer.headers["allow"]) == (405, "POST")
    assert answer.json()["error"]["code"] == "method_not_allowed"


def test_the_key_is_checked_before_the_body_is_read(start: Start, gpu: FakeUpstream) -> None:
    key, hash = new_key()
    proxy = start(backends={"vllm": backend(gpu)}, api_keys=[hash])
    url = f"{proxy.url}/v1/chat/completions"
    assert post(url, content=b"{").status_code == 401
    headers = {"authorization": f"Bearer {key}"}
    assert post(url, content=b"{", headers=headers).status_code == 400
    assert post(url, json=CHAT, headers=headers).status_code == 200


def test_a_refusal_carries_the_clients_request_id(proxy: RunningProxy) -> None:
    answer = post(f"{proxy.url}/v1/chat/completions", content=b"{", headers={"x-request-id": "find-me"})
    assert (answer.status_code, answer.headers["x-request-id"]) == (400, "find-me")


def test_a_request_without_an_id_gets_one(proxy: RunningProxy) -> None:
    url = f"{proxy.url}/v1/chat/completions"
    first, second = post(url, json=CHAT).headers["x-request-id"], post(url, json=CHAT).headers["x-request-id"]
    assert first.startswith("req-")
    assert first != second
