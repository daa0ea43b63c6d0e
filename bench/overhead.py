"""The cost of a proxy: CPU per request and per streamed chunk, and added latency, beside its peers.

    make bench
    python -m bench.overhead --repeats 3 --peers vllm-router=/path/to/vllm-router sglang-router=/path/to/sglang-router

The upstream is nginx (1 KB of JSON; 100 SSE chunks, one every 10 ms), the load is wrk, and each subject runs alone on
its core. Repeats rotate the order of the subjects: direct, nginx proxy_pass, each peer, Starlette + httpx, our relay
alone, the baselines (other checkouts of this project), and xgen-proxy with all features. Prints the median, minimum
and maximum of the repeats. Needs nginx with the echo module, wrk, and two idle cores; with three or more, give upstream
and load one each.
"""

from __future__ import annotations

import argparse
import contextlib
import json
import re
import shutil
import statistics
import subprocess
import sys
import tempfile
import time
import urllib.request
from collections.abc import Callable
from dataclasses import dataclass, field
from functools import partial
from pathlib import Path

from backends.environment import free_port
from bench import children, plot, processes

EXAMPLES = """\
examples:
  on two cores, with a plot:
    python -m bench.overhead --peers vllm-router=.venv/bin/vllm-router --plot overhead.svg
  with more cores: subject, upstream and load apart
    python -m bench.overhead --subject-cores 2 --upstream-cores 4 --load-cores 6,8
  before and after a change, in one run:
    python -m bench.overhead --baseline ../before --only 'baseline before' xgen-proxy
  only xgen-proxy and the lower bound, quickly:
    python -m bench.overhead --repeats 1 --seconds 3 --only 'nginx proxy_pass' xgen-proxy
"""
CHUNKS = 100

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


def upstream_config(port: int, workers: int, folder: Path) -> str:
    events = "".join(f"echo '{chunk()}'; echo; echo_flush; echo_sleep 0.01;\n" for _ in range(CHUNKS - 1))
    models = '{"object":"list","data":[{"id":"m","object":"model","max_model_len":8192}]}'
    return f"""
load_module modules/ngx_http_echo_module.so;
worker_processes {workers}; daemon off; pid {folder}/upstream.pid; error_log {folder}/upstream.log crit;
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
    """A proxy to measure. `command(port)` serves on that port; None: the load goes to the upstream directly."""

    name: str
    command: Callable[[int], list[str]] | None
    json_us: list[float] = field(default_factory=list)
    chunk_us: list[float] = field(default_factory=list)
    p50_ms: list[float] = field(default_factory=list)
    rps: list[float] = field(default_factory=list)
    rss_mb: list[float] = field(default_factory=list)
    errors: int = 0


@dataclass
class Bench:
    """Where everything runs. Cores are in taskset's notation."""

    folder: Path
    seconds: int
    upstream: int
    subject_cores: str
    load_cores: str


def count(cores: str) -> int:
    """The number of cores in a list such as "1" or "2-4,6"."""
    ranges = [each.partition("-") for each in cores.split(",")]
    return sum(int(last or first) - int(first) + 1 for first, _, last in ranges)


def until_answers(url: str, process: subprocess.Popen[bytes], log: Path) -> None:
    """Wait until a real request succeeds: a peer may listen before it knows its upstream. Raises StartError."""
    body = (REQUEST % "").encode()
    deadline = time.monotonic() + 60
    while process.poll() is None and time.monotonic() < deadline:
        with contextlib.suppress(OSError):
            request = urllib.request.Request(url, body, {"content-type": "application/json"})
            with urllib.request.urlopen(request, timeout=2) as answer:
                if answer.status == 200:
                    return
        time.sleep(0.1)
    raise children.StartError(f"{log.stem} does not answer; its log ends:\n{log.read_text(errors='replace')[-2000:]}")


