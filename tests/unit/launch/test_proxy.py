"""Which model is chosen, and what is refused. tests/integration/launch asks a running proxy."""

from __future__ import annotations

from pathlib import Path

import pytest

from xgen_proxy.launch.proxy import LaunchUsageError, Model, check_url, choose, default_url, doubt, read_model

CHAT = Model("chat", 32_768, frozenset({"generation"}))
TOOLS = Model("tools", 8_192, frozenset({"generation", "tools"}))
LONG = Model("long", 40_960, frozenset({"generation", "tools"}))
UNKNOWN = Model("unknown")


@pytest.mark.parametrize(
    ("models", "tools", "chosen"),
    [
        ([CHAT, TOOLS, LONG], True, LONG),
        ([CHAT, TOOLS, LONG], False, CHAT),
        ([CHAT], True, CHAT),
        ([UNKNOWN, TOOLS], True, TOOLS),
        ([UNKNOWN], True, UNKNOWN),
        ([Model("claude-x", 99_999, alias_of="long"), LONG], True, LONG),
        ([Model("claude-x", 99_999, alias_of="long")], False, Model("claude-x", 99_999, alias_of="long")),
        ([], True, None),
        ([], False, None),
    ],
)
def test_choose(models: list[Model], tools: bool, chosen: Model | None) -> None:
    assert choose(models, tools=tools) == chosen


def test_doubt() -> None:
    assert doubt(LONG, [LONG], tools=True) is None
    assert doubt(CHAT, [CHAT], tools=False) is None
    assert doubt(TOOLS, [TOOLS], tools=False) is None
    assert "the context of tools is 8,192 tokens, and agents need 32,000" in (doubt(TOOLS, [TOOLS], tools=True) or "")
    assert "no backend that serves chat can call tools" in (doubt(CHAT, [CHAT], tools=True) or "")
    assert "does not list the model claude-x (it lists chat, tools)" in (
        doubt(Model("claude-x"), [CHAT, TOOLS], tools=True) or ""
    )


@pytest.mark.parametrize(
    ("given", "url"),
    [
        ("http://a:8080", "http://a:8080"),
        ("http://a:8080/", "http://a:8080"),
        ("https://a/v1", "https://a"),
        ("https://a/llm/v1/", "https://a/llm"),
        ("http://[::1]:8080", "http://[::1]:8080"),
    ],
)
def test_url(given: str, url: str) -> None:
    assert check_url(given) == url


@pytest.mark.parametrize("given", ["", "a:8080", "ftp://a", "http://", "http://a\n", "http://[::1"])
def test_wrong_url(given: str) -> None:
    with pytest.raises(LaunchUsageError, match="write http://HOST:PORT"):
        check_url(given)


@pytest.mark.parametrize(
    ("variables", "url"),
    [
        ({}, "http://127.0.0.1:8080"),
        ({"XGEN_PORT": "81"}, "http://127.0.0.1:81"),
        ({"XGEN_PORT": "0"}, "http://127.0.0.1:8080"),
        ({"XGEN_HOST": "0.0.0.0", "XGEN_PORT": "81"}, "http://127.0.0.1:81"),
        ({"XGEN_HOST": "::1"}, "http://[::1]:8080"),
        ({"XGEN_HOST": "10.0.0.7"}, "http://10.0.0.7:8080"),
        ({"XGEN_PORT": "many"}, "http://127.0.0.1:8080"),
    ],
)
def test_default_url(variables: dict[str, str], url: str, monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.chdir(tmp_path)
    for name, value in variables.items():
        monkeypatch.setenv(name, value)
    assert default_url() == url


def test_default_url_of_a_file(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.chdir(tmp_path)
    Path("xgen-proxy.toml").write_text("port = 82\n")
    assert default_url() == "http://127.0.0.1:82"
    Path("xgen-proxy.toml").write_text("port = ")
    assert default_url() == "http://127.0.0.1:8080"


def test_read_model() -> None:
    card = {"id": "m", "max_model_len": 2048, "capabilities": ["tools"], "object": "model"}
    assert read_model(card) == Model("m", 2048, frozenset({"tools"}))
    assert read_model({"id": "gpt", "object": "model"}).can("tools"), "another server of the API tells nothing"


@pytest.mark.parametrize("card", [{}, {"id": 5}, {"id": "a\nrm -rf ."}, {"id": "\x1b[2J"}, "m"])
def test_card_that_is_none(card: object) -> None:
    with pytest.raises((ValueError, LookupError, TypeError)):
        read_model(card)
