"""A small Hugging Face on a real socket. Its answers can be cut, corrupted, refused or sent elsewhere."""

from __future__ import annotations

import hashlib
import json
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from urllib.parse import unquote, urlsplit


@dataclass
class Hub:
    """`files` of the one repository OWNER/REPO. What it does wrong is set by the tests; `seen` are its requests."""

    files: dict[str, bytes] = field(default_factory=dict)
    cuts: list[int] = field(default_factory=list)  # each download stops after so many bytes, in turn
    ranges: bool = True
    corrupt: bool = False
    redirect: str = ""  # another server for the files
    status: int = 0  # for everything
    promise: int | None = None  # a content-length that is not true
    checksums: bool = True
    etag: str = '"{}"'  # {}: the version; a weak one begins with W/
    link: str = ""  # a Link header of the first list
    seen: list[tuple[str, str, dict[str, str]]] = field(default_factory=list)
    url: str = ""

    @property
    def downloads(self) -> list[dict[str, str]]:
        return [headers for method, path, headers in self.seen if method == "GET" and "/resolve/" in path]


class Handler(BaseHTTPRequestHandler):
    hub: Hub
    protocol_version = "HTTP/1.1"

    def log_message(self, *_: object) -> None:
        pass

    def do_HEAD(self) -> None:
        self.do_GET()

    def do_GET(self) -> None:
        path = unquote(urlsplit(self.path).path)
        self.hub.seen.append((self.command, path, {name.lower(): value for name, value in self.headers.items()}))
        if self.hub.status:
            self.answer(self.hub.status, b"")
        elif path.startswith("/api/models/OWNER/REPO/tree/"):
            headers, self.hub.link = {"link": self.hub.link} if self.hub.link else None, ""
            self.answer(200, json.dumps([entry(*each) for each in self.hub.files.items()]).encode(), headers)
        elif (name := path.partition("/resolve/")[2].partition("/")[2]) in self.hub.files:
            self.file(name)
        else:
            self.answer(404, b"")

    def file(self, name: str) -> None:
        content = self.hub.files[name]
        headers = {"etag": self.hub.etag.format(digest(content)[:16])} if self.hub.etag else {}
        if self.hub.checksums:
            headers |= {"x-linked-etag": f'"{digest(content)}"', "x-linked-size": str(len(content))}
        if self.hub.redirect:
            self.answer(302, b"", {**headers, "location": self.hub.redirect + self.path})
            return
        begin, asked = 0, self.headers.get("range", "")
        if asked and self.hub.ranges and self.headers.get("if-range") in (None, headers.get("etag")):
            begin = int(asked.removeprefix("bytes=").rstrip("-"))
            headers["content-range"] = f"bytes {begin}-{len(content) - 1}/{len(content)}"
        body = content[begin:]
        if self.hub.corrupt:
            body = bytes([body[0] ^ 1]) + body[1:]
        self.answer(206 if begin else 200, body, headers)

    def answer(self, status: int, body: bytes, headers: dict[str, str] | None = None) -> None:
        self.send_response(status)
        for name, value in (headers or {}).items():
            self.send_header(name, value)
        self.send_header("content-length", str(len(body) if self.hub.promise is None else self.hub.promise))
        self.end_headers()
        if self.command == "HEAD":
            return
        if self.hub.cuts and status in (200, 206) and headers is not None:
            body = body[: self.hub.cuts.pop(0)]
            self.close_connection = True
        self.wfile.write(body)
        if self.hub.promise is not None:
            self.close_connection = True


@contextmanager
def scripted_hub() -> Iterator[Hub]:
    hub = Hub()
    server = ThreadingHTTPServer(("127.0.0.1", 0), type("HubHandler", (Handler,), {"hub": hub}))
    server.daemon_threads = True
    hub.url = f"http://127.0.0.1:{server.server_address[1]}"
    thread = threading.Thread(target=server.serve_forever, args=(0.01,))
    thread.start()
    try:
        yield hub
    finally:
        server.shutdown()
        thread.join()
        server.server_close()


def entry(path: str, content: bytes) -> dict[str, object]:
    """As the hub lists a file; large ones are in LFS."""
    lfs = {"lfs": {"oid": digest(content), "size": len(content)}} if path.endswith((".gguf", ".safetensors")) else {}
    return {"type": "file", "path": path, "size": len(content), **lfs}


def digest(content: bytes) -> str:
    return hashlib.sha256(content).hexdigest()
