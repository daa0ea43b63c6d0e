"""Hugging Face: which files a repository has, with their sizes and checksums. https://huggingface.co/docs/hub/api"""

from __future__ import annotations

import os
import re
from pathlib import Path, PurePosixPath
from urllib.parse import quote

import httpx
import orjson

from xgen_proxy.models.errors import ModelError
from xgen_proxy.models.pull.download import Remote
from xgen_proxy.values import frozen

NAME = r"[\w.-]+"
REFERENCE = re.compile(rf"(?:hf:)?(?P<repo>{NAME}/{NAME})(?:/(?P<file>[^@]+))?(?:@(?P<revision>[\w./-]+))?")
PAGES = 50  # of the list of files, a thousand each
# What vLLM and Transformers need of a repository: not the same weights again in another format, and no Python code,
# which llama.cpp's converter would run (`trust_remote_code`).
WANTED = (".safetensors", ".json", ".jinja", ".model", ".txt")
SPLIT = re.compile(r"-\d{5}-of-(\d{5})\.gguf$")


@frozen
class Reference:
    """`file`: one file of the repository, or None for all of them."""

    repo: str
    file: str | None
    revision: str


@frozen
class HubFile:
    path: str
    size: int
    sha256: str | None


def endpoint() -> str:
    return os.environ.get("HF_ENDPOINT", "https://huggingface.co").rstrip("/")


def token() -> str | None:
    """HF_TOKEN, or what `hf auth login` left."""
    home = Path(os.environ.get("HF_HOME", "~/.cache/huggingface")).expanduser()
    if found := os.environ.get("HF_TOKEN"):
        return found
    try:
        return (home / "token").read_text().strip() or None
    except OSError:
        return None


def parse_reference(text: str) -> Reference | None:
    """`hf:OWNER/REPO[/FILE][@REVISION]`, also without `hf:`; None for anything else."""
    match = REFERENCE.fullmatch(text)
    if match is None:
        return None
    return Reference(match["repo"], match["file"], match["revision"] or "main")


def list_files(http: httpx.Client, reference: Reference) -> list[HubFile]:
    """Raises ModelError."""
    where = f"{endpoint()}/api/models/{reference.repo}/tree/{quote(reference.revision, safe='')}?recursive=true"
    files: list[HubFile] = []
    for _ in range(PAGES):
        response = _ask(http, where, reference)
        try:
            files += [_file(each) for each in orjson.loads(response.content) if each["type"] == "file"]
        except (orjson.JSONDecodeError, LookupError, TypeError, ValueError):
            raise ModelError(f"{endpoint()} does not answer like Hugging Face; check HF_ENDPOINT") from None
        following = response.links.get("next", {}).get("url")
        if following is None:
            return files
        where = _at_endpoint(response.url, following)
    raise ModelError(f"{reference.repo} has too many files to list; name one: hf:{reference.repo}/FILE")


def _at_endpoint(page: httpx.URL, following: str) -> str:
    """The address of the next page. Raises ModelError if it is elsewhere, since the token is sent there."""
    try:
        url, own = page.join(following), httpx.URL(endpoint())
    except httpx.InvalidURL as error:
        raise ModelError(f"{endpoint()} names no valid next page ({error}); check HF_ENDPOINT") from None
    if (url.scheme, url.host, url.port) != (own.scheme, own.host, own.port):
        raise ModelError(f"{endpoint()} names a next page on {url.host}, which is not asked; check HF_ENDPOINT")
    return str(url)


def _ask(http: httpx.Client, url: str, reference: Reference) -> httpx.Response:
    try:
        response = http.get(url)
    except (httpx.HTTPError, httpx.InvalidURL) as error:
        raise ModelError(
            f"cannot reach Hugging Face at {endpoint()} ({error or type(error).__name__}); "
            "check the network, set HF_ENDPOINT to a mirror, or give the path of a file that you have"
        ) from None
    if response.status_code in (401, 403, 404):
        raise ModelError(
            f"{endpoint()} shows no {reference.repo} at {reference.revision} ({response.status_code}); "
            "check the name, and for a gated or private one set HF_TOKEN and accept its licence on its page"
        )
    if response.status_code != 200:
        raise ModelError(f"{endpoint()} answers {response.status_code} for {reference.repo}; try again later")
    return response


def _file(entry: dict[str, object]) -> HubFile:
    path, lfs = str(entry["path"]), entry.get("lfs")
    if PurePosixPath(path).is_absolute() or ".." in PurePosixPath(path).parts:
        raise ValueError(path)
    sha256 = str(lfs["oid"]) if isinstance(lfs, dict) else None
    return HubFile(path, int(str(entry["size"])), sha256)


def choose(reference: Reference, files: list[HubFile]) -> tuple[bool, list[HubFile]]:
    """Whether the model is a directory, and its files. Raises ModelError, with the choice if there are several."""
    ggufs = [file for file in files if file.path.endswith(".gguf")]
    if reference.file is not None:
        chosen = [file for file in files if file.path == reference.file]
        if not chosen:
            raise ModelError(f"{reference.repo} has no {reference.file}; it has {_names(ggufs or files)}")
        return False, _parts(chosen[0], files)
    if any(file.path.endswith(".safetensors") for file in files):
        return True, _directory(files)
    whole = [file for file in ggufs if not SPLIT.search(file.path) or "-00001-of-" in file.path]
    if len(whole) == 1:
        return False, _parts(whole[0], files)
    if not whole:
        raise ModelError(f"{reference.repo} has neither GGUF nor safetensors files; it has {_names(files)}")
    raise ModelError(f"{reference.repo} has several models; choose one: {_names(whole, f'hf:{reference.repo}/')}")


def _directory(files: list[HubFile]) -> list[HubFile]:
    """Without consolidated.safetensors and its like: Mistral's form of the same weights."""
    wanted = [file for file in files if "/" not in file.path and file.path.endswith(WANTED)]
    again = [file for file in wanted if file.path.startswith("consolidated") and file.path.endswith(".safetensors")]
    weights = [file for file in wanted if file.path.endswith(".safetensors")]
    return [file for file in wanted if file not in again] if len(again) < len(weights) else wanted


def _parts(file: HubFile, files: list[HubFile]) -> list[HubFile]:
    """All parts of a model that is split over several files, of which the first is loaded."""
    if not SPLIT.search(file.path):
        return [file]
    stem = SPLIT.sub("", file.path)
    return [each for each in files if SPLIT.search(each.path) and SPLIT.sub("", each.path) == stem]


def _names(files: list[HubFile], before: str = "") -> str:
    shown = [f"{before}{file.path} ({file.size / 1e6:,.0f} MB)" for file in files[:20]]
    more = f" and {len(files) - 20} more" if len(files) > 20 else ""
    return ", ".join(shown) + more if shown else "no files"


def remote_of(reference: Reference, file: HubFile) -> Remote:
    revision = quote(reference.revision, safe="")
    return Remote(f"{endpoint()}/{reference.repo}/resolve/{revision}/{quote(file.path)}", file.sha256, file.size)
