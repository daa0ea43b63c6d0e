"""Log output: JSON for machines, plain text for a terminal, lines of 10 ms in one write.

log_event() is the fast way to log one line per request. What it saves: half of a line's cost, which is logging's own
machinery (the caller's frame, thread and process, the chain of loggers). The contract: the line is the one that
log.log() would produce. JSON lines go straight to the handler that set_up_logging() installed; any other handler gets a
LogRecord made from a template, with the attributes that the formatters below read.
"""

from __future__ import annotations

import asyncio
import logging
import os
import sys
import time
import traceback
from datetime import UTC, datetime
from typing import Any

import orjson

from xgen_proxy.observability.log_output import LogOutput

log = logging.getLogger("xgen_proxy.request")
LEVELS = {logging.INFO: "info", logging.WARNING: "warning"}
BATCH_S = 0.01  # information waits so long for other lines; warnings and errors are written at once
RETRY_S = 0.1
NO_FIELDS: dict[str, Any] = {}
RECORD_TEMPLATE = logging.makeLogRecord({"name": log.name}).__dict__
json_handler: BatchingHandler | None = None  # receives log_event()'s lines directly


def log_event(level: int, message: str, fields: dict[str, Any]) -> None:
    """Log `message` with `fields` at INFO or WARNING, from the thread of the event loop."""
    if not log.isEnabledFor(level):
        return
    now = time.time()
    if json_handler is not None:
        json_handler.add_line(json_line(now, LEVELS[level], log.name, message, fields), level)
        return
    record = logging.LogRecord.__new__(logging.LogRecord)
    record.__dict__ = {
        **RECORD_TEMPLATE,
        "levelno": level,
        "levelname": LEVELS[level].upper(),
        "msg": message,
        "created": now,
        "msecs": now % 1 * 1000,
        "fields": fields,
    }
    log.handle(record)


class BatchingHandler(logging.Handler):
    """Writes several lines at once, since a write costs more than the rest of a line.

    Nothing here waits or raises, whatever happens to the log: see log_output.py.
    """

    def __init__(self, fd: int) -> None:
        super().__init__()
        self._output = LogOutput(fd, self._notice)
        self._lines: list[bytes] = []
        self._retry: asyncio.TimerHandle | None = None

    def handle(self, record: logging.LogRecord) -> bool:
        """Batch the lines of the event loop's thread, without logging's lock. Other threads write theirs at once."""
        line = self._line(record)
        try:
            asyncio.get_running_loop()
        except RuntimeError:
            self._output.write([line])
        else:
            self.add_line(line, record.levelno)
        return True

    def add_line(self, line: bytes, level: int) -> None:
        """Call this from the event loop's thread only."""
        self._lines.append(line)
        if level > logging.INFO:
            loop = asyncio.get_running_loop()
            loop.call_soon(self._flush_on, loop)
        elif len(self._lines) == 1:
            loop = asyncio.get_running_loop()
            loop.call_later(BATCH_S, self._flush_on, loop)

    def flush(self) -> None:
        """Also called at the end of the process, by logging."""
        lines, self._lines = self._lines, []
        self._output.write(lines)

    def _flush_on(self, loop: asyncio.AbstractEventLoop) -> None:
        lines, self._lines = self._lines, []
        if not self._output.write(lines) and self._retry is None:
            self._retry = loop.call_later(RETRY_S, self._try_again, loop)

    def _try_again(self, loop: asyncio.AbstractEventLoop) -> None:
        self._retry = None
        self._flush_on(loop)

    def _line(self, record: logging.LogRecord) -> bytes:
        try:
            return self.format(record).encode(errors="backslashreplace")
        except Exception as error:  # a message that does not fit its arguments, a field that is no JSON
            text = f"a line that cannot be formatted: {type(error).__name__} for {record.msg!r:.200}"
            return self._line(log_record(logging.ERROR, text))

    def _notice(self, count: int, reason: str) -> bytes:
        return self._line(log_record(logging.WARNING, f"{count} log lines were dropped: {reason}"))


def log_record(level: int, text: str) -> logging.LogRecord:
    return logging.LogRecord("xgen_proxy.log", level, "", 0, text, (), None)


def json_line(created: float, level: str, logger: str, message: str, fields: dict[str, Any]) -> bytes:
    """`created`: unix seconds."""
    time = datetime.fromtimestamp(created, UTC)
    line = {"time": time, "level": level, "logger": logger, "message": message, **fields}
    try:
        return orjson.dumps(line, str, orjson.OPT_UTC_Z)
    except TypeError:  # a number beyond 64 bits, half a surrogate pair
        return orjson.dumps({name: ascii(value)[:200] for name, value in line.items()})


class JsonFormatter(logging.Formatter):
    def format(self, record: logging.LogRecord) -> str:
        fields = record.__dict__.get("fields", NO_FIELDS)
        if record.exc_info:
            fields = {**fields, "exception": format_traceback(record.exc_info[1])}
        line = json_line(record.created, record.levelname.lower(), record.name, record.getMessage(), fields)
        return line.decode()


class PlainFormatter(logging.Formatter):
    def format(self, record: logging.LogRecord) -> str:
        fields = " ".join(f"{key}={_plain(value)}" for key, value in record.__dict__.get("fields", NO_FIELDS).items())
        line = f"{time.strftime('%H:%M:%S', time.localtime(record.created))} {record.getMessage()} {fields}".rstrip()
        return f"{line}\n{format_traceback(record.exc_info[1])}" if record.exc_info else line


def _plain(value: object) -> str:
    return orjson.dumps(value).decode() if isinstance(value, list) else str(value)


def format_traceback(error: BaseException | None) -> str:
    """Format a traceback without messages, which may repeat what the client sent. OSErrors keep theirs."""
    parts: list[str] = []
    while error is not None:
        frames = "".join(traceback.format_tb(error.__traceback__))
        parts.append(f"{frames}{type(error).__qualname__}" + (f": {error}" if isinstance(error, OSError) else ""))
        error = error.__cause__ or (None if error.__suppress_context__ else error.__context__)
    return "\nand then\n".join(reversed(parts))


def stderr_fd() -> int:
    """/dev/null if the process was started without a stderr: descriptor 2 may then be any file or socket."""
    return os.open(os.devnull, os.O_WRONLY) if sys.stderr is None else sys.stderr.fileno()


def set_up_logging(log_format: str) -> None:
    """Log to stderr; stdout is for the output of commands. `log_format`: auto, json or plain."""
    is_terminal = sys.stderr is not None and sys.stderr.isatty()
    plain = log_format == "plain" or (log_format == "auto" and is_terminal)
    handler = BatchingHandler(stderr_fd())
    handler.setFormatter(PlainFormatter() if plain else JsonFormatter())
    global json_handler
    json_handler = None if plain else handler
    logging.basicConfig(level=logging.INFO, handlers=[handler], force=True)
    for name in ("httpx", "httpcore", "uvicorn.access"):
        logging.getLogger(name).setLevel(logging.WARNING)
    # No formatter uses these, and collecting them costs more than the line:
    # https://docs.python.org/3/howto/logging.html#optimization
    logging._srcfile = None
    logging.logThreads = logging.logProcesses = logging.logMultiprocessing = False
