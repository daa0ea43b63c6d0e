"""How log lines are written: JSON for machines, plain for a terminal, all lines of one turn of the event loop at
once."""

from __future__ import annotations

import asyncio
import logging
import sys
import time
import traceback
from datetime import UTC, datetime
from typing import Any

import orjson

log = logging.getLogger("xgen_proxy.request")
LEVELS = {logging.INFO: "info", logging.WARNING: "warning"}
NOTHING: dict[str, Any] = {}
BLANK = logging.makeLogRecord({"name": log.name}).__dict__
straight: Lines | None = None  # where requests' lines go past logging's own machinery, which is half of their cost


def log_event(level: int, message: str, fields: dict[str, Any]) -> None:
    """What log.log() does, without looking for what no line of ours has: caller, thread and process."""
    if not log.isEnabledFor(level):
        return
    now = time.time()
    if straight is not None:
        straight.put(json_line(now, LEVELS[level], log.name, message, fields))
        return
    record = logging.LogRecord.__new__(logging.LogRecord)
    record.__dict__ = {
        **BLANK, "levelno": level, "levelname": LEVELS[level].upper(), "msg": message, "created": now,
        "msecs": now % 1 * 1000, "fields": fields,
    }  # fmt: skip
    log.handle(record)


class Lines(logging.Handler):
    """To stderr, all lines of one turn of the event loop in one write: a write for each would cost more than the rest
    of the line."""

    def __init__(self) -> None:
        super().__init__()
        self._waiting: list[str] = []

    def handle(self, record: logging.LogRecord) -> bool:
        """Without a lock: only the thread that serves puts anything by, another one writes at once."""
        line = self.format(record)
        try:
            asyncio.get_running_loop()
        except RuntimeError:
            write([line])
        else:
            self.put(line)
        return True

    def put(self, line: str) -> None:
        """For the thread that serves."""
        if not self._waiting:
            asyncio.get_running_loop().call_soon(self.flush)
        self._waiting.append(line)

    def flush(self) -> None:
        lines, self._waiting = self._waiting, []
        if lines:
            write(lines)


def write(lines: list[str]) -> None:
    sys.stderr.write("\n".join(lines) + "\n")
    sys.stderr.flush()


def json_line(created: float, level: str, logger: str, message: str, fields: dict[str, Any]) -> str:
    """`created`: unix seconds."""
    time = datetime.fromtimestamp(created, UTC)
    line = {"time": time, "level": level, "logger": logger, "message": message, **fields}
    return orjson.dumps(line, str, orjson.OPT_UTC_Z).decode()


class JsonFormatter(logging.Formatter):
    def format(self, record: logging.LogRecord) -> str:
        fields = record.__dict__.get("fields", NOTHING)
        if record.exc_info:
            fields = {**fields, "exception": traceback_of(record.exc_info[1])}
        return json_line(record.created, record.levelname.lower(), record.name, record.getMessage(), fields)


class PlainFormatter(logging.Formatter):
    def format(self, record: logging.LogRecord) -> str:
        fields = " ".join(f"{key}={_plain(value)}" for key, value in record.__dict__.get("fields", NOTHING).items())
        line = f"{time.strftime('%H:%M:%S', time.localtime(record.created))} {record.getMessage()} {fields}".rstrip()
        return f"{line}\n{traceback_of(record.exc_info[1])}" if record.exc_info else line


def _plain(value: object) -> str:
    return orjson.dumps(value).decode() if isinstance(value, list) else str(value)


def traceback_of(error: BaseException | None) -> str:
    """A traceback without the message, which may repeat what the client sent; but for the operating system's errors."""
    parts: list[str] = []
    while error is not None:
        frames = "".join(traceback.format_tb(error.__traceback__))
        parts.append(f"{frames}{type(error).__qualname__}" + (f": {error}" if isinstance(error, OSError) else ""))
        error = error.__cause__ or (None if error.__suppress_context__ else error.__context__)
    return "\nand then\n".join(reversed(parts))


def set_up_logging(log_format: str) -> None:
    """To stderr; stdout is for what commands print."""
    plain = log_format == "plain" or (log_format == "auto" and sys.stderr.isatty())
    handler = Lines()
    handler.setFormatter(PlainFormatter() if plain else JsonFormatter())
    global straight
    straight = None if plain else handler
    logging.basicConfig(level=logging.INFO, handlers=[handler], force=True)
    for name in ("httpx", "httpcore", "uvicorn.access"):
        logging.getLogger(name).setLevel(logging.WARNING)
    # Nobody formats these, and finding them costs more than the line: docs.python.org/3/howto/logging.html#optimization
    logging._srcfile = None
    logging.logThreads = logging.logProcesses = logging.logMultiprocessing = False
