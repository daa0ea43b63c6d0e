from __future__ import annotations

import json

import pytest

from xgen_proxy.request.limits import Limits
from xgen_proxy.request.media.origins import is_listed

LISTED = ("https://images.example.org", "https://*.cdn.example.net", "http://10.0.0.5:8000")


@pytest.mark.parametrize(
    "url",
    [
        "https://images.example.org/a.png",
        "https://images.example.org/",
        "https://images.example.org:443/a%20b.png?x=1&y=(2)#z",
        "HTTPS://Images.Example.ORG/a.png",
        "https://a.cdn.example.net/x",
        "https://a.b.cdn.example.net/x",
        "http://10.0.0.5:8000/x.png",
    ],
)
def test_urls_of_a_listed_origin(url: str) -> None:
    assert is_listed(url, LISTED)


@pytest.mark.parametrize(
    "url",
    [
        "http://images.example.org/a.png",  # another scheme
        "https://images.example.org:8443/a.png",  # another port
        "https://evil.images.example.org/a.png",
        "https://images.example.org.evil.net/a.png",
        "https://imagesXexample.org/a.png",
        "https://cdn.example.net/x",  # not under the domain
        "https://evilcdn.example.net/x",
        "http://10.0.0.5/x.png",
        "http://10.0.0.50:8000/x.png",
        "http://0x0a000005:8000/x.png",
        "http://169.254.169.254/latest/meta-data/",
        "http://127.0.0.1/", "http://localhost/", "http://[::1]/",
        "https://user@images.example.org/a.png",
        "https://user:password@images.example.org/a.png",
        "https://images.example.org@evil.net/",
        "https://images.example.org/@10.0.0.1/",  # llama-server would ask 10.0.0.1
        "https://images.example.org?@evil.net/",
        "https://images.example.org#@evil.net/",
        "https://images.example.org\\@evil.net/",
        "https://images.example.org\\.evil.net/",
        "https://images.example.org%2eevil.net/",
        "https://images.example.org",  # where does the host end?
        "https://images.example.org./a.png",
        "https://images.example.org:/a.png",
        "https://images.example.org:0443/a.png",
        "https://images.example.org:99999999999/a.png",
        "https:///images.example.org/a.png",
        "https:images.example.org/a.png",
        "//images.example.org/a.png",
        " https://images.example.org/a.png",
        "https://images.example.org/a.png ",
        "https://images.example.org/a b.png",
        "https://images.example.org/a\n.png",
        "https://images.example.org/\u00e9.png",
        "https://images.example.or\u0261/a.png",
        "https://images.example.org/" + "a" * 5000,
        "file:///etc/passwd", "ftp://images.example.org/a", "gopher://images.example.org/", "data:,x", "", "x",
    ],
)  # fmt: skip
def test_all_other_urls(url: str) -> None:
    assert not is_listed(url, LISTED)
    assert not is_listed(url, ())


def test_nothing_is_listed_by_default() -> None:
    assert Limits().media_origins == ()


def test_origins_are_a_list_or_have_commas() -> None:
    for value in (list(LISTED), ", ".join(LISTED), json.dumps(LISTED)):
        assert Limits.model_validate({"media_origins": value}).media_origins == LISTED
    assert Limits.model_validate({"media_origins": ""}).media_origins == ()


@pytest.mark.parametrize(
    "origin",
    ["*", "https://*", "https://*.org", "https://*.0.0.1", "https://a.org/", "https://a.org/path", "https://A.org",
     "https://u@a.org", "a.org", "ftp://a.org", "https://a.*.org", "https://[::1]", "https://a.org:0", "data:"],
)  # fmt: skip
def test_what_is_no_origin(origin: str) -> None:
    with pytest.raises(ValueError, match=r"https://HOST"):
        Limits.model_validate({"media_origins": origin})
