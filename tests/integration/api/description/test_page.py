"""/docs, as a browser gets it."""

from __future__ import annotations

from tests.support.running_proxy import RunningProxy, get, post
from xgen_proxy.api.description.page import page


def test_the_page_and_its_policy(proxy: RunningProxy) -> None:
    for path in ("/docs", "/docs/"):
        answer = get(proxy.url + path)
        assert (answer.status_code, answer.headers["content-type"]) == (200, "text/html; charset=utf-8")
        assert (answer.text, answer.headers["content-security-policy"]) == page()
        assert answer.headers["x-content-type-options"] == "nosniff"


def test_it_cannot_be_posted_to(proxy: RunningProxy) -> None:
    answer = post(f"{proxy.url}/docs")
    assert answer.status_code == 405
    assert "GET" in answer.headers["allow"]
