"""pull(): each kind of source ends as a whole model in the folder, or as one sentence and nothing."""

from __future__ import annotations

import hashlib
import shutil
from collections import namedtuple
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import pytest

from tests.support.scripted_hub import Hub
from tests.support.tiny_gguf import tiny_gguf
from tests.unit.models.files.test_hf_directory import safetensors
from xgen_proxy.models.errors import ModelError, UsageError
from xgen_proxy.models.pull.download import TRIES
from xgen_proxy.models.pull.sources import pull
from xgen_proxy.models.storage import MARGIN


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


def test_a_repository_as_a_directory(hub: Hub, folder: Path, tmp_path: Path) -> None:
    hub.files = {"config.json": b"{}", "model.safetensors": weights(tmp_path, 8), "README.md": b"no"}
    assert pull("OWNER/REPO", folder) == folder / "REPO"
    assert names(folder / "REPO") == ["config.json", "model.safetensors"]
    assert pull("OWNER/REPO", folder) == folder / "REPO"
    assert len(hub.downloads) == 2, "they were there"


def weights(folder: Path, size: int) -> bytes:
    safetensors(folder / "weights", a=("F32", [size // 4], size))
    return (folder / "weights").read_bytes()


def test_a_directory_that_is_no_model_is_an_error(hub: Hub, folder: Path) -> None:
    hub.files = {"config.json": b"{}", "model.safetensors": bytes(1000)}
    with pytest.raises(ModelError, match=r"model\.safetensors is damaged"):
        pull("OWNER/REPO", folder)


@pytest.mark.parametrize(
    "name", ["model.safetensors", "model-00001-of-00001.safetensors"], ids=["of one name", "of another"]
)
def test_two_repositories_are_never_mixed(hub: Hub, folder: Path, tmp_path: Path, name: str) -> None:
    hub.files = {"config.json": b'{"n": 1}', "model.safetensors": weights(tmp_path, 8), "chat_template.jinja": b"one"}
    pull("OWNER/REPO", folder)
    (folder / "REPO" / "mine.png").write_bytes(b"")
    before = {path: path.read_bytes() for path in (folder / "REPO").iterdir()}
    hub.files = {"config.json": b'{"n": 2}', name: weights(tmp_path, 12)}
    with pytest.raises(UsageError, match=r"has the weights of another .* \(model\.safetensors\); pass --force"):
        pull("OWNER/REPO", folder)
    assert {path: path.read_bytes() for path in (folder / "REPO").iterdir()} == before
    pull("OWNER/REPO", folder, force=True)
    found = {path.name: path.read_bytes() for path in (folder / "REPO").iterdir()}
    assert found == {**hub.files, "mine.png": b""}


def test_damaged_weights_are_replaced(hub: Hub, folder: Path, tmp_path: Path) -> None:
    hub.files = {"config.json": b"{}", "model.safetensors": weights(tmp_path, 8)}
    pull("OWNER/REPO", folder)
    (folder / "REPO" / "model.safetensors").write_bytes(hub.files["model.safetensors"][:-1])
    pull("OWNER/REPO", folder)
    assert (folder / "REPO" / "model.safetensors").read_bytes() == hub.files["model.safetensors"]


def test_a_download_goes_on_where_the_disk_has_room_for_the_rest(
    hub: Hub, folder: Path, content: bytes, monkeypatch: pytest.MonkeyPatch
) -> None:
    hub.files, hub.cuts = {"m.gguf": content}, [len(content) // TRIES - 1] * TRIES
    with pytest.raises(ModelError, match="goes on where it stopped"):
        pull("hf:OWNER/REPO/m.gguf", folder)
    usage = namedtuple("usage", "total used free")
    monkeypatch.setattr(shutil, "disk_usage", lambda _: usage(10**9, 10**9, MARGIN + TRIES * 2))
    assert pull("hf:OWNER/REPO/m.gguf", folder).read_bytes() == content


def test_a_url(hub: Hub, folder: Path, content: bytes) -> None:
    hub.files = {"m.gguf": content}
    assert pull(f"{hub.url}/OWNER/REPO/resolve/main/m.gguf?download=true", folder) == folder / "m.gguf"


def test_a_file_that_is_no_model_is_deleted(hub: Hub, folder: Path, capsys: pytest.CaptureFixture[str]) -> None:
    hub.files = {"m.gguf": b"<html>" * 100}
    with pytest.raises(ModelError, match="is not a GGUF file"):
        pull("hf:OWNER/REPO/m.gguf", folder)
    assert names(folder) == []
    assert "was deleted" in capsys.readouterr().err


@pytest.fixture
def other(folder: Path) -> Path:
    """Another model of the name m.gguf, which is in the folder already."""
    folder.mkdir()
    return tiny_gguf(folder / "m.gguf", template="another")


@pytest.mark.parametrize("checksums", [True, False], ids=["with checksums", "without"])
def test_what_is_no_model_never_replaces_one(
    hub: Hub, folder: Path, content: bytes, other: Path, checksums: bool
) -> None:
    hub.checksums, hub.files = checksums, {"m.gguf": b"<html>" * 100}
    before = other.read_bytes()
    with pytest.raises(ModelError, match=r"the downloaded m\.gguf is not a GGUF file"):
        pull(f"{hub.url}/OWNER/REPO/resolve/main/m.gguf", folder, force=True)
    assert names(folder) == ["m.gguf"]
    assert other.read_bytes() == before


@pytest.mark.parametrize("checksums", [True, False], ids=["with checksums", "without"])
@pytest.mark.parametrize("kind", ["path", "URL", "repository", "URL, same size"])
def test_another_model_is_replaced_only_with_force(
    hub: Hub, folder: Path, tmp_path: Path, content: bytes, other: Path, kind: str, checksums: bool
) -> None:
    before = other.read_bytes()
    if kind == "URL, same size":
        content = before[:-1] + bytes([before[-1] ^ 1])
    hub.checksums, hub.files = checksums, {"m.gguf": content}
    (tmp_path / "m.gguf").write_bytes(content)
    source = {"path": str(tmp_path / "m.gguf"), "repository": "hf:OWNER/REPO/m.gguf"}.get(
        kind, f"{hub.url}/OWNER/REPO/resolve/main/m.gguf"
    )
    with pytest.raises(UsageError, match=r"m\.gguf exists and is another model; pass --force"):
        pull(source, folder)
    assert (names(folder), other.read_bytes()) == (["m.gguf"], before)
    assert len(hub.downloads) == (kind == "URL, same size" and not checksums)
    assert pull(source, folder, force=True).read_bytes() == content
    assert pull(source, folder).read_bytes() == content, "the same again"
    assert names(folder) == ["m.gguf"]


def test_a_damaged_file_is_replaced(hub: Hub, folder: Path, content: bytes) -> None:
    hub.files = {"m.gguf": content}
    folder.mkdir()
    (folder / "m.gguf").write_bytes(content[:-3000])
    assert pull("hf:OWNER/REPO/m.gguf", folder).read_bytes() == content


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


def test_all_parts_of_a_path_are_copied(folder: Path, tmp_path: Path, content: bytes) -> None:
    first, second = (tmp_path / f"m-0000{number}-of-00002.gguf" for number in (1, 2))
    first.write_bytes(content)
    with pytest.raises(ModelError, match=r"m-00002-of-00002\.gguf is missing"):
        pull(str(first), folder)
    second.write_bytes(content)
    assert pull(str(second), folder) == folder / first.name
    assert names(folder) == [first.name, second.name]
    with pytest.raises(ModelError, match="has several parts"):
        pull(str(first), folder, "0" * 64)


@pytest.mark.parametrize(
    ("source", "sha256", "message"),
    [
        ("no-such-model", None, r"'no-such-model' is not a model: .*the catalogue \(smollm2"),
        ("SmolLM2", "0" * 64, "--sha256 is not for SmolLM2, whose checksum the catalogue has"),
        ("smollm2", "12", "64 hexadecimal digits"),
        ("http://127.0.0.1:1/", None, "names no file"),
        ("http://127.0.0.1:1/m-00001-of-00002.gguf", None, "is one part of a model; pull hf:OWNER/REPO/FILE"),
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
