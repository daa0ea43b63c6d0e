from __future__ import annotations

import errno
import os
import resource
import socket

import pytest

from xgen_proxy.own_limits import EXHAUSTED, is_exhausted, raise_descriptor_limit


@pytest.mark.parametrize("number", sorted(EXHAUSTED))
def test_our_own_limits_are_recognised(number: int) -> None:
    assert is_exhausted(OSError(number, os.strerror(number)))


@pytest.mark.parametrize(
    "error",
    [
        ConnectionRefusedError(errno.ECONNREFUSED, "refused"),
        OSError(errno.EHOSTUNREACH, "no route"),
        OSError("Multiple exceptions: …"),
        socket.gaierror(socket.EAI_NONAME, "unknown"),
        TimeoutError(),
    ],
)
def test_a_replicas_failures_are_not_ours(error: OSError) -> None:
    assert not is_exhausted(error)


def test_an_error_without_a_number_is_ours_if_no_descriptor_is_left(monkeypatch: pytest.MonkeyPatch) -> None:
    def fail() -> None:
        raise OSError(errno.EMFILE, "Too many open files")

    monkeypatch.setattr("xgen_proxy.own_limits.socket.socket", fail)
    assert is_exhausted(OSError("Multiple exceptions: …"))


def test_a_name_lookup_that_has_no_memory_is_ours() -> None:
    assert is_exhausted(socket.gaierror(socket.EAI_MEMORY, "Memory allocation failure"))


def test_the_soft_limit_of_descriptors_is_raised(monkeypatch: pytest.MonkeyPatch) -> None:
    wanted: list[tuple[int, int]] = []
    monkeypatch.setattr(resource, "getrlimit", lambda _: (1024, 20_000))
    monkeypatch.setattr(resource, "setrlimit", lambda _, limits: wanted.append(limits))
    assert raise_descriptor_limit() == 20_000
    assert wanted == [(20_000, 20_000)]


def test_a_low_limit_is_logged(monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture) -> None:
    monkeypatch.setattr(resource, "getrlimit", lambda _: (256, 1024))

    def refuse(*_: object) -> None:
        raise ValueError("not allowed")

    monkeypatch.setattr(resource, "setrlimit", refuse)
    assert raise_descriptor_limit() == 256
    assert "stays at 256" in caplog.text
    assert "at most 256 files" in caplog.text
