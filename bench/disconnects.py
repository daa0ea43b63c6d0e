"""Measure how long after a client disconnects the proxy ends its request, and the backend is really free.

    python -m bench.disconnects --gguf FILE --vllm PATH/TO/vllm --vllm-model DIR

Covers each named backend, streams and non-streaming requests, and four moments: while the backend reads a long prompt,
before the first token of a short one, during the answer, and in the proxy's queue. Real servers, one at a time, a real
proxy, and a raw socket that is closed. Times are milliseconds after the close; polls are 10 ms apart. The proxy's
gauges show when it is done. Each backend is observed in the way that proved reliable: llama-cpp-python by its list of
models, which waits for its lock; llama-server by its CPU time, since requests keep an abandoned request alive; vLLM by
its gauges and then a token, since the gauges stand still while it reads a prompt.
A queued request has no slot; its time is that of its place in the queue, and the backend must never receive it.
"""

from __future__ import annotations

import argparse
import http.client
import itertools
import json
import os
import re
import socket
import statistics
import sys
import tempfile
import time
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import ExitStack, contextmanager, suppress
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from bench import children, processes
from tests.support import real_servers as servers
from tests.support.proxied_backend import NEVER_ENDING
from tests.support.real_servers import MODEL, Proxy, Server
from tests.support.waiting import wait_until

EXAMPLES = """\
examples:
  all three backends, some 6 minutes:
    python -m bench.disconnects --gguf model.gguf --vllm .venv-vllm/bin/vllm --vllm-model models/smollm2-hf
  one backend, more repeats:
    python -m bench.disconnects --gguf model.gguf --only llama-server --repeats 10
The variables XGEN_TEST_GGUF, XGEN_TEST_VLLM and XGEN_TEST_VLLM_MODEL replace the flags.
"""
MOMENTS = ("reading the prompt", "before the first token", "during the answer", "in the queue")
NAMES = ("llama-server", "llama-cpp-python", "vllm")
POLL_S = 0.01
READING_S = 0.2  # time into the reading of a long prompt, which takes seconds
SETTLE_S = 1.5
QUIET_S, QUIET_CPU_S = 0.4, 0.02  # quiet: at most this much CPU for so long; a scrape takes less
LOOKUP_TIMEOUT_S = 120.0
SENTENCE = "The town lies at a bend of the river and its people have lived from fishing and from trade for long. "
LONG = SENTENCE * 60  # 1,200 words, 1,300 tokens: seconds of reading on a CPU

numbers = itertools.count(1)


def ask(port: int, path: str, timeout: float = LOOKUP_TIMEOUT_S) -> str:
    """GET a path and return the body, each time on a new connection."""
    connection = http.client.HTTPConnection("127.0.0.1", port, timeout=timeout)
    try:
        connection.request("GET", path)
        return connection.getresponse().read().decode()
    finally:
        connection.close()


def gauge(page: str, name: str) -> float:
    """The value of a gauge, summed over its labels."""
    return sum(float(value) for value in re.findall(rf"^{name}(?:\{{[^}}]*\}})? (\S+)$", page, re.M))


def llama_server_busy(port: int) -> bool:
    return any(slot["is_processing"] for slot in json.loads(ask(port, "/slots")))


def vllm_busy(port: int) -> bool:
    page = ask(port, "/metrics")
    return gauge(page, "vllm:num_requests_running") + gauge(page, "vllm:num_requests_waiting") > 0


def llama_cpp_python_busy(port: int) -> bool:
    with suppress(TimeoutError):
        ask(port, "/v1/models", timeout=0.3)
        return False
    return True


def make_token(port: int) -> None:
    connection = http.client.HTTPConnection("127.0.0.1", port, timeout=LOOKUP_TIMEOUT_S)
    content = json.dumps({"model": MODEL, "prompt": "Hi", "max_tokens": 1})
    connection.request("POST", "/v1/completions", content, {"content-type": "application/json"})
    connection.getresponse().read()
    connection.close()


def token_seconds(port: int) -> float:
    times = []
    for _ in range(5):
        began = time.perf_counter()
        make_token(port)
        times.append(time.perf_counter() - began)
    return statistics.median(times)


