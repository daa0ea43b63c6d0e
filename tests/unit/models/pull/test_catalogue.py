"""The catalogue's entries, and the default model: fetched once, and again only if it is damaged."""

from __future__ import annotations

import hashlib
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import pytest

from tests.support.tiny_gguf import tiny_gguf
from xgen_proxy.models.errors import ModelError, UsageError
from xgen_proxy.models.pull import catalogue
from xgen_proxy.models.pull.catalogue import CATALOGUE, SMOLLM2, whole_or_fetched
from xgen_proxy.models.pull.hub import parse_reference
from xgen_proxy.models.pull.wheel import WheelFile
from xgen_proxy.models.storage import UNFINISHED, checksum

CONTENT = bytes(1000)
SOURCE = WheelFile("none", "none", "m.gguf", len(CONTENT), hashlib.sha256(CONTENT).hexdigest())


@pytest.fixture
def fetched(monkeypatch: pytest.MonkeyPatch) -> list[Path]:
    calls: list[Path] = []

    def fetch(source: WheelFile, folder: Path) -> Path:
        calls.append(folder)
        (folder / source.name).write_bytes(CONTENT)
        return folder / source.name

    monkeypatch.setattr(catalogue, "fetch_from_wheel", fetch)
    return calls


def test_it_is_fetched_once_however_many_ask(tmp_path: Path, fetched: list[Path]) -> None:
    with ThreadPoolExecutor(4) as pool:
        paths = set(pool.map(lambda _: whole_or_fetched(SOURCE, tmp_path / "models"), range(4)))
    assert paths == {tmp_path / "models" / "m.gguf"}
    assert len(fetched) == 1


@pytest.mark.parametrize("damage", [CONTENT[:-1], b"", CONTENT[:-1] + b"!"], ids=["short", "empty", "one byte"])
def test_a_damaged_file_is_fetched_again(
    tmp_path: Path, fetched: list[Path], damage: bytes, capsys: pytest.CaptureFixture[str]
) -> None:
    path = tmp_path / "m.gguf"
    path.write_bytes(damage)
    assert whole_or_fetched(SOURCE, tmp_path).read_bytes() == CONTENT
    assert f"{path} is damaged" in capsys.readouterr().err


def test_another_model_of_its_name_is_kept(tmp_path: Path, fetched: list[Path]) -> None:
    path = tiny_gguf(tmp_path / "m.gguf")
    with pytest.raises(UsageError, match=r"m\.gguf exists and is another model; pass --force"):
        whole_or_fetched(SOURCE, tmp_path)
    assert path.exists()
    assert whole_or_fetched(SOURCE, tmp_path, force=True).read_bytes() == CONTENT


@pytest.mark.usefixtures("fetched")
def test_files_of_a_killed_fetch_are_removed(tmp_path: Path) -> None:
    (tmp_path / f"{UNFINISHED}1").mkdir()
    (tmp_path / f"{UNFINISHED}1" / "m.gguf").write_bytes(b"half")
    path = whole_or_fetched(SOURCE, tmp_path)
    assert list(tmp_path.iterdir()) == [path]


def test_a_folder_that_cannot_be_made_is_reported(tmp_path: Path) -> None:
    (tmp_path / "file").write_text("")
    with pytest.raises(ModelError, match="cannot make the folder"):
        whole_or_fetched(SOURCE, tmp_path / "file" / "models")


def test_the_fetched_model_is_the_expected_one(gguf: str) -> None:
    assert checksum(Path(gguf)) == SMOLLM2.sha256
    assert Path(gguf).stat().st_size == SMOLLM2.size


def test_every_entry_names_a_file() -> None:
    for name, (what, source) in CATALOGUE.items():
        assert name == name.lower()
        assert what
        if isinstance(source, str):
            reference = parse_reference(source)
            assert reference
            assert reference.file
