"""Kill vLLM's engine during many live streams, and check that CPU backends finish them.

    python -m bench.gpu_kill --url http://127.0.0.1:8000 --gguf FILE --chat-template tokenizer_config.json

Starts llama-cpp-python servers beside a running vLLM and a proxy in front of both, opens the streams, waits until each
has sent part of its answer, and sends SIGKILL to the process VLLM::EngineCore. bench/judge.py checks each stream: one
id, one role chunk, one finish_reason, one [DONE], no error event. A stall is the longest silence of a stream after the
kill. Ends the vLLM server.
"""

from __future__ import annotations

import argparse
import asyncio
import contextlib
import json
import os
import random
import signal
import statistics
import sys
import tempfile
import time
import urllib.request
from collections import Counter
from contextlib import ExitStack
from dataclasses import dataclass, field
from itertools import pairwise
from pathlib import Path
from typing import Any
from urllib.parse import urlsplit

import httpx
import psutil

from backends.environment import free_port
from backends.local import llama_cpp_python
from bench import children, processes
from bench.gpu import model_at
from bench.judge import judge_stream

EXAMPLES = """\
examples:
  vLLM's CPU build in a session of its own, which ends with it:
    python -m bench.gpu_kill --url http://127.0.0.1:8000 --gguf models/SmolLM2-135M-Instruct.Q4_1.gguf \\
        --chat-template models/smollm2-hf/tokenizer_config.json --streams 8 --max-tokens 60 --replicas 1
"""
ENGINE = "VLLM::EngineCore"
WORDS = ("river", "sea", "bridge", "bread", "moon", "library", "winter", "clock", "train", "field", "mountain")
RESUMED = b": resumed on "  # the comment that the proxy writes into a resumed stream


@dataclass
class Stream:
    """One request. `arrivals`: time.monotonic() of each read. `cut`: unfinished when the engine was killed. `begun`:
    set when the answer has begun or has ended."""

    request: dict[str, Any]
    status: int = 0
    body: bytearray = field(default_factory=bytearray)
    arrivals: list[float] = field(default_factory=list)
    broken: str = ""
    over: bool = False
    cut: bool = False
    begun: asyncio.Event = field(default_factory=asyncio.Event)

    @property
    def chunks(self) -> int:
        return self.body.count(b"\ndata: ")

    @property
    def wrong(self) -> str:
        """What is wrong with the stream; empty if it is complete."""
        return self.broken or judge_stream(self.status, bytes(self.body), self.request)

    @property
    def continued(self) -> bool:
        return any(line.startswith(RESUMED) for line in self.body.split(b"\n"))

    def stall(self, killed: float) -> float:
        """The longest silence after the kill, in seconds."""
        times = [killed, *(moment for moment in self.arrivals if moment > killed)]
        return max((after - before for before, after in pairwise(times)), default=0.0)


def make_request(model: str, number: int, options: argparse.Namespace) -> dict[str, Any]:
    """A request of more than 100 words, which is routed to the GPU."""
    words = random.Random(options.seed * 1000 + number).choices(WORDS, k=150)
    return {
        "model": model, "messages": [{"role": "user", "content": f"{number}: tell a story of {' '.join(words)}."}],
        "stream": True, "stream_options": {"include_usage": True}, "max_tokens": options.max_tokens, "temperature": 0,
        "ignore_eos": True,
    }  # fmt: skip


async def follow(client: httpx.AsyncClient, url: str, stream: Stream, after: int) -> None:
    try:
        async with client.stream("POST", f"{url}/v1/chat/completions", json=stream.request) as answer:
            stream.status = answer.status_code
            async for data in answer.aiter_raw():
                stream.arrivals.append(time.monotonic())
                stream.body += data
                if not stream.begun.is_set() and stream.chunks >= after:
                    stream.begun.set()
        stream.over = True
    except httpx.HTTPError as error:
        stream.broken = f"cut: {type(error).__name__}"
    finally:
        stream.begun.set()


