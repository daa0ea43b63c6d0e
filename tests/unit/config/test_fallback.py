"""Distances between models: read from the files of the command, and judged by the settings."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest

from xgen_proxy.config.fallback import FORMAT, Fallback, Nearness, read_distances
from xgen_proxy.models.served import commands


def pair(top1: Any = 0.9, first: Any = "vllm", other: Any = "llama_cpp", model: Any = "m") -> dict[str, Any]:
    return {"model": model, "reference": {"backend": first}, "other": {"backend": other}, "all": {"top1": top1}}


def written(path: Path, *pairs: dict[str, Any]) -> Path:
    path.write_text(json.dumps({"format": FORMAT, "pairs": pairs}))
    return path


def test_the_command_writes_the_format_that_is_read() -> None:
    assert commands.FORMAT == FORMAT


def test_a_distance_counts_in_both_directions(tmp_path: Path) -> None:
    one = written(tmp_path / "one.json", pair(0.97))
    other = written(tmp_path / "other.json", pair(1, other="small"))
    assert read_distances([one, other]) == {
        ("vllm", "llama_cpp", "m"): 0.97,
        ("llama_cpp", "vllm", "m"): 0.97,
        ("vllm", "small", "m"): 1.0,
        ("small", "vllm", "m"): 1.0,
    }


@pytest.mark.parametrize(
    "bad",
    [pair(1.1), pair(-0.1), pair(None), pair(True), pair("0.9"), pair(first=""), pair(other=7), pair(other="vllm")],
)
def test_a_pair_that_makes_no_sense_is_refused(tmp_path: Path, bad: dict[str, Any]) -> None:
    path = written(tmp_path / "bad.json", bad)
    with pytest.raises(ValueError, match=r"bad\.json has no distances between models .*write it again with"):
        read_distances([path])


@pytest.mark.parametrize("text", ["", "{", "[]", "null", '{"format": "another"}', f'{{"format": "{FORMAT}"}}', '"x"'])
def test_a_file_of_something_else_is_refused(tmp_path: Path, text: str) -> None:
    path = tmp_path / "bad.json"
    path.write_text(text)
    with pytest.raises(ValueError, match="has no distances between models"):
        Fallback(distances=(path,))


def test_a_missing_file_is_refused(tmp_path: Path) -> None:
    with pytest.raises(ValueError, match=r"gone\.json cannot be read: No such file"):
        Fallback(distances=(tmp_path / "gone.json",))


def test_files_are_separated_by_commas(tmp_path: Path) -> None:
    paths = [written(tmp_path / f"{n}.json", pair()) for n in range(2)]
    assert Fallback.model_validate({"distances": f"{paths[0]}, {paths[1]}"}).distances == tuple(paths)


def test_nothing_is_decided_by_default() -> None:
    assert Fallback().nearness() is None


TOP1 = {("vllm", "llama_cpp", "m"): 0.9}


def judged(least: float | None, other: str = "llama_cpp") -> tuple[bool, str]:
    different = frozenset({("vllm", "alien", "m")})
    judgement = Nearness(least, refuse=True, top1=TOP1, different=different).judge("vllm", other, "m")
    assert bool(judgement.why) == judgement.far or other == "alien"
    return judgement.far, judgement.mark


def test_what_is_near_far_unknown_and_different() -> None:
    assert judged(0.95) == (True, "top1=0.9; far")
    assert judged(0.9) == (False, "top1=0.9")
    assert judged(None) == (False, "top1=0.9")
    assert judged(0.95, "other") == (False, "unknown")
    assert judged(None, "other") == (False, "")
    assert judged(0.95, "alien") == (True, "different model")
    assert judged(None, "alien") == (False, "different model")
