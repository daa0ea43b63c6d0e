"""Reloads the settings without a restart: on SIGHUP, and when one of their files changes.

Requests in flight keep the decisions that were made for them. Invalid settings change nothing, and the log says what is
wrong with them.
"""

from __future__ import annotations

import asyncio
import logging
import signal
from collections.abc import Iterable
from pathlib import Path

from xgen_proxy.config.loading import ConfigError, ConfigSources
from xgen_proxy.gateway import Gateway

log = logging.getLogger("xgen_proxy.reload")

WATCH_INTERVAL_S = 2.0
NEEDS_RESTART = ("host", "port", "log_format", "drain_s", "otlp_endpoint")

Versions = dict[Path, tuple[int, int, int]]


def file_versions(paths: Iterable[Path]) -> Versions:
    """(mtime in ns, size, inode) of each file that exists.

    Following links matters: a Kubernetes volume updates its files by pointing a link elsewhere.
    """
    versions = {}
    for path in paths:
        try:
            stat = path.stat()
        except OSError:
            continue
        versions[path] = (stat.st_mtime_ns, stat.st_size, stat.st_ino)
    return versions


class Reloader:
    """Reads `sources` again on SIGHUP and when one of their files changes, and configures the gateway."""

    def __init__(self, gateway: Gateway, sources: ConfigSources) -> None:
        self.gateway = gateway
        self._sources = sources
        self._versions = file_versions(sources.files())
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
            await asyncio.sleep(WATCH_INTERVAL_S)
            old, new = self._versions, file_versions(self._sources.files())
            if new != old:
                self.reload(", ".join(str(path) for path in new.keys() | old.keys() if new.get(path) != old.get(path)))

    def reload(self, reason: str) -> None:
        """`reason`: for the log, such as SIGHUP or the names of the files that changed."""
        self._versions = file_versions(self._sources.files())
        try:
            settings = self._sources.load()
        except ConfigError as error:
            log.error("the settings stay as they were (%s): %s", reason, error)
            self.gateway.metrics.reloads.inc("refused")
            return
        old = self.gateway.settings
        for name in NEEDS_RESTART:
            if getattr(old, name) != getattr(settings, name):
                log.warning("%s is read at the start only: restart for it to change", name)
        try:
            self.gateway.configure(settings)
        except Exception:  # a bug in the proxy; keep watching, so that the next change is noticed
            log.exception("applying new settings (%s)", reason)
            self.gateway.metrics.reloads.inc("refused")
            return
        self.gateway.metrics.reloads.inc("taken")
        log.info("new settings (%s)", reason)
