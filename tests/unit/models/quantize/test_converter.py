"""The converter, played by a script: its progress, its failure, and its absence. tests/e2e runs llama.cpp's own."""

from __future__ import annotations

from pathlib import Path

import pytest

from tests.support.tiny_gguf import tiny_gguf
from xgen_proxy.models.errors import ModelError, UsageError
from xgen_proxy.models.quantize import converter
from xgen_proxy.models.quantize.converter import convert, find_converter


def script(path: Path, text: str) -> list[str]:
    path.write_text(f"#!/bin/sh\n{text}\n")
    path.chmod(0o755)
    return [str(path)]


def test_its_output_is_the_model(tmp_path: Path) -> None:
    model = tiny_gguf(tmp_path / "tiny.gguf")
    command = script(tmp_path / "convert", f'printf "Writing:  50%%\\r"; echo "$@" >&2; cp {model} "$3"')
    convert(command, tmp_path, tmp_path / "made.gguf")
    assert (tmp_path / "made.gguf").read_bytes() == model.read_bytes()


def test_its_failure_is_told_in_its_words(tmp_path: Path) -> None:
    command = script(tmp_path / "convert", "echo 'Model FooForCausalLM is not supported' >&2; exit 1")
    with pytest.raises(
        ModelError, match=r"could not convert .*\(exit status 1\)(.|\n)*FooForCausalLM is not supported"
    ):
        convert(command, tmp_path, tmp_path / "made.gguf")


def test_a_missing_converter(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(converter, "PROGRAM", "no-such-program")
    with pytest.raises(UsageError, match=r"pip install '\.\[convert\]' in a checkout of xgen-proxy"):
        find_converter(None)
    with pytest.raises(UsageError, match="correct --converter"):
        find_converter("no-such-program --flag")
    assert find_converter("sh -x") == ["sh", "-x"]