@dataclass
class Subject:
    """A backend behind a proxy with one slot, so that the queue fills quickly."""

    name: str
    backend: Server
    proxy: Proxy
    busy: Callable[[int], bool]
    token_s: float = 0.0  # time of one token on an idle vLLM

    def in_flight(self) -> float:
        return gauge(ask(self.proxy.port, "/metrics"), "xgen_replica_in_flight")

    def queued(self) -> float:
        return gauge(ask(self.proxy.port, "/metrics"), "xgen_queue_requests")

    def is_busy(self) -> bool:
        return self.busy(self.backend.port)

    def until_free(self) -> float:
        """The time (time.perf_counter) since which the backend is free. Requests may still be on their way, so
        it must stay free for SETTLE_S."""
        while True:
            free = self._until_seems_free()
            try:
                poll(self.is_busy, SETTLE_S, POLL_S if self.name == "vllm" else SETTLE_S)
            except TimeoutError:
                return free

    def _until_seems_free(self) -> float:
        if self.name == "llama-server":
            return self._until_quiet()
        if self.name == "vllm":
            return self._until_steps()
        ask(self.backend.port, "/v1/models")  # answered once its lock is free
        return time.perf_counter()

    def _until_steps(self) -> float:
        """vLLM's gauges stand still during a step, and reading a long prompt is one step. So when they show it
        free, it has to generate a token as fast as when idle."""
        poll(lambda: not self.is_busy())
        free = time.perf_counter()
        make_token(self.backend.port)
        took = time.perf_counter() - free
        return free if took < 3 * self.token_s else free + took - self.token_s

    def _until_quiet(self) -> float:
        """llama-server notices a disconnect only after a second without requests. So it gets no requests; it is free
        when it uses no more CPU."""
        assert self.backend.process
        pid, since, before = self.backend.process.pid, time.perf_counter(), -1.0
        while time.perf_counter() - since < QUIET_S:
            used = processes.cpu_seconds(pid)
            if used - before > QUIET_CPU_S:
                since, before = time.perf_counter(), used
            time.sleep(POLL_S)
        return since

    def until_ended(self) -> float:
        poll(lambda: self.in_flight() == 0)
        return time.perf_counter()


@dataclass
class Row:
    """Milliseconds of each repeat. `backend` is empty if the request never reached it."""

    backend_name: str
    mode: str
    moment: str
    proxy: list[float]
    backend: list[float]


def poll(look: Callable[[], bool], seconds: float = LOOKUP_TIMEOUT_S, every: float = POLL_S) -> None:
    deadline = time.monotonic() + seconds
    while not look():
        if time.monotonic() > deadline:
            raise TimeoutError(f"nothing within {seconds:g} s")
        time.sleep(every)


def body(prompt: str, stream: bool) -> dict[str, Any]:
    """A request whose prompt begins with a number, so that no cache has it."""
    content = f"{next(numbers)}. {prompt}"
    fixed = {"model": MODEL, "max_tokens": 400, "temperature": 0, **NEVER_ENDING}
    return {**fixed, "messages": [{"role": "user", "content": content}], "stream": stream}


def send(port: int, request: dict[str, Any]) -> socket.socket:
    content = json.dumps(request).encode()
    head = "POST /v1/chat/completions HTTP/1.1\r\nHost: localhost\r\nContent-Type: application/json\r\n"
    connection = socket.create_connection(("127.0.0.1", port), timeout=LOOKUP_TIMEOUT_S)
    connection.sendall(f"{head}Content-Length: {len(content)}\r\n\r\n".encode() + content)
    return connection


def wait_for_moment(subject: Subject, moment: str, stream: bool, connection: socket.socket) -> None:
    """Wait for the moment. Raises AssertionError if it was missed."""
    if moment in ("reading the prompt", "before the first token"):
        poll(lambda: subject.in_flight() > 0)
        time.sleep(READING_S if moment == "reading the prompt" else 0)
    elif stream:
        received = b""
        while received.count(b"data: {") < 5:
            received += connection.recv(65536)
        return
    else:
        poll(subject.is_busy)
        time.sleep(0.5)  # after some tokens; the answer takes much longer
    connection.setblocking(False)
    try:
        assert not connection.recv(1), f"{moment}: the answer came before the client could leave"
    except BlockingIOError:
        return
    raise AssertionError(f"{moment}: the proxy hung up first")


def time_both(subject: Subject, drain: Callable[[], None]) -> tuple[float, float]:
    """Milliseconds until the proxy has ended the request, and until the backend is free."""
    with ThreadPoolExecutor(2) as threads:
        left = time.perf_counter()
        drain()
        proxy = threads.submit(subject.until_ended)
        backend = threads.submit(subject.until_free)
        return (proxy.result() - left) * 1e3, (backend.result() - left) * 1e3


def leave_once(subject: Subject, moment: str, stream: bool, row: Row) -> None:
    prompt = LONG if moment == "reading the prompt" else "Count to a thousand."
    connection = send(subject.proxy.port, body(prompt, stream))
    wait_for_moment(subject, moment, stream, connection)
    proxy, backend = time_both(subject, connection.close)
    row.proxy.append(proxy)
    row.backend.append(backend)


