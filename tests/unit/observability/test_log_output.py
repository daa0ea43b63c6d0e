"""Log lines on descriptors that are full, closed or unread."""

from __future__ import annotations

import contextlib
import os
from collections.abc import Iterator

import pytest

from xgen_proxy.observability import log_output
from xgen_proxy.observability.log_output import DROPPED, LogOutput


def notice(count: int, reason: str) -> bytes:
    return b"%d dropped: %b" % (count, reason.encode())


class Pipe:
    def __init__(self) -> None:
        self.reader, self.writer = os.pipe()
        os.set_blocking(self.reader, False)

    def fill(self) -> None:
        os.set_blocking(self.writer, False)
        with contextlib.suppress(BlockingIOError):
            while True:
                os.write(self.writer, b"x" * 4096)
        os.set_blocking(self.writer, True)

    def read(self) -> bytes:
        data = b""
        with contextlib.suppress(BlockingIOError):
            while part := os.read(self.reader, 65536):
                data += part
        return data


@pytest.fixture
def pipe() -> Iterator[Pipe]:
    pipe = Pipe()
    yield pipe
    os.close(pipe.reader)
    os.close(pipe.writer)


@pytest.fixture(autouse=True)
def no_dropped_lines(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(DROPPED, "values", {(): 0.0})


def dropped() -> float:
    return DROPPED.values[()]


def test_lines_are_written(pipe: Pipe) -> None:
    output = LogOutput(pipe.writer, notice)
    assert output.write([b"a", b"b"])
    assert output.write([b"c" * 30_000])
    assert pipe.read() == b"a\nb\n" + b"c" * 30_000 + b"\n"


def test_a_full_pipe_does_not_block(pipe: Pipe) -> None:
    output = LogOutput(pipe.writer, notice)
    pipe.fill()
    assert not output.write([b"a"])
    assert not output.write([b"b"])
    pipe.read()
    assert output.write([])
    assert pipe.read() == b"a\nb\n"
    assert dropped() == 0


def test_too_many_pending_lines_are_dropped_counted_and_told(pipe: Pipe, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(log_output, "MAX_PENDING_BYTES", 10)
    output = LogOutput(pipe.writer, notice)
    pipe.fill()
    for line in (b"first", b"second", b"third", b"4"):
        assert not output.write([line])
    assert dropped() == 2
    pipe.read()
    assert output.write([])
    assert pipe.read() == b"first\n4\n2 dropped: their reader does not read\n"
    assert output.write([b"next"])
    assert pipe.read() == b"next\n", "the notice comes once"


@pytest.mark.parametrize("target", ["/dev/full", "a closed pipe", "a closed descriptor"])
def test_a_failing_write_is_counted_and_told_when_it_works_again(target: str, pipe: Pipe) -> None:
    reader, fd = os.pipe()
    if target == "/dev/full":
        full = os.open(target, os.O_WRONLY)
        os.dup2(full, fd)
        os.close(full)
    elif target == "a closed pipe":
        os.close(reader)
    output = LogOutput(fd, notice)
    if target == "a closed descriptor":
        os.close(fd)
    for number in range(3):
        assert output.write([b"lost", b"lost too"])
        assert dropped() == 2 * number + 2
    os.dup2(pipe.writer, fd)
    output.write([b"works"])
    lines = pipe.read().splitlines()
    assert lines[0] == b"works"
    assert lines[1].startswith(b"6 dropped: ")
    os.close(fd)


def test_a_notice_after_half_a_line_begins_a_line(pipe: Pipe) -> None:
    output = LogOutput(pipe.writer, notice)
    pipe.fill()
    assert not output.write([b"a" * 8000])
    for _ in range(3):  # room for a part of it
        os.read(pipe.reader, 4096)
        output.write([])
    full = os.open("/dev/full", os.O_WRONLY)
    kept = os.dup(pipe.writer)
    os.dup2(full, pipe.writer)
    pipe_is_cut = not output.write([b"b"]) or dropped() > 0
    os.dup2(kept, pipe.writer)
    os.close(full)
    os.close(kept)
    assert pipe_is_cut
    pipe.read()
    output.write([b"c"])
    assert b"c" in pipe.read().splitlines()
