"""Downloads from a server that cuts, lies, redirects and refuses: a whole file or none, and a sentence that helps."""

from __future__ import annotations

import hashlib
import shutil
from collections import namedtuple
from pathlib import Path
from typing import Any

import pytest

from tests.support.scripted_hub import Hub, scripted_hub
from xgen_proxy.models.errors import ModelError
from xgen_proxy.models.pull.download import TRIES, Remote, client, described, download

CONTENT = bytes(range(256)) * 4000
SHA256 = hashlib.sha256(CONTENT).hexdigest()


def fetch(hub: Hub, folder: Path, token: str | None = None, **known: Any) -> Path:
    target = folder / "m.bin"
    with client(token) as http:
        remote = described(http, Remote(f"{hub.url}/OWNER/REPO/resolve/main/m.bin", **known))
        download(http, remote, target)
    return target


@pytest.fixture(autouse=True)
def file(hub: Hub) -> None:
    hub.files["m.bin"] = CONTENT


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    made = tmp_path / "models"
    made.mkdir()
    return made


def test_a_file_arrives_whole_and_alone(hub: Hub, folder: Path) -> None:
    assert fetch(hub, folder, sha256=SHA256, size=len(CONTENT)).read_bytes() == CONTENT
    assert [path.name for path in folder.iterdir()] == ["m.bin"]


def test_a_cut_transfer_goes_on_where_it_stopped(hub: Hub, folder: Path) -> None:
    hub.cuts = [100_000, 300_000]
    assert fetch(hub, folder).read_bytes() == CONTENT
    assert [each.get("range") for each in hub.downloads] == [None, "bytes=100000-", "bytes=400000-"]
    assert hub.downloads[1]["if-range"] == f'"{SHA256[:16]}"'


def test_an_interrupted_command_goes_on_later(hub: Hub, folder: Path) -> None:
    hub.cuts = [1000] * TRIES
    with pytest.raises(ModelError, match=r"run the command again: it goes on where it stopped"):
        fetch(hub, folder)
    (part,) = folder.iterdir()
    assert part.name.endswith(".part")
    assert part.stat().st_size == 1000 * TRIES
    assert fetch(hub, folder).read_bytes() == CONTENT
    assert [path.name for path in folder.iterdir()] == ["m.bin"]


@pytest.mark.parametrize("etag", ['"{}"', 'W/"{}"', ""], ids=["strong", "weak", "none"])
def test_bytes_of_two_versions_are_never_joined(hub: Hub, folder: Path, etag: str) -> None:
    """Also of servers that tell no checksum: a strong entity tag names the version. Without one, nothing is kept."""
    hub.etag, hub.checksums, hub.cuts = etag, False, [1000] * TRIES
    with pytest.raises(ModelError):
        fetch(hub, folder)
    hub.files["m.bin"] = CONTENT[::-1]
    assert fetch(hub, folder).read_bytes() == CONTENT[::-1]
    assert [path.name for path in folder.iterdir()] == ["m.bin"]


@pytest.mark.parametrize("etag", ['W/"{}"', ""], ids=["weak", "none"])
def test_a_cut_transfer_starts_over_where_versions_cannot_be_told_apart(hub: Hub, folder: Path, etag: str) -> None:
    hub.etag, hub.checksums, hub.cuts = etag, False, [100_000]
    assert fetch(hub, folder).read_bytes() == CONTENT
    assert [each.get("range") for each in hub.downloads] == [None, None]


def test_a_server_without_ranges_starts_over(hub: Hub, folder: Path) -> None:
    hub.ranges, hub.cuts = False, [5000]
    assert fetch(hub, folder).read_bytes() == CONTENT


@pytest.mark.parametrize("known", [{}, {"sha256": SHA256, "size": len(CONTENT)}], ids=["told by the server", "known"])
def test_corrupt_bytes_are_deleted(hub: Hub, folder: Path, known: dict[str, Any]) -> None:
    hub.corrupt = True
    with pytest.raises(ModelError, match=r"has the checksum [0-9a-f]{64}, not [0-9a-f]{64}; it was deleted"):
        fetch(hub, folder, **known)
    assert list(folder.iterdir()) == []


def test_a_server_that_promises_more_than_it_sends(hub: Hub, folder: Path) -> None:
    hub.promise, hub.checksums = len(CONTENT) + 10, False
    with pytest.raises(ModelError, match=r"broke off|cannot reach"):
        fetch(hub, folder)
    assert not (folder / "m.bin").exists()


def test_a_server_that_sends_more_than_the_file(hub: Hub, folder: Path) -> None:
    with pytest.raises(ModelError, match="sends more than the 1,000 bytes"):
        fetch(hub, folder, size=1000, sha256=SHA256)
    assert list(folder.iterdir()) == []


def test_the_token_stays_with_its_server(hub: Hub, folder: Path) -> None:
    with scripted_hub() as store:
        store.files, hub.redirect = hub.files, store.url
        assert fetch(hub, folder, "hush").read_bytes() == CONTENT
        assert {headers.get("authorization") for _, _, headers in hub.seen} == {"Bearer hush"}
        assert store.downloads
        assert {headers.get("authorization") for _, _, headers in store.seen} == {None}


@pytest.mark.parametrize(
    ("status", "message"),
    [
        (401, "pull hf:OWNER/REPO/FILE, not a URL, with HF_TOKEN set"),
        (403, "HF_TOKEN"),
        (404, "check the name"),
        (410, "answers 410"),
    ],
)
def test_a_refusal_says_what_to_do(hub: Hub, folder: Path, status: int, message: str) -> None:
    hub.status = status
    with pytest.raises(ModelError, match=message):
        fetch(hub, folder)
    assert list(folder.iterdir()) == []


def test_offline_is_one_sentence(folder: Path) -> None:
    with pytest.raises(ModelError, match=r"cannot reach 127\.0\.0\.1.*; check the network, or give the path") as caught:
        fetch(Hub(url="http://127.0.0.1:1"), folder)
    assert "\n" not in str(caught.value)


def test_a_full_disk_is_seen_before_the_download(hub: Hub, folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    usage = namedtuple("usage", "total used free")
    monkeypatch.setattr(shutil, "disk_usage", lambda _: usage(10**9, 10**9, 10**5))
    with pytest.raises(ModelError, match=r"has 0 MB free, and m\.bin needs 68 MB; free some space"):
        fetch(hub, folder)
    assert hub.downloads == []