def wrk(bench: Bench, url: str, body: str, connections: int, seconds: int) -> tuple[int, float, float, int]:
    """(requests, requests a second, p50 latency in ms, errors)."""
    script = bench.folder / "wrk.lua"
    script.write_text(
        f"wrk.method='POST'; wrk.headers['content-type']='application/json'; wrk.body={json.dumps(body)}\n"
        "function done(s, l, r) local e = s.errors\n"
        "io.write(string.format('RESULT %d %f %f %d\\n', s.requests, s.requests / s.duration * 1e6,"
        " l:percentile(50) / 1000, e.connect + e.read + e.write + e.status + e.timeout)) end\n"
    )
    threads = min(count(bench.load_cores), connections)
    command = ["taskset", "-c", bench.load_cores, "wrk", f"-t{threads}", f"-c{connections}", f"-d{seconds}s"]
    command += ["--timeout", "30s"]
    output = subprocess.run([*command, "-s", str(script), url], capture_output=True, text=True, check=True).stdout
    _, requests, rate, p50, errors = re.search(r"RESULT.*", output)[0].split()  # type: ignore[index]
    return int(requests), float(rate), float(p50), int(errors)


def measure(bench: Bench, subject: Subject) -> None:
    if subject.command is None:
        url = f"http://127.0.0.1:{bench.upstream}/v1/chat/completions"
        subject.p50_ms.append(wrk(bench, url, REQUEST % "", 1, bench.seconds)[2])
        return
    port = free_port()
    url = f"http://127.0.0.1:{port}"
    log = bench.folder / f"{subject.name}.log"
    with children.running(subject.command(port), log, bench.subject_cores) as process:
        until_answers(f"{url}/v1/chat/completions", process, log)
        measure_json(bench, subject, f"{url}/v1/chat/completions", process.pid)
        measure_streams(bench, subject, f"{url}/v1/completions", process.pid)
        subject.rss_mb.append(processes.rss_mb(process.pid))


def measure_json(bench: Bench, subject: Subject, url: str, pid: int) -> None:
    wrk(bench, url, REQUEST % "", 32, 1)  # warm
    before = processes.cpu_seconds(pid)
    requests, rate, _, errors = wrk(bench, url, REQUEST % "", 32, bench.seconds)
    subject.json_us.append((processes.cpu_seconds(pid) - before) / requests * 1e6)
    subject.rps.append(rate)
    subject.errors += errors
    subject.p50_ms.append(wrk(bench, url, REQUEST % "", 1, bench.seconds)[2])


def measure_streams(bench: Bench, subject: Subject, url: str, pid: int) -> None:
    body = '{"model":"m","prompt":"Hello","max_tokens":100,"stream":true}'
    before = processes.cpu_seconds(pid)
    streams, _, _, errors = wrk(bench, url, body, 200, max(bench.seconds, 5))
    subject.chunk_us.append((processes.cpu_seconds(pid) - before) / max(streams * CHUNKS, 1) * 1e6)
    subject.errors += errors


def peer(line: list[str], port: int) -> list[str]:
    return [*line, "--prometheus-port", str(free_port()), "--port", str(port)]


def baseline(checkout: Path, target: str, port: int) -> list[str]:
    """The proxy of another checkout, with the package in `proxy/xgen_proxy` or, as it once was, `proxy`."""
    package = "xgen_proxy" if (checkout / "proxy" / "xgen_proxy").is_dir() else "proxy"
    path = checkout / "proxy" if package == "xgen_proxy" else checkout
    command = [sys.executable, "-m", f"{package}.cli", "serve", "--vllm", target, "--port", str(port)]
    return ["env", "-C", str(checkout), f"PYTHONPATH={path.resolve()}", *command]


