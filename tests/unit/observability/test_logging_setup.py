"""How log lines are formatted and written."""

from __future__ import annotations

import asyncio
import contextlib
import io
import json
import logging
import os
import threading
from collections.abc import Iterator
from datetime import datetime
from typing import Any

import pytest

from xgen_proxy.observability import logging_setup
from xgen_proxy.observability.logging_setup import BatchingHandler, JsonFormatter, PlainFormatter, log_event


def formatted(formatter: logging.Formatter, *, fields: dict[str, Any] | None = None, error: bool = False) -> str:
    stream = io.StringIO()
    handler = logging.StreamHandler(stream)
    handler.setFormatter(formatter)
    logger = logging.Logger("some.name")
    logger.addHandler(handler)
    try:
        if error:
            raise ZeroDivisionError("why")
        logger.warning("message %s", "é\n", extra={"fields": fields} if fields else {})
    except ZeroDivisionError:
        logger.exception("failed")
    return stream.getvalue()


def test_json_line() -> None:
    text = formatted(JsonFormatter(), fields={"a": 1, "b": None, "c": "x\ny"})
    assert text.count("\n") == 1
    line = json.loads(text)
    time = line.pop("time")
    assert line == {
        "level": "warning",
        "logger": "some.name",
        "message": "message é\n",
        "a": 1,
        "b": None,
        "c": "x\ny",
    }
    assert time[-1] == "Z"
    assert abs(datetime.fromisoformat(time).timestamp() - datetime.now().timestamp()) < 60


def test_json_line_with_a_traceback() -> None:
    text = formatted(JsonFormatter(), error=True)
    assert text.count("\n") == 1
    exception = json.loads(text)["exception"]
    assert exception.endswith("\nZeroDivisionError")
    assert "in formatted\n" in exception


def test_json_line_with_any_object() -> None:
    assert "Event object" in json.loads(formatted(JsonFormatter(), fields={"a": asyncio.Event()}))["a"]


def test_plain_line() -> None:
    text = formatted(PlainFormatter(), fields={"a": 1, "b": [{"d": "y"}], "c": "x"})
    assert text[2] == text[5] == ":"
    assert text[8:] == ' message é\n a=1 b=[{"d":"y"}] c=x\n'
    assert formatted(PlainFormatter(), error=True).endswith("\nZeroDivisionError\n")


class Log:
    """A pipe, and a handler that writes to it."""

    def __init__(self) -> None:
        self.reader, self.writer = os.pipe()
        os.set_blocking(self.reader, False)
        self.handler = BatchingHandler(self.writer)

    def read(self) -> str:
        """What has been written since the last call."""
        try:
            return os.read(self.reader, 65536).decode()
        except BlockingIOError:
            return ""


@pytest.fixture
def written() -> Iterator[Log]:
    log = Log()
    yield log
    os.close(log.reader)
    os.close(log.writer)


def record_of(text: str, level: int = logging.INFO, **values: object) -> logging.LogRecord:
    return logging.makeLogRecord({"msg": text, "levelno": level, "levelname": logging.getLevelName(level), **values})


async def test_a_warning_is_written_at_once_with_what_waits(written: Log) -> None:
    written.handler.handle(record_of("line"))
    written.handler.handle(record_of("warning", logging.WARNING))
    await asyncio.sleep(0)
    assert written.read() == "line\nwarning\n"
    await asyncio.sleep(2 * logging_setup.BATCH_S)
    assert written.read() == ""


async def test_lines_of_a_moment_are_written_together(written: Log) -> None:
    for number in range(3):
        written.handler.handle(record_of(f"line {number}"))
    assert written.read() == ""
    await asyncio.sleep(2 * logging_setup.BATCH_S)
    assert written.read() == "line 0\nline 1\nline 2\n"


