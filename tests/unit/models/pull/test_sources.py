"""pull(): each kind of source ends as a whole model in the folder, or as one sentence and nothing."""

from __future__ import annotations

import hashlib
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import pytest

from tests.support.scripted_hub import Hub
from xgen_proxy.models.errors import ModelError
from xgen_proxy.models.pull.sources import pull


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    return tmp_path / "models"


def names(folder: Path) -> list[str]:
    return sorted(path.name for path in folder.iterdir())


def test_a_file_of_a_repository(hub: Hub, folder: Path, content: bytes) -> None:
    hub.files = {"m.gguf": content, "other.gguf": content}
    assert pull("hf:OWNER/REPO/m.gguf", folder).read_bytes() == content
    assert names(folder) == ["m.gguf"]
    pull("hf:OWNER/REPO/m.gguf", folder)
    assert len(hub.downloads) == 1, "it was there"


def test_a_repository_as_a_directory(hub: Hub, folder: Path) -> None:
    hub.files = {"config.json": b"{}", "model.safetensors": bytes(1000), "README.md": b"no"}
    assert pull("OWNER/REPO", folder) == folder / "REPO"
    assert names(folder / "REPO") == ["config.json", "model.safetensors"]


def test_a_url(hub: Hub, folder: Path, content: bytes) -> None:
    hub.files = {"m.gguf": content}
    assert pull(f"{hub.url}/OWNER/REPO/resolve/main/m.gguf?download=true", folder) == folder / "m.gguf"


def test_a_file_that_is_no_model_is_deleted(hub: Hub, folder: Path, capsys: pytest.CaptureFixture[str]) -> None:
    hub.files = {"m.gguf": b"<html>" * 100}
    with pytest.raises(ModelError, match="is not a GGUF file"):
        pull("hf:OWNER/REPO/m.gguf", folder)
    assert names(folder) == []
    assert "was deleted" in capsys.readouterr().err


def test_a_path_is_checked_and_copied(folder: Path, tmp_path: Path, content: bytes) -> None:
    source = tmp_path / "mine.gguf"
    source.write_bytes(content)
    assert pull(str(source), folder, hashlib.sha256(content).hexdigest()).read_bytes() == content
    with pytest.raises(ModelError, match="has the checksum"):
        pull(str(source), folder, "0" * 64)
    source.write_bytes(content[:-5000])
    with pytest.raises(ModelError, match="is cut short"):
        pull(str(source), folder)
    assert names(folder) == ["mine.gguf"]


@pytest.mark.parametrize(
    ("source", "sha256", "message"),
    [
        ("no-such-model", None, r"'no-such-model' is not a model: .*the catalogue \(smollm2"),
        ("smollm2", "12", "64 hexadecimal digits"),
        ("http://127.0.0.1:1/", None, "names no file"),
    ],
)
def test_what_names_no_model(folder: Path, source: str, sha256: str | None, message: str) -> None:
    with pytest.raises(ModelError, match=message):
        pull(source, folder, sha256)


def test_two_pulls_fetch_once(hub: Hub, folder: Path, content: bytes) -> None:
    hub.files = {"m.gguf": content}
    with ThreadPoolExecutor(4) as pool:
        assert len(set(pool.map(lambda _: pull("hf:OWNER/REPO/m.gguf", folder), range(4)))) == 1
    assert len(hub.downloads) == 1