def subjects(options: argparse.Namespace, upstream: int, folder: Path) -> list[Subject]:
    target = f"http://127.0.0.1:{upstream}"
    python = sys.executable

    def nginx(port: int) -> list[str]:
        config = folder / "peer.conf"
        config.write_text(nginx_config(port, upstream, folder))
        return ["nginx", "-c", str(config)]

    found = [Subject("direct", None), Subject("nginx proxy_pass", nginx)]
    for name, path in (each.split("=", 1) for each in options.peers):
        line = [path, *(["launch"] if "sglang" in name else []), "--host", "127.0.0.1", "--worker-urls", target]
        line += ["--policy", "round_robin"]
        found.append(Subject(name, partial(peer, line)))
    flags = ["--no-access-log", "--log-level", "warning", "--port"]
    uvicorn = ["env", f"UPSTREAM={target}", python, "-m", "uvicorn", *flags]
    found.append(Subject("Starlette + httpx", lambda port: [*uvicorn, str(port), "bench.httpx_relay:app"]))
    found.append(Subject("the relay alone", lambda port: [*uvicorn, str(port), "bench.bare_relay:app"]))
    found += [
        Subject(f"baseline {checkout.resolve().name}", partial(baseline, checkout, target))
        for checkout in options.baseline
    ]
    ours = [python, "-m", "xgen_proxy.cli", "serve", "--vllm", target, "--port"]
    found.append(Subject("xgen-proxy", lambda port: [*ours, str(port)]))
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


def draw(found: list[Subject], options: argparse.Namespace) -> None:
    direct = statistics.median(found[0].p50_ms)
    figures: dict[str, Callable[[Subject], list[float]]] = {
        "CPU µs per 1 KB request": lambda each: each.json_us,
        "CPU µs per streamed chunk": lambda each: each.chunk_us,
        "added latency p50, ms": lambda each: [value - direct for value in each.p50_ms],
    }
    panels = {
        label: {each.name: spread_of(values(each)) for each in found[1:] if values(each)}
        for label, values in figures.items()
    }
    plot.bars(options.plot, f"the cost of a proxy: median, minimum, maximum of {options.repeats} repeats", panels)


def spread_of(values: list[float]) -> tuple[float, float, float]:
    return min(values), statistics.median(values), max(values)


def parse() -> argparse.Namespace:
    parser = argparse.ArgumentParser(
        description=__doc__, epilog=EXAMPLES, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--repeats", type=int, default=3)
    parser.add_argument("--seconds", type=int, default=5, help="duration of each load (%(default)s)")
    parser.add_argument("--peers", nargs="*", default=[], metavar="NAME=PATH")
    parser.add_argument("--baseline", nargs="*", type=Path, default=[], metavar="DIR", help="other checkouts")
    parser.add_argument("--only", nargs="*", help="only these subjects, and direct")
    parser.add_argument("--subject-cores", default="0", help="in taskset's notation (%(default)s)")
    parser.add_argument("--upstream-cores", default="1", help="nginx, one worker each (%(default)s)")
    parser.add_argument("--load-cores", default="1", help="wrk, one thread each (%(default)s)")
    parser.add_argument("--plot", type=plot.picture, metavar="FILE.svg", help="needs matplotlib")
    options = parser.parse_args()
    for tool in ("nginx", "wrk", "taskset"):
        if not shutil.which(tool):
            parser.error(f"there is no {tool}. On Debian: apt install nginx-light libnginx-mod-http-echo wrk")
    return options


def run(bench: Bench, options: argparse.Namespace) -> list[Subject]:
    config = bench.folder / "upstream.conf"
    config.write_text(upstream_config(bench.upstream, count(options.upstream_cores), bench.folder))
    log = bench.folder / "nginx.log"
    with children.running(["nginx", "-c", str(config)], log, options.upstream_cores) as process:
        until_answers(f"http://127.0.0.1:{bench.upstream}/v1/chat/completions", process, log)
        found = subjects(options, bench.upstream, bench.folder)
        if options.only:
            found = [each for each in found if each.name in ("direct", *options.only)]
        for repeat in range(options.repeats):
            turn = repeat % len(found)
            for each in found[turn:] + found[:turn]:
                print(f"overhead: {each.name}, {repeat + 1} of {options.repeats}", file=sys.stderr, flush=True)
                measure(bench, each)
    return found


def main() -> None:
    options = parse()
    children.end_on_sigterm()
    with tempfile.TemporaryDirectory() as folder:
        bench = Bench(Path(folder), options.seconds, free_port(), options.subject_cores, options.load_cores)
        found = run(bench, options)
    print(table(found))
    if options.plot:
        draw(found, options)


if __name__ == "__main__":
    main()
