"""Reloads the settings without a restart: on SIGHUP, and when one of their files changes.

Requests in flight keep the decisions that were made for them. Settings that are invalid, cannot be read or have lost a
key change nothing, and the log and the metrics say so.
"""

from __future__ import annotations

import asyncio
import logging
import signal
from collections.abc import Iterable
from pathlib import Path

from xgen_proxy.config.loading import ConfigError, ConfigSources, UnreadableError, doubts, missing_secrets
from xgen_proxy.config.settings import NO_KEYS, Settings
from xgen_proxy.gateway import Gateway
from xgen_proxy.supervision import stop, supervise

log = logging.getLogger("xgen_proxy.reload")

WATCH_INTERVAL_S = 2.0
SIGHUP = "SIGHUP"
NEEDS_RESTART = ("host", "port", "log_format", "drain_s", "otlp_endpoint")

Versions = dict[Path, tuple[int, ...]]


def file_versions(paths: Iterable[Path]) -> Versions:
    """(mtime and ctime in ns, size, inode) of each file that exists.

    Following links matters: a Kubernetes volume updates its files by pointing a link elsewhere. ctime shows that a file
    which could not be read was made readable.
    """
    versions: Versions = {}
    for path in paths:
        try:
            stat = path.stat()
        except OSError:
            continue
        versions[path] = (stat.st_mtime_ns, stat.st_ctime_ns, stat.st_size, stat.st_ino)
    return versions


class Reloader:
    """Reads `sources` again on SIGHUP and when one of their files changes, and configures the gateway."""

    def __init__(self, gateway: Gateway, sources: ConfigSources) -> None:
        self.gateway = gateway
        self._sources = sources
        self._versions = file_versions(self._files())
        self._refused = ""  # why the last reload was refused
        self._task: asyncio.Task[None] | None = None

    def _files(self) -> list[Path]:
        return [*self._sources.files(), *self.gateway.settings.fallback.distances]

    def start(self) -> None:
        asyncio.get_running_loop().add_signal_handler(signal.SIGHUP, self.reload, SIGHUP)
        self._task = supervise("settings", self._watch)

    async def stop(self) -> None:
        asyncio.get_running_loop().remove_signal_handler(signal.SIGHUP)
        await stop(self._task)

    async def _watch(self) -> None:
        while True:
            await asyncio.sleep(WATCH_INTERVAL_S)
            old, new = self._versions, file_versions(self._files())
            if new != old:
                self.reload(", ".join(str(path) for path in new.keys() | old.keys() if new.get(path) != old.get(path)))

    def reload(self, reason: str) -> None:
        """`reason`: for the log, such as SIGHUP or the names of the files that changed."""
        metrics = self.gateway.metrics
        self._versions = file_versions(self._files())
        try:
            self.gateway.configure(self._read())
        except ConfigError as error:
            if isinstance(error, UnreadableError):
                self._versions = {}  # look again: what was in the way may go without a change of the file
            if reason == SIGHUP or str(error) != self._refused:
                log.error("the settings stay as they were (%s): %s", reason, error)
                metrics.reloads.inc("refused")
            self._refused = str(error)
        except Exception as error:  # a bug in the proxy; keep watching, so that the next change is noticed
            log.exception("the settings stay as they were (%s)", reason)
            metrics.reloads.inc("refused")
            self._refused = repr(error)
        else:
            metrics.reloads.inc("taken")
            log.info("new settings (%s)", reason)
            self._refused = ""
        metrics.of_fleet.settings_current = not self._refused

    def _read(self) -> Settings:
        """Raises ConfigError."""
        old, settings = self.gateway.settings, self._sources.load()
        if missing := missing_secrets(old, settings):
            raise ConfigError(
                f"{' and '.join(missing)}: set until now, and gone. A file may be missing or half-written; to run"
                " without a key, write the word none"
            )
        for name in NEEDS_RESTART:
            if getattr(old, name) != getattr(settings, name):
                log.warning("%s is read at the start only: restart for it to change", name)
        for doubt in doubts(settings):
            log.warning("%s", doubt)
        if settings.api_keys == NO_KEYS and old.api_keys not in (None, NO_KEYS):
            log.warning("api_keys says none: no key is asked for any more")
        return settings
