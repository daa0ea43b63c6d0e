"""`xgen-proxy serve` as a process, and a client with a stream that the test controls."""

from __future__ import annotations

import asyncio
import json
import os
import subprocess
import sys
import threading
from pathlib import Path
from typing import Any

import httpx

from tests.support.documents import ROOT
from tests.support.fake_upstream import FakeUpstream, Talk, delta
from tests.support.running_proxy import CHAT, get
from tests.support.waiting import wait_until


class Process:
    """`xgen-proxy serve` as a child; its standard error is kept in `log`, or goes to the descriptor `stderr`."""

    stderr: int | None = None

    def __init__(self, directory: Path, *arguments: str, **environment: str) -> None:
        self.log = directory / "log"
        inherited = {name: value for name, value in os.environ.items() if not name.startswith("XGEN_")}
        with self.log.open("wb") as log:
            self.child = subprocess.Popen(
                [sys.executable, "-m", "xgen_proxy.cli", "serve", "--port", "0", *arguments],
                cwd=directory, env={**inherited, "PYTHONPATH": str(ROOT / "proxy"), **environment},
                stdout=subprocess.PIPE, stderr=log if self.stderr is None else self.stderr, text=True,
            )  # fmt: skip
        assert self.child.stdout
        line = self.child.stdout.readline()
        assert line.startswith("listening on http://127.0.0.1:"), self.log.read_text()
        self.url = line.split()[-1]
        self.port = int(self.url.rpartition(":")[2])

    def until_ready(self) -> None:
        wait_until(lambda: self.asked("/ready") == 200, seconds=30)

    def asked(self, path: str) -> int | None:
        """The status of a GET; None if the proxy does not answer."""
        try:
            return get(self.url + path).status_code
        except httpx.TransportError:
            return None

    def signal(self, number: int) -> None:
        self.child.send_signal(number)

    def lines(self) -> list[dict[str, Any]]:
        return [json.loads(line) for line in self.log.read_text().splitlines()]

    def close(self) -> None:
        assert self.child.stdout
        self.child.stdout.close()
        if self.child.poll() is None:
            self.child.kill()
            self.child.wait()


class Streaming:
    """A client and a backend that streams `hel`, waits for `release`, and finishes the stream."""

    def __init__(self, fake: FakeUpstream) -> None:
        self.release = threading.Event()
        self.left = threading.Event()
        self.text = ""
        self.error: Exception | None = None
        self.began = threading.Event()
        fake.default = self._script

    async def _script(self, talk: Talk) -> None:
        await talk.start_stream()
        await talk.event(delta("hel"))
        gone = asyncio.create_task(talk.until_client_leaves())
        release = asyncio.create_task(asyncio.to_thread(self.release.wait, 60))
        await asyncio.wait([gone, release], return_when=asyncio.FIRST_COMPLETED)
        if gone.done():
            self.left.set()
            self.release.set()
            return
        await talk.event(delta("lo"))
        await talk.event(delta(finish="stop"))
        await talk.end()

    def start(self, url: str) -> None:
        self.thread = threading.Thread(target=self._read, args=[url])
        self.thread.start()
        assert self.began.wait(30)

    def _read(self, url: str) -> None:
        body = {**CHAT, "stream": True}
        try:
            with httpx.stream("POST", f"{url}/v1/chat/completions", json=body, timeout=60, verify=False) as answer:
                for part in answer.iter_text():
                    self.text += part
                    self.began.set()
        except httpx.HTTPError as error:
            self.error = error


# the port
