"""How log lines are written: JSON for machines, plain for a terminal, all lines of one turn of the event loop at
once."""

from __future__ import annotations

import asyncio
import logging
import sys
import time
from functools import lru_cache
from typing import Any

import orjson

log = logging.getLogger("xgen_proxy.request")
BLANK = logging.makeLogRecord({"name": log.name}).__dict__


def tell(level: int, message: str, fields: dict[str, Any]) -> None:
    """What log.log() does, without looking for what no line of ours has: caller, thread and process."""
    if not log.isEnabledFor(level):
        return
    record = logging.LogRecord.__new__(logging.LogRecord)
    now = time.time()
    record.__dict__.update(BLANK)
    record.__dict__.update(
        levelno=level, levelname=logging.getLevelName(level), msg=message, created=now, msecs=now % 1 * 1000,
        fields=fields,
    )  # fmt: skip
    log.handle(record)


class Lines(logging.Handler):
    """To stderr, all lines of one turn of the event loop in one write: a write for each would cost more than the rest
    of the line."""

    def __init__(self) -> None:
        super().__init__()
        self._waiting: list[str] = []

    def handle(self, record: logging.LogRecord) -> bool:
        """Without a lock, which appending to a list does not need."""
        self._waiting.append(self.format(record))
        if len(self._waiting) == 1:
            try:
                asyncio.get_running_loop().call_soon(self.flush)
            except RuntimeError:  # no loop runs in this thread
                self.flush()
        return True

    def flush(self) -> None:
        lines, self._waiting = self._waiting, []
        if lines:
            sys.stderr.write("\n".join(lines) + "\n")
            sys.stderr.flush()


@lru_cache(maxsize=1)
def _second(seconds: int) -> str:
    return time.strftime("%Y-%m-%dT%H:%M:%S", time.gmtime(seconds))


class JsonFormatter(logging.Formatter):
    def format(self, record: logging.LogRecord) -> str:
        line = {
            "time": f"{_second(int(record.created))}.{int(record.msecs):03}Z",
            "level": record.levelname.lower(),
            "logger": record.name,
            "message": record.getMessage(),
            **getattr(record, "fields", {}),
        }
        if record.exc_info:
            line["exception"] = self.formatException(record.exc_info)
        return orjson.dumps(line, default=str).decode()


class PlainFormatter(logging.Formatter):
    def format(self, record: logging.LogRecord) -> str:
        fields = " ".join(f"{key}={value}" for key, value in getattr(record, "fields", {}).items() if value is not None)
        line = f"{time.strftime('%H:%M:%S', time.localtime(record.created))} {record.getMessage()} {fields}".rstrip()
        return f"{line}\n{self.formatException(record.exc_info)}" if record.exc_info else line


def set_up_logging(log_format: str) -> None:
    """To stderr; stdout is for what commands print."""
    plain = log_format == "plain" or (log_format == "auto" and sys.stderr.isatty())
    handler = Lines()
    handler.setFormatter(PlainFormatter() if plain else JsonFormatter())
    logging.basicConfig(level=logging.INFO, handlers=[handler], force=True)
    for name in ("httpx", "httpcore", "uvicorn.access"):
        logging.getLogger(name).setLevel(logging.WARNING)
    # Nobody formats these, and finding them costs more than the line: docs.python.org/3/howto/logging.html#optimization
    logging._srcfile = None
    logging.logThreads = logging.logProcesses = logging.logMultiprocessing = False