def leave_queue_once(subject: Subject, stream: bool, row: Row) -> None:
    with ExitStack() as stack:
        while not subject.queued():  # the last request sent is the queued one
            connection = send(subject.proxy.port, body("Count to a thousand.", stream))
            stack.callback(connection.close)
            with suppress(TimeoutError):
                poll(lambda: subject.queued() > 0, 0.5)
        holding = subject.in_flight()
        left = time.perf_counter()
        connection.close()
        poll(lambda: subject.queued() == 0)
        row.proxy.append((time.perf_counter() - left) * 1e3)
        assert subject.in_flight() == holding, "the requests before it were touched, or it had got a slot"
    poll(lambda: subject.in_flight() == 0)
    subject.until_free()


def measure(subject: Subject, repeats: int) -> Iterator[Row]:
    for moment in MOMENTS:
        for stream in (True, False):
            row = Row(subject.name, "stream" if stream else "whole", moment, [], [])
            for repeat in range(repeats):
                progress(f"{subject.name}: {row.mode}, {moment}, {repeat + 1} of {repeats}")
                if moment == "in the queue":
                    leave_queue_once(subject, stream, row)
                else:
                    leave_once(subject, moment, stream, row)
            yield row


def progress(text: str) -> None:
    print(f"disconnects: {text}", file=sys.stderr, flush=True)


@contextmanager
def running(name: str, options: argparse.Namespace, folder: Path) -> Iterator[Subject]:
    log = folder / f"{name}.log"
    if name == "vllm":
        backend, busy = servers.vllm(log, options.vllm, options.vllm_model), vllm_busy
    elif name == "llama-server":
        backend, busy = servers.llama_server(log, options.gguf), llama_server_busy
    else:
        backend, busy = servers.llama_cpp_python(log, options.gguf), llama_cpp_python_busy
    flags = ["--vllm", backend.url] if name == "vllm" else ["--llama-cpp", backend.url, "--engine", name]
    slots = f"XGEN_BACKENDS__{'VLLM' if name == 'vllm' else 'LLAMA_CPP'}__SLOTS"
    proxy = servers.proxy(folder / f"{name}-proxy.log", *flags, env={slots: "1"})
    progress(f"starting {name}")
    try:
        backend.start().wait_ready()
        proxy.start()
        wait_until(proxy.is_ready, 60, "the proxy to be ready")
        token_s = token_seconds(backend.port) if name == "vllm" else 0.0
        yield Subject(name, backend, proxy, busy, token_s)
    finally:
        proxy.stop()
        backend.stop()


def times(values: list[float]) -> str:
    if not values:
        return "never there"
    return f"{min(values):.0f} / {statistics.median(values):.0f} / {max(values):.0f}"


def table(rows: list[Row]) -> str:
    lines = [["backend", "answer", "the client leaves", "proxy ms", "backend ms"]]
    lines += [[row.backend_name, row.mode, row.moment, times(row.proxy), times(row.backend)] for row in rows]
    widths = [max(len(line[column]) for line in lines) for column in range(len(lines[0]))]
    return "\n".join(
        "  ".join(cell.ljust(width) for cell, width in zip(line, widths, strict=True)).rstrip() for line in lines
    )


def parse() -> argparse.Namespace:
    parser = argparse.ArgumentParser(
        description=__doc__, epilog=EXAMPLES, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--repeats", type=int, default=3, help="per cell (%(default)s)")
    parser.add_argument("--only", nargs="+", choices=NAMES, help="only these backends (default: all with given files)")
    parser.add_argument("--gguf", default=os.environ.get("XGEN_TEST_GGUF"), help="the model file for llama.cpp")
    parser.add_argument("--vllm", default=os.environ.get("XGEN_TEST_VLLM"), help="the vllm executable")
    parser.add_argument("--vllm-model", default=os.environ.get("XGEN_TEST_VLLM_MODEL"), help="its model directory")
    options = parser.parse_args()
    capabilities = {"vllm": options.vllm and options.vllm_model}
    options.only = options.only or [name for name in NAMES if capabilities.get(name, options.gguf)]
    missing = [name for name in options.only if not capabilities.get(name, options.gguf)]
    if missing or not options.only:
        parser.error("name the files: --gguf for llama.cpp, --vllm and --vllm-model for vLLM")
    return options


def main() -> None:
    options = parse()
    children.end_on_sigterm()
    rows: list[Row] = []
    try:
        with tempfile.TemporaryDirectory() as folder:
            for name in options.only:
                with running(name, options, Path(folder)) as subject:
                    rows.extend(measure(subject, options.repeats))
    finally:  # also print what was measured before a failure
        print(f"milliseconds, min / median / max of {options.repeats}\n\n{table(rows)}")


if __name__ == "__main__":
    main()
