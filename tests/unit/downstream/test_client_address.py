"""The client's address behind trusted and untrusted proxies."""

from __future__ import annotations

import pytest
from pydantic import ValidationError

from xgen_proxy.config.settings import Settings
from xgen_proxy.downstream.client_address import client_address

OURS = ("10.0.0.0/8", "fd00::/8")


def scope(peer: str | None, *forwarded: str) -> dict[str, object]:
    headers = [(b"host", b"x"), *((b"x-forwarded-for", value.encode()) for value in forwarded), (b"accept", b"1.2.3.4")]
    return {"client": (peer, 1234) if peer else None, "headers": headers}


@pytest.mark.parametrize(
    ("peer", "forwarded", "address"),
    [
        ("10.0.0.1", [], "10.0.0.1"),
        ("10.0.0.1", ["192.0.2.1"], "192.0.2.1"),
        ("10.0.0.1", ["198.51.100.9, 192.0.2.1"], "192.0.2.1"),  # the client may have written what is further left
        ("10.0.0.1", ["198.51.100.9, 192.0.2.1, 10.2.2.2"], "192.0.2.1"),
        ("10.0.0.1", ["198.51.100.9", "192.0.2.1"], "192.0.2.1"),
        ("10.0.0.1", ["10.1.1.1, 10.2.2.2"], "10.1.1.1"),
        ("::ffff:10.0.0.1", ["192.0.2.1"], "192.0.2.1"),
        ("fd00::1", ["2001:db8::7"], "2001:db8::7"),
        ("192.0.2.5", ["192.0.2.1"], "192.0.2.5"),
        ("11.0.0.1", ["10.0.0.1"], "11.0.0.1"),
        (None, ["192.0.2.1"], None),
        ("10.0.0.1", ["my secret prompt"], "10.0.0.1"),
        ("10.0.0.1", ["192.0.2.1, fe80::1%my-secret-prompt"], "10.0.0.1"),
        ("10.0.0.1", ["1" * 100_000], "10.0.0.1"),
        ("10.0.0.1", ["192.0.2.1, "], "10.0.0.1"),
        ("10.0.0.1", ["\xe9"], "10.0.0.1"),
    ],
)
def test_address(peer: str | None, forwarded: list[str], address: str | None) -> None:
    assert client_address(scope(peer, *forwarded), OURS) == address


def test_no_proxy_is_trusted_by_default() -> None:
    assert client_address(scope("127.0.0.1", "192.0.2.1"), Settings().trusted_proxies) == "127.0.0.1"


def test_trusted_proxies_setting(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("XGEN_TRUSTED_PROXIES", "10.0.0.7, fd00::/8")
    assert Settings().trusted_proxies == ("10.0.0.7/32", "fd00::/8")
    monkeypatch.setenv("XGEN_TRUSTED_PROXIES", "nginx")
    with pytest.raises(ValidationError, match="'nginx' does not appear to be an IPv4 or IPv6 network"):
        Settings()
