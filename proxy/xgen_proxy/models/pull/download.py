"""Downloads one file over HTTP, resumes an interrupted download, and checks the result.

Until it is whole the file is `.NAME.TAG.part` beside its place; TAG names the version, so that bytes of two
versions are never joined.
"""

from __future__ import annotations

import contextlib
import errno
import glob
import hashlib
import os
from collections.abc import Callable
from pathlib import Path

import httpx
from tenacity import Retrying, retry_if_exception_type, stop_after_attempt, wait_exponential

from xgen_proxy.models.errors import ModelError
from xgen_proxy.models.progress import Progress, say
from xgen_proxy.models.storage import checksum, need_space, publish
from xgen_proxy.values import frozen

TRIES = 6  # the pauses between them are 1, 2, 4, 8 and 16 s
TIMEOUT = httpx.Timeout(30.0)  # of one read, not of the file
MOST_BYTES = 2 * 10**12  # a server that never ends is cut off there


@frozen
class Remote:
    """A file on a server. `sha256` and `size` (bytes) are what it must have, where known. `etag`: its version."""

    url: str
    sha256: str | None = None
    size: int | None = None
    etag: str | None = None

    @property
    def resumable(self) -> bool:
        """Whether bytes of two versions would be noticed."""
        return self.sha256 is not None or self.etag is not None


class _BrokenOffError(Exception):
    """The transfer ended early; what came is kept."""


def client(token: str | None = None) -> httpx.Client:
    """httpx drops the token when a redirect leads to another host."""
    headers = {"user-agent": "xgen-proxy", "accept-encoding": "identity"}
    if token:
        headers["authorization"] = f"Bearer {token}"
    return httpx.Client(headers=headers, timeout=TIMEOUT, follow_redirects=True)


def download(
    http: httpx.Client, remote: Remote, target: Path, accept: Callable[[Path], object] = lambda part: None
) -> None:
    """Downloads `remote` to `target`. An interrupted download is kept, and the next call continues it.

    `accept` checks the whole file before it is moved into place. If it raises ModelError, the file is deleted. Raises
    ModelError.
    """
    tag = hashlib.sha256(f"{remote.url}\n{remote.sha256}\n{remote.size}\n{remote.etag}".encode()).hexdigest()[:12]
    part = target.with_name(f".{target.name}.{tag}.part")
    for other in target.parent.glob(f".{glob.escape(target.name)}.*.part"):
        if other != part or not remote.resumable:
            other.unlink()
    have = _have(remote, part)
    if remote.size is not None:
        need_space(target.parent, remote.size - have, target.name)
    try:
        for attempt in Retrying(
            retry=retry_if_exception_type((_BrokenOffError, httpx.TransportError)),
            stop=stop_after_attempt(TRIES),
            wait=wait_exponential(),
            reraise=True,
        ):
            with attempt:
                _transfer(http, remote, part, target.name)
    except httpx.TransportError as error:
        raise ModelError(
            f"cannot reach {_host(remote.url)} ({error or type(error).__name__}); {_again(remote, part)}"
        ) from None
    except _BrokenOffError as error:
        raise ModelError(
            f"the download of {target.name} broke off {TRIES} times ({error}); {_again(remote, part)}"
        ) from None
    except OSError as error:
        hint = "free some space and run the command again" if error.errno == errno.ENOSPC else "see the folder"
        raise ModelError(f"cannot write {part}: {error.strerror}; {hint}") from None
    _check(remote, part, target.name)
    try:
        accept(part)
    except ModelError:
        part.unlink(missing_ok=True)
        say(f"the downloaded {target.name} was deleted")
        raise
    publish(part, target)


def _host(url: str) -> str:
    return httpx.URL(url).host


def _have(remote: Remote, part: Path) -> int:
    """How many of its bytes can be kept."""
    return part.stat().st_size if remote.resumable and part.exists() else 0


def _again(remote: Remote, part: Path) -> str:
    if _have(remote, part):
        return "run the command again: it goes on where it stopped"
    return "check the network and run the command again, or give the path of a file that you have"


