"""What a proxy costs: CPU per request and per streamed chunk, and added latency, side by side with its peers.

    python -m bench.overhead --repeats 3 --peers vllm-router=/path/to/vllm-router sglang-router=/path/to/sglang-router

One run, rotated repeats: an nginx upstream (1 KB JSON; 100 SSE chunks, one each 10 ms) and wrk on one core, the subject
alone on the other, its CPU read from /proc. Needs nginx with the echo module, wrk, and two cores that nobody else uses.
Subjects: direct, nginx proxy_pass, each peer that is named, Starlette + httpx, and xgen-proxy with everything on.
"""

from __future__ import annotations

import argparse
import contextlib
import json
import os
import re
import shlex
import signal
import statistics
import subprocess
import sys
import tempfile
import time
import urllib.request
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from pathlib import Path

from backends.environment import free_port

TICK = os.sysconf("SC_CLK_TCK")
CHUNKS = 100
SUBJECT_CORE, LOAD_CORE = "0", "1"

ANSWER = json.dumps({
    "id": "chatcmpl-1", "object": "chat.completion", "created": 1, "model": "m",
    "choices": [{"index": 0, "message": {"role": "assistant", "content": "x" * 780}, "finish_reason": "stop"}],
    "usage": {"prompt_tokens": 9, "completion_tokens": 64, "total_tokens": 73},
}, separators=(",", ":"))  # fmt: skip

REQUEST = '{"model":"m","messages":[{"role":"user","content":"Hello, how are you today?"}],"max_tokens":64%s}'


def chunk(finish: str | None = None) -> str:
    choice = {"index": 0, "delta": {} if finish else {"content": " token"}, "logprobs": None, "finish_reason": finish}
    head = {"id": "chatcmpl-0123456789abcdef", "object": "chat.completion.chunk", "created": 1795395883, "model": "m"}
    return "data: " + json.dumps({**head, "choices": [choice]}, separators=(",", ":"))


def upstream_config(port: int, folder: Path) -> str:
    events = "".join(f"echo '{chunk()}'; echo; echo_flush; echo_sleep 0.01;\n" for _ in range(CHUNKS - 1))
    models = '{"object":"list","data":[{"id":"m","object":"model","max_model_len":8192}]}'
    return f"""
load_module modules/ngx_http_echo_module.so;
worker_processes 1; daemon off; pid {folder}/upstream.pid; error_log {folder}/upstream.log crit;
events {{ worker_connections 8192; }}
http {{
  access_log off; keepalive_requests 100000000; client_body_temp_path {folder}/body; default_type application/json;
  map $request_body $kind {{ default json; ~"stream.?:.?true" sse; }}
  server {{
    listen 127.0.0.1:{port} backlog=4096;
    location = /health {{ return 200 ok; }}
    location = /metrics {{ return 200 "vllm:num_requests_running 0\\nvllm:num_requests_waiting 0\\n"; }}
    location = /v1/models {{ return 200 '{models}'; }}
    location = /v1/chat/completions {{ return 200 '{ANSWER}'; }}
    location = /v1/completions {{
      default_type text/event-stream;
      {events}
      echo '{chunk("stop")}'; echo; echo 'data: [DONE]'; echo;
    }}
  }}
}}"""


def nginx_config(port: int, upstream: int, folder: Path) -> str:
    return f"""
worker_processes 1; daemon off; pid {folder}/peer.pid; error_log {folder}/peer.log crit;
events {{ worker_connections 8192; }}
http {{
  access_log off; keepalive_requests 100000000;
  client_body_temp_path {folder}/peerbody; proxy_temp_path {folder}/peertmp;
  upstream u {{ server 127.0.0.1:{upstream}; keepalive 1024; keepalive_requests 100000000; }}
  server {{
    listen 127.0.0.1:{port} backlog=4096;
    location / {{ proxy_pass http://u; proxy_http_version 1.1; proxy_set_header Connection ""; proxy_buffering off; }}
  }}
}}"""


