"""Paths as people type them."""

from __future__ import annotations

from collections.abc import Iterator

import httpx
import pytest

from tests.support.fake_upstream import FakeUpstream
from tests.support.running_proxy import CHAT, RunningProxy, backend, get, post, running_proxy
from xgen_proxy.api.paths import LONGEST, canonical, similar

CHAT_ROUTE = "/v1/chat/completions"
ROUTES = (CHAT_ROUTE, "/v1/completions", "/v1/embeddings", "/v1/models", "/generate", "/health", "/models/status", "/")


@pytest.fixture(scope="module")
def proxy() -> Iterator[RunningProxy]:
    fake = FakeUpstream()
    with running_proxy(backends={"vllm": backend(fake)}) as running:
        yield running
    fake.close()


TYPED = [
    "/v1/chat/completions/", "//v1/chat/completions", "/v1//chat/completions//", "/v1/v1/chat/completions",
    "/v1/v1/v1/chat/completions", "/chat/completions", "//chat/completions/",
]  # fmt: skip


@pytest.mark.parametrize("path", TYPED)
def test_typed_paths_are_answered(proxy: RunningProxy, path: str) -> None:
    assert canonical(path) == CHAT_ROUTE
    with httpx.Client(verify=False, timeout=20) as client:
        url = httpx.URL(proxy.url).copy_with(raw_path=path.encode())
        assert client.post(url, json=CHAT).status_code == 200
        assert client.get(url).status_code == 405


@pytest.mark.parametrize(
    ("path", "status"),
    [("/v1/models/", 200), ("/models", 200), ("/health/", 200), ("/v1/models/m/", 200), ("/models/status/", 200)],
)
def test_other_routes_too(proxy: RunningProxy, path: str, status: int) -> None:
    assert get(proxy.url + path).status_code == status


@pytest.mark.parametrize("path", [*ROUTES, "/v1/models/org/big", "/v1", "/generate/stream", "/" + "/" * LONGEST])
def test_other_paths_stay_as_they_are(path: str) -> None:
    assert canonical(path) == path


MEANT = {
    "/v1/chat/completion": CHAT_ROUTE,
    "/V1/Chat/Completions": CHAT_ROUTE,
    "/api/v1/chat/completions": CHAT_ROUTE,
    "/openai/deployments/gpt-4/chat/completions": CHAT_ROUTE,
    "/v1/health": "/health",
    "/v2/embeddings/": "/v1/embeddings",
}


@pytest.mark.parametrize(("path", "meant"), MEANT.items())
def test_a_404_points_at_the_route_that_is_meant(proxy: RunningProxy, path: str, meant: str) -> None:
    assert similar(path, ROUTES) == meant
    answer = post(proxy.url + path, json=CHAT)
    assert answer.status_code == 404
    assert f"did you mean {meant}?" in answer.json()["error"]["message"]


def test_a_404_of_anything_else_names_the_api(proxy: RunningProxy) -> None:
    for path in ("/v1", "/wp-login.php", "/" + "a" * 20_000):
        message = get(proxy.url + path).json()["error"]["message"]
        assert "/v1/chat/completions" in message
        assert len(message) < 400


def test_the_host_does_not_matter_for_a_404(proxy: RunningProxy) -> None:
    assert get(f"{proxy.url}/nowhere", headers={"host": "["}).status_code == 404


def test_the_root_says_what_this_is(proxy: RunningProxy) -> None:
    answer = get(proxy.url)
    assert answer.json()["name"] == "xgen-proxy"
    links = answer.json()["links"]
    assert {"/docs", "/health", "/metrics"} <= {*links}
    for link in links:
        assert get(proxy.url + link).status_code == 200
    head = httpx.head(proxy.url, verify=False)
    assert (head.status_code, head.content) == (200, b"")