async def storm(url: str, streams: list[Stream], engine: int, options: argparse.Namespace) -> float:
    """Run the streams, kill the engine and return when. Streams that do not finish in time are broken."""
    limits = httpx.Limits(max_connections=None)
    async with httpx.AsyncClient(timeout=None, limits=limits, trust_env=False) as client:
        tasks = [asyncio.create_task(follow(client, url, stream, options.after)) for stream in streams]
        await asyncio.wait([asyncio.create_task(stream.begun.wait()) for stream in streams], timeout=options.limit)
        killed = kill(engine, streams)
        _, joined_later = await asyncio.wait(tasks, timeout=options.limit)
        for task in joined_later:
            task.cancel()
        await asyncio.gather(*tasks, return_exceptions=True)
    for stream in streams:
        if not stream.over and not stream.broken:
            stream.broken = f"not over {options.limit:g} s after the kill"
    return killed


def kill(engine: int, streams: list[Stream]) -> float:
    for stream in streams:
        stream.cut = not stream.over
    os.kill(engine, signal.SIGKILL)
    progress(f"killed the engine; {sum(stream.cut for stream in streams)} streams were live")
    return time.monotonic()


def engine_of(url: str) -> int:
    """The engine process of the vLLM server that listens at `url`, one of its children. Raises StartError."""
    server = processes.listener(urlsplit(url).port or 80)
    for process in processes.process_tree(server.pid) if server else ():
        with contextlib.suppress(psutil.NoSuchProcess):
            if process.cmdline()[:1] and process.cmdline()[0].startswith(ENGINE):
                return process.pid
    raise children.StartError(f"no process {ENGINE} belongs to {url}")


def start_cpu(stack: ExitStack, model: str, options: argparse.Namespace, folder: Path) -> list[str]:
    """Start the CPU servers with one thread each, since there are many. Returns their URLs."""
    urls = []
    for number in range(options.replicas):
        port = free_port()
        command = llama_cpp_python(options.gguf, model, port, 1, options.ctx)
        stack.enter_context(children.running(command, folder / f"llama_cpp-{number}.log"))
        urls.append(f"http://127.0.0.1:{port}")
    for number, url in enumerate(urls):
        until_generates(url, folder / f"llama_cpp-{number}.log")
    return urls


def until_generates(url: str, log: Path, seconds: float = 120) -> None:
    """Wait until the server generates. Raises StartError."""
    body = json.dumps({"prompt": "Hi", "max_tokens": 1}).encode()
    deadline = time.monotonic() + seconds
    while time.monotonic() < deadline:
        with contextlib.suppress(OSError):
            request = urllib.request.Request(f"{url}/v1/completions", body, {"content-type": "application/json"})
            urllib.request.urlopen(request, timeout=30).close()
            return
        time.sleep(0.1)
    raise children.StartError(f"{url} does not generate; its log ends:\n{log.read_text(errors='replace')[-2000:]}")


def run(options: argparse.Namespace, folder: Path) -> tuple[list[Stream], float, str]:
    """(streams, time of the kill, the proxy's metrics). Raises StartError."""
    model, engine = model_at(options.url), engine_of(options.url)
    with ExitStack() as stack:
        cpu = start_cpu(stack, model, options, folder)
        log = folder / "proxy.log"
        command = [*children.PROXY, "--vllm", options.url, "--llama-cpp", ",".join(cpu)]
        environment = {
            "XGEN_BACKENDS__LLAMA_CPP__CHAT_TEMPLATE": str(options.chat_template),
            "XGEN_BACKENDS__LLAMA_CPP__CONTEXT": str(options.ctx),
            "XGEN_LOG_FORMAT": "json",
        }
        proxy = stack.enter_context(children.running(command, log, env=environment))
        url = f"http://127.0.0.1:{children.listening_port(proxy, log)}"
        children.until_ready(int(url.rpartition(":")[2]))
        until_all_up(url, 1 + options.replicas)
        streams = [Stream(make_request(model, number, options)) for number in range(options.streams)]
        killed = asyncio.run(storm(url, streams, engine, options))
        with urllib.request.urlopen(f"{url}/metrics", timeout=10) as answer:
            metrics = answer.read().decode()
        if options.log:
            options.log.write_bytes(log.read_bytes())
    return streams, killed, metrics


