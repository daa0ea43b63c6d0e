"""The flags of `models compare`, and what is refused before anything runs."""

from __future__ import annotations

import argparse
import json
import os
from pathlib import Path
from typing import Any

import pytest

from tests.unit.models.compare.results import result
from xgen_proxy.gguf.header import GgufFile, Tensor
from xgen_proxy.models.compare import commands
from xgen_proxy.models.compare.plan import Plan
from xgen_proxy.models.errors import ModelError, UsageError


def parse(*argv: str) -> argparse.Namespace:
    parser = argparse.ArgumentParser()
    commands.add_compare(parser.add_subparsers(required=True))
    return parser.parse_args(["compare", *argv])


def test_a_base_is_compared_too_and_only_once() -> None:
    assert commands.planned(parse("a.gguf", "--base", "b.gguf")).models == (Path("b.gguf"), Path("a.gguf"))
    plan = commands.planned(parse("a.gguf", "./b.gguf", "--base", "b.gguf"))
    assert (plan.models, plan.base) == ((Path("a.gguf"), Path("b.gguf")), Path("b.gguf"))


def test_without_a_base_the_most_exact_file_is_it(monkeypatch: pytest.MonkeyPatch) -> None:
    def read(path: Path) -> GgufFile:
        return GgufFile(path, 100, {}, (Tensor("w", "", (100,), 200 if path.stem == "b" else 50, 0),))

    monkeypatch.setattr(commands, "read_model", read)
    assert commands.planned(parse("a.gguf", "b.gguf")).base == Path("b.gguf")
    with pytest.raises(ModelError, match="two models, or a model and --base"):
        commands.planned(parse("a.gguf"))


def test_the_command_can_be_typed_again() -> None:
    words = commands.words(parse("a.gguf", "--base", "b.gguf", "--answers", "0"))
    assert words[:4] == ["xgen-proxy", "models", "compare", "a.gguf"]
    assert " ".join(words[4:]) == "--base b.gguf --context 512 --repeat 5 --answers 0"
    assert vars(parse(*words[3:])) == vars(parse("a.gguf", "--base", "b.gguf", "--answers", "0"))


@pytest.mark.parametrize("flag", ["--context", "--windows", "--repeat", "--threads"])
def test_numbers_are_positive(flag: str, capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit) as raised:
        parse("a.gguf", flag, "0")
    assert raised.value.code == 2
    assert "not a number of at least" in capsys.readouterr().err


def test_what_cannot_be_written_is_refused_first(tmp_path: Path) -> None:
    with pytest.raises(ModelError, match="there is no folder"):
        commands.run_compare(parse("a.gguf", "b.gguf", "--json", str(tmp_path / "none" / "a.json")))
    with pytest.raises(ModelError, match=r"must end in \.svg or \.png"):
        commands.run_compare(parse("a.gguf", "b.gguf", "--plot", str(tmp_path / "a.jpg")))


@pytest.mark.parametrize(
    ("flag", "value"),
    [("base", "b"), ("context", "32"), ("windows", "1"), ("repeat", "1"), ("answers", "0"), ("threads", "1"),
     ("plot", "a.svg")],
)  # fmt: skip
def test_engines_have_no_flags_of_files(flag: str, value: str) -> None:
    with pytest.raises(UsageError, match=f"--{flag} is for files; see `xgen-proxy models distance --help`"):
        commands.run_compare(parse("--served", "http://a", "http://b", f"--{flag}", value))


def test_a_missing_package_is_named(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(commands, "find_spec", lambda name: None)
    with pytest.raises(
        ModuleNotFoundError, match=r"needs llama_cpp: pip install '\.\[models\]' in a checkout of xgen-proxy"
    ):
        commands.run_compare(parse("a.gguf", "b.gguf"))


def test_everything_is_written(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    def compare(plan: Plan) -> dict[str, Any]:
        assert plan.context == 128
        return result(Q8=(145, 0.99, 0.98))

    monkeypatch.setattr(commands, "compare", compare)
    for name in ("a.json", "a.svg"):
        (tmp_path / name).write_text("old")
        os.link(tmp_path / name, tmp_path / f"old-{name}")
    flags = ("--context", "128", "--json", str(tmp_path / "a.json"), "--plot", str(tmp_path / "a.svg"))
    assert commands.run_compare(parse("a.gguf", "--base", "b.gguf", *flags)) == 0
    written = json.loads((tmp_path / "a.json").read_text())
    assert written["conditions"]["command"].startswith("xgen-proxy models compare a.gguf --base b.gguf")
    assert written["advice"].startswith("Q8 (145 MB")
    assert "<svg" in (tmp_path / "a.svg").read_text()
    assert [(tmp_path / f"old-{name}").read_text() for name in ("a.json", "a.svg")] == ["old"] * 2, (
        "renamed, not rewritten"
    )
    assert "same top token, %" in capsys.readouterr().out
