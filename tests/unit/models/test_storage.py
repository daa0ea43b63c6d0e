"""Files that appear whole or not at all."""

from __future__ import annotations

import os
import shutil
import threading
from collections import namedtuple
from pathlib import Path

import pytest

from tests.support.waiting import wait_until
from xgen_proxy.models.errors import ModelError
from xgen_proxy.models.storage import UNFINISHED, alone_in, make_folder, need_space, publish, result_file, scratch_in


def test_a_file_is_renamed_to_its_place(tmp_path: Path) -> None:
    with scratch_in(tmp_path) as scratch:
        (scratch / "m").write_bytes(b"new")
        (tmp_path / "m").write_bytes(b"old")
        publish(scratch / "m", tmp_path / "m")
    assert [path.name for path in tmp_path.iterdir()] == ["m"]
    assert (tmp_path / "m").read_bytes() == b"new"


def test_a_result_is_replaced_when_it_is_whole(tmp_path: Path) -> None:
    path = tmp_path / "result.json"
    path.write_text("old")

    def fail() -> None:
        with result_file(path) as file:
            file.write_text("half")
            raise ZeroDivisionError

    with pytest.raises(ZeroDivisionError):
        fail()
    assert path.read_text() == "old"
    (tmp_path / "link.json").symlink_to(path)
    with result_file(tmp_path / "link.json") as file:
        assert file.suffix == ".json"
        file.write_text("new")
        assert path.read_text() == "old"
    assert path.read_text() == "new"
    assert sorted(each.name for each in tmp_path.iterdir()) == ["link.json", "result.json"]


def test_a_pipe_is_written_in_place(tmp_path: Path) -> None:
    with result_file(Path(os.devnull)) as file:
        assert file == Path(os.devnull)


def test_a_result_that_cannot_be_written(tmp_path: Path) -> None:
    with (
        pytest.raises(ModelError, match=r"cannot write .*none/a\.json: No such file"),
        result_file(tmp_path / "none/a.json"),
    ):
        pass


def test_an_error_leaves_nothing(tmp_path: Path) -> None:
    def fail() -> None:
        with scratch_in(tmp_path) as scratch:
            (scratch / "half").write_bytes(b"half")
            raise ZeroDivisionError

    with pytest.raises(ZeroDivisionError):
        fail()
    assert list(tmp_path.iterdir()) == []


def test_the_second_waits_for_the_first_and_says_so(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    entered = threading.Event()

    def second() -> None:
        with alone_in(tmp_path):
            entered.set()

    thread = threading.Thread(target=second)
    said = ""

    def waits() -> bool:
        nonlocal said
        said += capsys.readouterr().err
        return "waiting until it ends" in said

    with alone_in(tmp_path):
        thread.start()
        wait_until(waits)
        assert not entered.is_set()
    thread.join(10)
    assert entered.is_set()


def test_what_a_killed_process_left_is_removed(tmp_path: Path) -> None:
    (tmp_path / f"{UNFINISHED}x").mkdir()
    with alone_in(tmp_path):
        assert list(tmp_path.iterdir()) == []


def test_a_full_disk_is_told_in_numbers(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    usage = namedtuple("usage", "total used free")
    monkeypatch.setattr(shutil, "disk_usage", lambda _: usage(10**9, 10**9, 10**8))
    need_space(tmp_path, 10**7, "m")
    with pytest.raises(ModelError, match="has 100 MB free, and m needs 1,067 MB; free some space or choose another"):
        need_space(tmp_path, 10**9, "m")


def test_a_folder_that_cannot_be_made(tmp_path: Path) -> None:
    (tmp_path / "file").write_text("")
    with pytest.raises(ModelError, match="cannot make the folder"):
        make_folder(tmp_path / "file" / "x")
