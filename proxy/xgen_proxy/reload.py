"""New settings without a restart: on SIGHUP, and when a file they come from has changed.

Requests in flight go on as they were decided. Settings that are wrong change nothing, and the log says what is wrong.
"""

from __future__ import annotations

import asyncio
import logging
import signal
from collections.abc import Callable, Iterable
from pathlib import Path

from xgen_proxy.config.loading import ConfigError
from xgen_proxy.config.settings import Settings, sources
from xgen_proxy.gateway import Gateway

log = logging.getLogger("xgen_proxy.reload")

WATCH_S = 2.0
AT_START_ONLY = ("host", "port", "log_format", "drain_s", "otlp_endpoint")

Stamps = dict[Path, tuple[int, int, int]]


def stamps(paths: Iterable[Path]) -> Stamps:
    """What tells one content of a file from the next: a Kubernetes volume changes by a link that points elsewhere."""
    found = {}
    for path in paths:
        try:
            stat = path.stat()
        except OSError:
            continue
        found[path] = (stat.st_mtime_ns, stat.st_size, stat.st_ino)
    return found


class Reloader:
    """`read`: the settings as they are written now; raises ConfigError."""

    def __init__(self, gateway: Gateway, read: Callable[[], Settings]) -> None:
        self.gateway = gateway
        self._read = read
        self._seen = stamps(sources())
        self._task: asyncio.Task[None] | None = None

    def start(self) -> None:
        loop = asyncio.get_running_loop()
        loop.add_signal_handler(signal.SIGHUP, self.reload, "SIGHUP")
        self._task = loop.create_task(self._watch())

    async def stop(self) -> None:
        asyncio.get_running_loop().remove_signal_handler(signal.SIGHUP)
        if self._task is not None:
            self._task.cancel()
            await asyncio.gather(self._task, return_exceptions=True)

    async def _watch(self) -> None:
        while True:
            await asyncio.sleep(WATCH_S)
            old, new = self._seen, stamps(sources())
            if new != old:
                self.reload(", ".join(str(path) for path in new.keys() | old.keys() if new.get(path) != old.get(path)))

    def reload(self, why: str) -> None:
        self._seen = stamps(sources())
        try:
            settings = self._read()
        except ConfigError as error:
            log.error("the settings stay as they were (%s): %s", why, error)
            self.gateway.metrics.reloads.inc("refused")
            return
        old = self.gateway.settings
        for name in AT_START_ONLY:
            if getattr(old, name) != getattr(settings, name):
                log.warning("%s is read at the start only: restart for it to change", name)
        try:
            self.gateway.configure(settings)
        except Exception:  # a fault of ours: the next change has to be noticed all the same
            log.exception("taking new settings (%s)", why)
            self.gateway.metrics.reloads.inc("refused")
            return
        self.gateway.metrics.reloads.inc("taken")
        log.info("new settings (%s)", why)
