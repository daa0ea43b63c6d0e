"""The model of `make run`: the default one, or the one that the user named."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path

import pytest

from backends.models import given_model
from tests.support.tiny_gguf import tiny_gguf
from xgen_proxy.models.errors import ModelError


def test_a_given_model_is_checked_to_its_end(tmp_path: Path) -> None:
    file = tmp_path / "m.gguf"
    with pytest.raises(ModelError, match=r"there is no model file .*m\.gguf"):
        given_model(file)
    file.write_bytes(b"<html>" * 10)
    with pytest.raises(ModelError, match="is not a GGUF file"):
        given_model(file)
    assert given_model(tiny_gguf(file)) == file
    file.write_bytes(file.read_bytes()[:-5000])
    with pytest.raises(ModelError, match="is cut short"):
        given_model(file)


def test_a_folder_is_no_model(tmp_path: Path) -> None:
    with pytest.raises(ModelError, match="there is no model file"):
        given_model(tmp_path)


def test_an_unreadable_file_is_reported() -> None:
    with pytest.raises(ModelError, match="/proc/self/mem"):
        given_model(Path("/proc/self/mem"))


def test_the_command_prints_only_the_path(tmp_path: Path) -> None:
    """The Makefile reads the path from its standard output."""
    code = f"""
import pathlib, sys
from backends import models
models.default_model = lambda: pathlib.Path({str(tmp_path)!r})
sys.exit(models.main())
"""
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert done.stdout == f"{tmp_path}\n"
