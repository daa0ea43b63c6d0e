"""Measure how session affinity raises the hit rate of prefix caches, with two real llama-servers.

    python -m bench.affinity --model models/SmolLM2-135M-Instruct.Q4_1.gguf

There are more conversations than slots; they take turns, two requests at once, as people do who read between turns.
Three variants: a session per conversation, no sessions but prompts with the same beginning, and a new session for each
request, which scatters them. The servers report what was cached (usage.prompt_tokens_details.cached_tokens). Each
repeat has its own seeded conversations.
"""

from __future__ import annotations

import argparse
import random
import statistics
import sys
import tempfile
import time
from concurrent.futures import ThreadPoolExecutor
from contextlib import ExitStack
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import httpx

from bench import children

SLOTS = 4
WORDS_A_TURN = 60
WAYS = ("session", "prompt", "scattered")
WORDS = ("time", "year", "people", "way", "day", "man", "thing", "woman", "life", "child", "world", "school", "state")
NO_CERTIFICATES = httpx.create_ssl_context(verify=False)


@dataclass
class Answers:
    prompt: int = 0
    cached: int = 0
    seconds: list[float] = field(default_factory=list)

    def add(self, usage: Any, seconds: float) -> None:
        self.prompt += usage["prompt_tokens"]
        self.cached += usage["prompt_tokens_details"]["cached_tokens"]
        self.seconds.append(seconds)

    @property
    def hit_rate(self) -> float:
        return self.cached / self.prompt


class Conversation:
    def __init__(self, url: str, way: str, name: str) -> None:
        self.url, self.way, self.name = url, way, name
        self.random = random.Random(name)
        self.messages: list[dict[str, str]] = []

    def set_state(self, number: int) -> tuple[Any, float]:
        """(usage, seconds)"""
        self.messages.append({"role": "user", "content": " ".join(self.random.choices(WORDS, k=WORDS_A_TURN))})
        body: dict[str, Any] = {"messages": self.messages, "max_tokens": 4, "temperature": 0}
        if self.way != "prompt":
            body["session_id"] = self.name if self.way == "session" else f"{self.name} {number}"
        began = time.perf_counter()
        answer = httpx.post(f"{self.url}/v1/chat/completions", json=body, timeout=120, verify=NO_CERTIFICATES)
        answer.raise_for_status()
        self.messages.append({"role": "assistant", "content": answer.json()["choices"][0]["message"]["content"]})
        return answer.json()["usage"], time.perf_counter() - began


def measure(url: str, way: str, seed: str, options: argparse.Namespace) -> Answers:
    """First turns do not count: they cannot be cached."""
    answers = Answers()
    talks = [Conversation(url, way, f"{seed} {number}") for number in range(options.conversations)]
    with ThreadPoolExecutor(2) as pool:
        for number in range(options.turns):
            for usage, seconds in pool.map(lambda talk, number=number: talk.set_state(number), talks):
                if number:
                    answers.add(usage, seconds)
    return answers


def start(stack: ExitStack, options: argparse.Namespace, logs: Path) -> str:
    """Start two servers and a proxy in front of them. Returns the URL of the proxy."""
    urls = []
    for number in range(2):
        log = logs / f"llama-server-{number}"
        command = [
            sys.executable,
            "-m",
            "backends.llama_cpp.llama_server",
            "-m",
            options.model,
            "-a",
            "m",
            "--port",
            "0",
        ]
        command += ["-c", str(SLOTS * 2048), "-np", str(SLOTS), "--metrics", "--no-ui", "--offline"]
        urls.append(
            f"http://127.0.0.1:{children.listening_port(stack.enter_context(children.running(command, log)), log, 60)}"
        )
    log = logs / "proxy"
    flags = ["--llama-cpp", ",".join(urls), "--engine", "llama-server"]
    proxy = stack.enter_context(children.running([*children.PROXY, *flags], log))
    port = children.listening_port(proxy, log)
    children.until_ready(port, 60)
    return f"http://127.0.0.1:{port}"


def row(way: str, repeats: list[Answers]) -> str:
    rates = [each.hit_rate * 100 for each in repeats]
    medians = [statistics.median(each.seconds) for each in repeats]
    spread = f"{statistics.median(rates):5.1f} % ({min(rates):.1f}-{max(rates):.1f})"
    return f"{way:10}  {spread:22}  {statistics.median(medians):5.2f} s ({min(medians):.2f}-{max(medians):.2f})"


def main() -> None:
    flags = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    flags.add_argument("--model", required=True, help="a GGUF file")
    flags.add_argument("--conversations", type=int, default=12, help="(%(default)s)")
    flags.add_argument("--turns", type=int, default=5, help="per conversation (%(default)s)")
    flags.add_argument("--repeats", type=int, default=3, help="(%(default)s)")
    options = flags.parse_args()
    children.end_on_sigterm()
    found: dict[str, list[Answers]] = {way: [] for way in WAYS}
    with ExitStack() as stack:
        url = start(stack, options, Path(stack.enter_context(tempfile.TemporaryDirectory())))
        for repeat in range(options.repeats):
            for way in WAYS[repeat % 3 :] + WAYS[: repeat % 3]:
                found[way].append(measure(url, way, f"{way} {repeat}", options))
                print(f"repeat {repeat + 1}: {row(way, found[way][-1:])}", file=sys.stderr, flush=True)
    print("way         prompt tokens cached    a request takes (median)")
    print("\n".join(row(way, repeats) for way, repeats in found.items()))


if __name__ == "__main__":
    main()