async def test_pending_lines_are_written_once_there_is_room(written: Log, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(logging_setup, "RETRY_S", 0.001)
    os.set_blocking(written.writer, False)
    fill = b"x" * 65536
    with contextlib.suppress(BlockingIOError):
        while True:
            os.write(written.writer, fill)
    os.set_blocking(written.writer, True)
    written.handler.handle(record_of("late"))
    await asyncio.sleep(0.01)
    text = ""
    async with asyncio.timeout(10):
        while not text.endswith("late\n"):
            text += written.read()
            await asyncio.sleep(2 * logging_setup.BATCH_S)
    assert text.strip("x") == "late\n"


@pytest.mark.parametrize("message", ["%d", "%s %s"])
async def test_a_message_that_does_not_fit_its_arguments_is_told(written: Log, message: str) -> None:
    written.handler.handle(record_of(message, args=("a",)))
    await asyncio.sleep(2 * logging_setup.BATCH_S)
    assert "cannot be formatted: TypeError" in written.read()


@pytest.mark.parametrize("value", [2**70, "\ud800"])
def test_a_field_that_is_no_json_is_still_logged(value: object) -> None:
    line = json.loads(formatted(JsonFormatter(), fields={"a": value}))
    assert line["a"] == ascii(value)
    assert "message" in line["message"]


class Records(logging.Handler):
    """Keeps the records that it handles."""

    def __init__(self) -> None:
        super().__init__()
        self.records: list[logging.LogRecord] = []

    def emit(self, record: logging.LogRecord) -> None:
        self.records.append(record)


@pytest.fixture
def records(monkeypatch: pytest.MonkeyPatch) -> Iterator[list[logging.LogRecord]]:
    """What the request logger hands to an ordinary handler."""
    handler = Records()
    monkeypatch.setattr(logging_setup, "json_handler", None)
    level = logging_setup.log.level
    logging_setup.log.setLevel(logging.INFO)
    logging_setup.log.addHandler(handler)
    yield handler.records
    logging_setup.log.removeHandler(handler)
    logging_setup.log.setLevel(level)


def test_event_for_other_handlers_is_an_ordinary_record(records: list[logging.LogRecord]) -> None:
    fields = {"a": 1}
    log_event(logging.WARNING, "attempt failed", fields)
    logging_setup.log.warning("attempt failed", extra={"fields": fields})
    fast, ordinary = (json.loads(JsonFormatter().format(record)) for record in records)
    assert ordinary.pop("time") >= fast.pop("time")
    assert fast == ordinary
    fast_plain, plain = (PlainFormatter().format(record) for record in records)
    assert fast_plain[8:] == plain[8:] == " attempt failed a=1"


async def test_event_goes_straight_to_the_json_handler(
    monkeypatch: pytest.MonkeyPatch, records: list[logging.LogRecord], written: Log
) -> None:
    log_event(logging.INFO, "request", {"a": 1})
    monkeypatch.setattr(logging_setup, "json_handler", written.handler)
    log_event(logging.INFO, "request", {"a": 1})
    await asyncio.sleep(2 * logging_setup.BATCH_S)
    straight, [record] = json.loads(written.read()), records
    around = json.loads(JsonFormatter().format(record))
    assert straight.pop("time") >= around.pop("time")
    assert straight == around


async def test_disabled_event_is_not_written(monkeypatch: pytest.MonkeyPatch, written: Log) -> None:
    monkeypatch.setattr(logging_setup, "json_handler", written.handler)
    monkeypatch.setattr(logging_setup.log, "isEnabledFor", lambda level: False)
    log_event(logging.INFO, "request", {"a": 2})
    await asyncio.sleep(2 * logging_setup.BATCH_S)
    assert written.read() == ""


async def test_another_thread_writes_at_once(written: Log) -> None:
    """As the thread that exports traces does."""
    written.handler.handle(record_of("from the loop"))
    record = record_of("from a thread")
    thread = threading.Thread(target=written.handler.handle, args=[record])
    thread.start()
    thread.join()
    assert written.read() == "from a thread\n"
    await asyncio.sleep(2 * logging_setup.BATCH_S)
    assert written.read() == "from the loop\n"


@pytest.fixture
def logging_restored(monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    root = logging.getLogger()
    handlers, level = root.handlers[:], root.level
    for name in ("_srcfile", "logThreads", "logProcesses", "logMultiprocessing"):
        monkeypatch.setattr(logging, name, getattr(logging, name))
    monkeypatch.setattr(logging_setup, "json_handler", None)
    yield
    root.handlers[:] = handlers
    root.setLevel(level)


@pytest.mark.usefixtures("logging_restored")
@pytest.mark.parametrize(("log_format", "json_lines"), [("json", True), ("plain", False), ("auto", True)])
def test_set_up_logging(monkeypatch: pytest.MonkeyPatch, written: Log, log_format: str, json_lines: bool) -> None:
    monkeypatch.setattr("sys.stderr", os.fdopen(written.writer, "w", closefd=False))  # not a terminal: auto means JSON
    root = logging.getLogger()
    monkeypatch.setattr(root, "handlers", [])
    logging_setup.set_up_logging(log_format)
    [handler] = root.handlers
    assert (logging_setup.json_handler is handler) is json_lines
    logging.getLogger("xgen_proxy.test").info("hello")
    text = written.read()
    assert ("hello" in text, text.startswith("{")) == (True, json_lines)


@pytest.mark.usefixtures("logging_restored")
def test_without_a_stderr_lines_go_nowhere(monkeypatch: pytest.MonkeyPatch, capfd: pytest.CaptureFixture[str]) -> None:
    """Descriptor 2 may be the listening socket then."""
    monkeypatch.setattr("sys.stderr", None)
    monkeypatch.setattr(logging.getLogger(), "handlers", [])
    logging_setup.set_up_logging("json")
    logging.getLogger("xgen_proxy.test").info("hello")
    assert capfd.readouterr() == ("", "")
