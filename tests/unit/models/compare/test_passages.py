"""The shipped texts, the prompts, and the windows."""

from __future__ import annotations

from collections import Counter
from pathlib import Path

import pytest

from xgen_proxy.models.compare.passages import LANGUAGES, SHIPPED, prompts, texts, windows
from xgen_proxy.models.errors import ModelError


def test_three_languages_are_shipped_and_their_source_is_told() -> None:
    found = texts(None)
    assert tuple(found) == LANGUAGES
    assert all(len(text) > 2000 for text in found.values())
    assert "다." in found["korean"]
    sources = (SHIPPED / "SOURCES.md").read_text()
    assert [file.name for file in SHIPPED.glob("*.txt") if f"`{file.name}`" not in sources] == []


def test_a_text_of_the_user_replaces_them(tmp_path: Path) -> None:
    own = tmp_path / "own.txt"
    own.write_text("words")
    assert texts(own) == {"own.txt": "words"}
    unlucky = tmp_path / "all"  # the name of the total
    unlucky.write_text("words")
    assert texts(unlucky) == {str(unlucky.resolve()): "words"}


def test_a_text_that_cannot_be_read_is_named(tmp_path: Path) -> None:
    with pytest.raises(ModelError, match=r"cannot read .*none\.txt"):
        texts(tmp_path / "none.txt")
    (tmp_path / "latin.txt").write_bytes(b"\xe9t\xe9")
    with pytest.raises(ModelError, match=r"latin\.txt is not text in UTF-8"):
        texts(tmp_path / "latin.txt")


def test_prompts_are_taken_from_all_languages() -> None:
    assert Counter(prompt.language for prompt in prompts(50)) == {"english": 30, "korean": 10, "code": 10}
    assert {prompt.language for prompt in prompts(5)} == set(LANGUAGES)
    assert prompts(0) == []
    assert len({prompt.text for prompt in prompts(50)}) == 50
    with pytest.raises(ModelError, match="there are 50 prompts"):
        prompts(51)


def test_windows_are_whole() -> None:
    tokens = list(range(10))
    assert windows("x", tokens, 4, None) == [[0, 1, 2, 3], [4, 5, 6, 7]]
    assert windows("x", tokens, 4, 1) == [[0, 1, 2, 3]]
    with pytest.raises(ModelError, match=r"the text x has 10 tokens and a window needs 16; .* --context"):
        windows("x", tokens, 16, None)
