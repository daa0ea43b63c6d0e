"""Writes log lines to a file descriptor without ever waiting for it, spinning or raising.

Lines that cannot be written now are kept up to a limit; beyond it they are dropped and counted. A line says so once
writing works again. The descriptor stays in blocking mode, because O_NONBLOCK would hold for every process that shares
it, such as the shell. Instead, poll() is asked first, and no more is written at once than a pipe that is ready takes.
"""

from __future__ import annotations

import os
import select
import threading
from collections.abc import Callable

from xgen_proxy.observability.metric_types import Counter

MAX_PENDING_BYTES = 1024 * 1024
WRITE_BYTES = select.PIPE_BUF  # https://man7.org/linux/man-pages/man7/pipe.7.html

DROPPED = Counter("xgen_dropped_log_lines", "Log lines that could not be written.")


class LogOutput:
    """`notice(count, reason)` makes the line that tells about dropped lines."""

    def __init__(self, fd: int, notice: Callable[[int, str], bytes]) -> None:
        self._fd = fd
        self._notice = notice
        self._poll = select.poll()
        self._poll.register(fd, select.POLLOUT)
        self._lock = threading.Lock()  # held for a moment only, since nothing here waits
        self._pending = b""
        self._dropped = 0  # since the last notice
        self._reason = ""
        self._mid_line = False  # the last write ended within a line

    def write(self, lines: list[bytes]) -> bool:
        """Write these lines after what is pending. Returns whether nothing is pending; if not, call it again soon."""
        with self._lock:
            if len(self._pending) + sum(map(len, lines)) > MAX_PENDING_BYTES:
                self._drop(len(lines), "their reader does not read")
            elif lines:
                self._append(lines)
            if self._write_pending():
                self._tell_about_dropped_lines()
            return not self._pending

    def _append(self, lines: list[bytes]) -> None:
        if self._mid_line and not self._pending:
            lines = [b"", *lines]
        self._pending += b"\n".join(lines) + b"\n"

    def _write_pending(self) -> bool:
        """Write what can be written now. Returns False, having dropped what is left, if writing fails."""
        written, data = 0, self._pending
        try:
            while written < len(data) and self._poll.poll(0):
                written += os.write(self._fd, data[written : written + WRITE_BYTES])
        except OSError as error:  # such as a full disk, or a pipe whose reader has closed it
            self._drop(data.count(b"\n", written), error.strerror or "writing fails")
            self._pending = b""
        else:
            self._pending = data[written:]
        if written:
            self._mid_line = data[written - 1] != ord("\n")
        return written + len(self._pending) == len(data)

    def _tell_about_dropped_lines(self) -> None:
        if not self._dropped or self._pending:
            return
        dropped = self._dropped
        self._append([self._notice(dropped, self._reason)])
        if self._write_pending():
            self._dropped -= dropped

    def _drop(self, count: int, reason: str) -> None:
        self._dropped += count
        self._reason = reason
        DROPPED.inc_by(count)