@dataclass
class Subject:
    """`command(port)` serves on it; None: the load goes to the upstream itself."""

    name: str
    command: Callable[[int], list[str]] | None
    json_us: list[float] = field(default_factory=list)
    chunk_us: list[float] = field(default_factory=list)
    p50_ms: list[float] = field(default_factory=list)
    rps: list[float] = field(default_factory=list)
    rss_mb: list[float] = field(default_factory=list)
    errors: int = 0


def process_tree(root: int) -> list[int]:
    pids, seen = [root], []
    while pids:
        pid = pids.pop()
        seen.append(pid)
        with contextlib.suppress(OSError):
            pids += [int(child) for child in Path(f"/proc/{pid}/task/{pid}/children").read_text().split()]
    return seen


def cpu_seconds(root: int) -> float:
    total = 0
    for pid in process_tree(root):
        with contextlib.suppress(OSError):
            fields = Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()
            total += int(fields[11]) + int(fields[12])
    return total / TICK


def rss_mb(root: int) -> float:
    total = 0
    for pid in process_tree(root):
        with contextlib.suppress(OSError):
            total += int(re.search(r"VmRSS:\s+(\d+)", Path(f"/proc/{pid}/status").read_text())[1])  # type: ignore[index]
    return total / 1024


@contextlib.contextmanager
def running(command: list[str], core: str, log: Path, url: str) -> Iterator[int]:
    with log.open("ab") as file:
        process = subprocess.Popen(["taskset", "-c", core, *command], stdout=file, stderr=file, start_new_session=True)
    try:
        until_answers(url, process, log)
        yield process.pid
    finally:
        with contextlib.suppress(ProcessLookupError):
            os.killpg(process.pid, signal.SIGKILL)
        process.wait()


def until_answers(url: str, process: subprocess.Popen[bytes], log: Path) -> None:
    """By a real request, since a peer that listens may not know its upstream yet."""
    body = (REQUEST % "").encode()
    for _ in range(600):
        if process.poll() is not None:
            sys.exit(f"it ended at once: {log.read_text()[-2000:]}")
        with contextlib.suppress(OSError):
            request = urllib.request.Request(url, body, {"content-type": "application/json"})
            with urllib.request.urlopen(request, timeout=2) as answer:
                if answer.status == 200:
                    return
        time.sleep(0.1)
    sys.exit(f"it never answered: {log.read_text()[-2000:]}")


def wrk(url: str, body: str, connections: int, seconds: int, folder: Path) -> tuple[int, float, float, int]:
    """(requests, requests a second, p50 latency in ms, errors)."""
    script = folder / "wrk.lua"
    script.write_text(
        f"wrk.method='POST'; wrk.headers['content-type']='application/json'; wrk.body={json.dumps(body)}\n"
        "function done(s, l, r) local e = s.errors\n"
        "io.write(string.format('RESULT %d %f %f %d\\n', s.requests, s.requests / s.duration * 1e6,"
        " l:percentile(50) / 1000, e.connect + e.read + e.write + e.status + e.timeout)) end\n"
    )
    command = ["taskset", "-c", LOAD_CORE, "wrk", "-t1", f"-c{connections}", f"-d{seconds}s", "--timeout", "30s"]
    output = subprocess.run([*command, "-s", str(script), url], capture_output=True, text=True, check=True).stdout
    _, requests, rate, p50, errors = re.search(r"RESULT.*", output)[0].split()  # type: ignore[index]
    return int(requests), float(rate), float(p50), int(errors)


