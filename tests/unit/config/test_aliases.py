"""Aliases: which of them a name is, and what is listed."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
from pydantic import ValidationError

from xgen_proxy.config.aliases import MOST, Models
from xgen_proxy.config.loading import ConfigSources, doubts
from xgen_proxy.request.features import UsedAlias

TABLE: dict[str, Any] = {
    "gpt-4o": "large",
    "claude-*": "large",
    "claude-*haiku*": {"model": "org/small", "route": "cpu", "urgency": "low"},
    "claude-opus-*": {"model": "large", "route": "gpu"},
    "claude-haiku-special": "special",
    "odd[1]?*": "large",
}
SERVED = {"large", "org/small", "claude-distilled"}


def find(name: str, aliases: dict[str, Any] = TABLE) -> UsedAlias | None:
    return Models(aliases=aliases).find(name, SERVED.__contains__)


@pytest.mark.parametrize(
    ("name", "pattern"),
    [
        ("gpt-4o", "gpt-4o"),
        ("gpt-4o-mini", None),
        ("claude-sonnet-4-5", "claude-*"),
        ("claude-3-5-haiku-20241022", "claude-*haiku*"),
        ("claude-haiku-special", "claude-haiku-special"),
        ("claude-opus-4-1", "claude-opus-*"),
        ("claude-", "claude-*"),
        ("Claude-opus", None),
        ("my-claude-opus-4", None),
        ("claude-distilled", None),  # a backend serves it
        ("odd[1]?x", "odd[1]?*"),
        ("odd1xx", None),  # no character but * is special
    ],
)
def test_the_most_specific_alias_wins(name: str, pattern: str | None) -> None:
    used = find(name)
    assert (used.pattern if used else None) == pattern
    assert used is None or used.asked == name


def test_an_alias_says_what_kind_of_work_comes() -> None:
    assert find("claude-haiku-4-5") == UsedAlias("claude-haiku-4-5", "claude-*haiku*", "org/small", "cpu", "low")
    assert find("claude-x") == UsedAlias("claude-x", "claude-*", "large", None, None)


def test_a_pattern_for_all_names_hides_no_model() -> None:
    everything = {"*": "large", "org/small": {"model": "org/small", "route": "cpu"}}
    used = find("anything", everything)
    assert used is not None
    assert used.model == "large"
    assert find("large", everything) is None
    small = find("org/small", everything)
    assert small is not None, "a name in full may give a model's own name a route"
    assert (small.model, small.route) == ("org/small", "cpu")


def test_names_that_clients_may_choose() -> None:
    assert Models(aliases=TABLE).names() == {
        "gpt-4o": "large",
        "claude-xgen-large": "large",
        "claude-haiku-xgen-org-small": "org/small",
        "claude-opus-xgen-large": "large",
        "claude-haiku-special": "special",
        "odd[1]?xgen-large": "large",
    }
    assert Models(aliases={"*": "large", "a*": "x", "a-xgen-*": "y"}).names() == {"a-xgen-xgen-y": "y"}


BAD: list[tuple[dict[str, Any], str]] = [
    ({"": "m"}, "1 to 128 characters"),
    ({"a b": "m"}, "without spaces"),
    ({"모델": "m"}, "ASCII"),
    ({"a" * 129: "m"}, "1 to 128"),
    ({"a": ""}, "at least 1 character"),
    ({"a": {"route": "cpu"}}, "model"),
    ({"a": {"model": "m", "route": "tpu"}}, "'gpu' or 'cpu'"),
    ({"a": {"model": "m", "urgency": "none"}}, "'high', 'normal' or 'low'"),
    ({"a": {"model": "m", "backend": "vllm"}}, "backend"),
    ({"a": "b", "b": "m"}, "'a' stands for 'b', which is an alias too"),
    ({f"a{n}": "m" for n in range(MOST + 1)}, f"at most {MOST}"),
]


@pytest.mark.parametrize(("aliases", "words"), BAD, ids=[words for _, words in BAD])
def test_what_is_wrong_is_said(aliases: dict[str, Any], words: str) -> None:
    with pytest.raises(ValidationError, match=words):
        Models(aliases=aliases)


def sources(tmp_path: Path, toml: str, **models: dict[str, str]) -> ConfigSources:
    path = tmp_path / "xgen-proxy.toml"
    path.write_text(toml)
    backends = {"vllm": {"urls": "http://127.0.0.1:1", **models}, "llama_cpp": {"urls": "http://127.0.0.1:2", **models}}
    return ConfigSources({"backends": backends}, path)


TOML = """
[models.aliases]
"gpt-4.1" = "chat"

[models.aliases."claude-haiku-*"]
model = "small"
route = "cpu"
"""


def test_each_part_of_an_alias_has_its_source(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("XGEN_MODELS__ALIASES", json.dumps({"claude-haiku-*": {"urgency": "low"}, "o*": "chat"}))
    loaded = sources(tmp_path, TOML)
    explained = {setting: (value, source) for setting, value, source in loaded.explain(loaded.load())}
    file = str(tmp_path / "xgen-proxy.toml")
    assert explained["models.aliases.gpt-4.1.model"] == ("chat", file)
    assert explained["models.aliases.claude-haiku-*.model"] == ("small", file)
    assert explained["models.aliases.claude-haiku-*.urgency"] == ("low", "environment")
    assert explained["models.aliases.o*.model"] == ("chat", "environment")


def test_an_alias_of_nothing_is_doubted_only_where_the_settings_name_all_models(tmp_path: Path) -> None:
    assert list(doubts(sources(tmp_path, TOML).load())) == []
    assert list(doubts(sources(tmp_path, TOML, models={"chat": "c"}).load())) == [
        "models.aliases.claude-haiku-*: no backend serves 'small'; there are chat"
    ]