def until_all_up(url: str, replicas: int, seconds: float = 60) -> None:
    """Wait until all replicas are up. Raises StartError."""
    deadline = time.monotonic() + seconds
    while time.monotonic() < deadline:
        with urllib.request.urlopen(f"{url}/metrics", timeout=10) as answer:
            lines = answer.read().decode().splitlines()
        if sum(line.startswith("xgen_replica_up{") and line.endswith(" 1.0") for line in lines) == replicas:
            return
        time.sleep(0.1)
    raise children.StartError(f"not all of the {replicas} backends are up after {seconds:g} s")


def progress(text: str) -> None:
    print(f"gpu_kill: {text}", file=sys.stderr, flush=True)


def report(streams: list[Stream], killed: float, metrics: str) -> str:
    wrong = Counter(stream.wrong for stream in streams if stream.wrong)
    stalls = [stream.stall(killed) for stream in streams if stream.cut]
    ends = [stream.arrivals[-1] - killed for stream in streams if stream.arrivals]
    rows = [
        ("streams", str(len(streams))),
        ("live when the engine was killed", str(len(stalls))),
        ("complete", str(sum(not stream.wrong for stream in streams))),
        ("continued, as the proxy says in them", str(sum(stream.continued for stream in streams))),
        ("tokens received before the kill, median", f"{statistics.median(tokens_before(streams, killed)):.0f}"),
        ("stall, p50", f"{statistics.median(stalls):.2f} s" if stalls else "-"),
        ("stall, longest", f"{max(stalls):.2f} s" if stalls else "-"),
        ("the last one over, after the kill", f"{max(ends):.2f} s" if ends else "-"),
    ]
    lines = [f"{name:36}  {value}" for name, value in rows]
    lines += [f"LOST {count}: {why}" for why, count in wrong.most_common()]
    lines += [line for line in metrics.splitlines() if line.startswith(("xgen_requests_total", "xgen_continu"))]
    return "\n".join(lines)


def tokens_before(streams: list[Stream], killed: float) -> list[int]:
    """Reads of each stream before the kill, about one token each."""
    return [sum(moment <= killed for moment in stream.arrivals) for stream in streams]


def as_json(streams: list[Stream], killed: float) -> str:
    return json.dumps([
        {"wrong": stream.wrong, "cut": stream.cut, "continued": stream.continued, "stall_s": stream.stall(killed),
         "chunks": stream.chunks, "over_s": stream.arrivals[-1] - killed if stream.arrivals else None}
        for stream in streams
    ], indent=1)  # fmt: skip


def main() -> int:
    parser = argparse.ArgumentParser(
        description=__doc__, epilog=EXAMPLES, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--url", required=True, help="the vLLM server, on this machine: http://127.0.0.1:PORT")
    parser.add_argument("--gguf", required=True, type=Path, help="the CPU backends' model")
    parser.add_argument("--chat-template", required=True, type=Path, help="a tokenizer_config.json of that model")
    parser.add_argument("--replicas", type=int, default=4, help="llama-cpp-python servers (%(default)s)")
    parser.add_argument("--ctx", type=int, default=4096, help="their context in tokens (%(default)s)")
    parser.add_argument("--streams", type=int, default=64)
    parser.add_argument("--max-tokens", type=int, default=256)
    parser.add_argument("--after", type=int, default=64, help="chunks of each stream before the kill (%(default)s)")
    parser.add_argument("--limit", type=float, default=180, help="seconds to finish after the kill (%(default)s)")
    parser.add_argument("--seed", type=int, default=1)
    parser.add_argument("--json", type=Path, metavar="FILE", help="write the outcome of each stream")
    parser.add_argument("--log", type=Path, metavar="FILE", help="keep the proxy's log")
    options = parser.parse_args()
    with tempfile.TemporaryDirectory() as folder:
        try:
            streams, killed, metrics = run(options, Path(folder))
        except (children.StartError, OSError) as error:
            sys.exit(f"gpu_kill: {error}")
    print(report(streams, killed, metrics))
    if options.json:
        options.json.write_text(as_json(streams, killed))
    return 1 if any(stream.wrong for stream in streams) else 0


if __name__ == "__main__":
    sys.exit(main())