def measure(subject: Subject, upstream: int, seconds: int, folder: Path) -> None:
    if subject.command is None:
        url = f"http://127.0.0.1:{upstream}"
        subject.p50_ms.append(wrk(f"{url}/v1/chat/completions", REQUEST % "", 1, seconds, folder)[2])
        return
    port = free_port()
    url = f"http://127.0.0.1:{port}"
    log = folder / f"{subject.name}.log"
    with running(subject.command(port), SUBJECT_CORE, log, f"{url}/v1/chat/completions") as pid:
        wrk(f"{url}/v1/chat/completions", REQUEST % "", 32, 1, folder)  # warm
        before = cpu_seconds(pid)
        requests, rate, _, errors = wrk(f"{url}/v1/chat/completions", REQUEST % "", 32, seconds, folder)
        subject.json_us.append((cpu_seconds(pid) - before) / requests * 1e6)
        subject.rps.append(rate)
        subject.errors += errors
        subject.p50_ms.append(wrk(f"{url}/v1/chat/completions", REQUEST % "", 1, seconds, folder)[2])
        before = cpu_seconds(pid)
        body = '{"model":"m","prompt":"Hello","max_tokens":100,"stream":true}'
        streams, _, _, errors = wrk(f"{url}/v1/completions", body, 200, max(seconds, 5), folder)
        subject.chunk_us.append((cpu_seconds(pid) - before) / max(streams * CHUNKS, 1) * 1e6)
        subject.errors += errors
        subject.rss_mb.append(rss_mb(pid))


def subjects(peers: dict[str, str], upstream: int, folder: Path) -> list[Subject]:
    target = f"http://127.0.0.1:{upstream}"
    python = sys.executable

    def nginx(port: int) -> list[str]:
        config = folder / "peer.conf"
        config.write_text(nginx_config(port, upstream, folder))
        return ["nginx", "-c", str(config)]

    found = [Subject("direct", None), Subject("nginx proxy_pass", nginx)]
    for name, path in peers.items():
        line = [path, *(["launch"] if "sglang" in name else []), "--host", "127.0.0.1", "--worker-urls", target]
        line += ["--policy", "round_robin", "--prometheus-port"]
        found.append(Subject(name, lambda port, line=line: [*line, str(free_port()), "--port", str(port)]))
    httpx = [python, "-m", "uvicorn", "--no-access-log", "--log-level", "warning", "bench.httpx_relay:app", "--port"]
    found.append(Subject("Starlette + httpx", lambda port: ["env", f"UPSTREAM={target}", *httpx, str(port)]))
    us = [python, "-m", "proxy.cli", "serve", "--vllm", target, "--port"]
    found.append(Subject("xgen-proxy", lambda port: [*us, str(port)]))
    return found


def spread(values: list[float], digits: int = 0) -> str:
    if not values:
        return "-"
    low, middle, high = min(values), statistics.median(values), max(values)
    return f"{middle:.{digits}f} ({low:.{digits}f}-{high:.{digits}f})"


def table(found: list[Subject]) -> str:
    direct = statistics.median(found[0].p50_ms)
    rows = [["", "CPU us/request", "CPU us/chunk", "added p50 ms", "requests/s", "RSS MB", "errors"]]
    for each in found[1:]:
        added = [value - direct for value in each.p50_ms]
        rows.append([each.name, spread(each.json_us), spread(each.chunk_us, 1), spread(added, 2), spread(each.rps),
                     spread(each.rss_mb), str(each.errors)])  # fmt: skip
    widths = [max(len(row[column]) for row in rows) for column in range(len(rows[0]))]
    return "\n".join("  ".join(cell.ljust(width) for cell, width in zip(row, widths, strict=True)) for row in rows)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--repeats", type=int, default=3)
    parser.add_argument("--seconds", type=int, default=5, help="of each load")
    parser.add_argument("--peers", nargs="*", default=[], metavar="NAME=PATH")
    parser.add_argument("--only", nargs="*", help="these subjects, and direct")
    options = parser.parse_args()
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        upstream = free_port()
        config = folder / "upstream.conf"
        config.write_text(upstream_config(upstream, folder))
        url = f"http://127.0.0.1:{upstream}/v1/chat/completions"
        with running(shlex.split(f"nginx -c {config}"), LOAD_CORE, folder / "nginx.log", url):
            found = subjects(dict(peer.split("=", 1) for peer in options.peers), upstream, folder)
            if options.only:
                found = [each for each in found if each.name in ("direct", *options.only)]
            for repeat in range(options.repeats):
                turn = repeat % len(found)
                for each in found[turn:] + found[:turn]:
                    print(f"repeat {repeat + 1}: {each.name}", file=sys.stderr, flush=True)
                    measure(each, upstream, options.seconds, folder)
    print(table(found))


if __name__ == "__main__":
    main()