def described(http: httpx.Client, remote: Remote) -> Remote:
    """With what the server says of the file before it is fetched, where nothing better is known. Raises ModelError."""
    if remote.sha256 is not None and remote.size is not None:
        return remote
    try:
        response = http.head(remote.url)
    except httpx.TransportError as error:
        raise ModelError(
            f"cannot reach {_host(remote.url)} ({error or type(error).__name__}); "
            "check the network, or give the path of a file that you have"
        ) from None
    except (httpx.InvalidURL, httpx.UnsupportedProtocol, httpx.TooManyRedirects) as error:
        raise ModelError(f"cannot use {remote.url}: {error}") from None
    if response.status_code in (405, 501):  # it knows no HEAD
        return remote
    _refuse(response)
    # Hugging Face tells the checksum in its first answer, before it redirects to its store.
    first = (response.history or [response])[0].headers
    etag, size = first.get("x-linked-etag", "").strip('"'), first.get("x-linked-size")
    version = response.headers.get("etag", "")
    told = size or response.headers.get("content-length", "")
    return Remote(
        remote.url,
        remote.sha256 or (etag if len(etag) == 64 else None),
        remote.size or (int(told) if told.isdecimal() else None),
        version if version.startswith('"') else None,  # a weak one says nothing about bytes
    )


def _refuse(response: httpx.Response) -> None:
    """Raises ModelError unless the file can be had."""
    if response.status_code in (401, 403):
        raise ModelError(
            f"{response.url.host} refuses {response.url.path} ({response.status_code}): does it need a token? "
            "Of Hugging Face pull hf:OWNER/REPO/FILE, not a URL, with HF_TOKEN set, and accept the licence on its page"
        )
    if response.status_code == 404:
        raise ModelError(f"{response.url.host} has no {response.url.path} (404); check the name")
    if response.status_code >= 400:
        raise ModelError(f"{response.url.host} answers {response.status_code} for {response.url.path}; try again later")


def _transfer(http: httpx.Client, remote: Remote, part: Path, name: str) -> None:
    """Append to `part` until the file is whole. Raises _BrokenOffError, httpx.TransportError, OSError, ModelError."""
    have = _have(remote, part)
    if have and have == remote.size:
        return
    headers = {"range": f"bytes={have}-"} if have else {}
    if have and remote.etag:
        headers["if-range"] = remote.etag
    with http.stream("GET", remote.url, headers=headers) as response:
        if response.status_code == 416:  # a range behind its end: the file on the server is another one
            part.unlink()
            raise _BrokenOffError("the file has changed on the server")
        if response.status_code >= 500 or response.status_code == 429:
            raise _BrokenOffError(f"{response.url.host} answers {response.status_code}")
        _refuse(response)
        resumed = have and response.status_code == 206 and _starts_at(response) == have
        _receive(response, part, have if resumed else 0, remote, name)
    size = part.stat().st_size
    if remote.size is not None and size < remote.size:
        raise _BrokenOffError(f"{size:,} of {remote.size:,} bytes came")


def _starts_at(response: httpx.Response) -> int | None:
    start = response.headers.get("content-range", "").removeprefix("bytes ").partition("-")[0]
    return int(start) if start.isdecimal() else None


def _receive(response: httpx.Response, part: Path, have: int, remote: Remote, name: str) -> None:
    most = MOST_BYTES if remote.size is None else remote.size
    progress = Progress(name, remote.size)
    with part.open("ab" if have else "wb") as file:
        for block in response.iter_raw():
            have += len(block)
            if have > most:
                part.unlink()
                raise ModelError(f"{response.url.host} sends more than the {most:,} bytes of {name}; nothing was kept")
            file.write(block)
            progress.update(have)
        file.flush()
        os.fsync(file.fileno())
    progress.end()


def _check(remote: Remote, part: Path, name: str) -> None:
    """Raises ModelError, and deletes the file, if it is not the one that was wanted."""
    size = part.stat().st_size
    wrong = ""
    if remote.size is not None and size != remote.size:
        wrong = f"{size:,} bytes, not {remote.size:,}"
    elif remote.sha256 is not None and (found := checksum(part)) != remote.sha256:
        wrong = f"the checksum {found}, not {remote.sha256}"
    if wrong:
        with contextlib.suppress(FileNotFoundError):
            part.unlink()
        raise ModelError(f"the downloaded {name} has {wrong}; it was deleted. Run the command again")
