"""Sends images through a proxy to a running vLLM that sees, beside a server that does not, and prints where they went.

    python -m bench.images --url http://127.0.0.1:8000 --blind http://127.0.0.1:8001 --model m

Starts a proxy in front of both, with one public model. Exits with 1 if an image went to the wrong one.
"""

from __future__ import annotations

import argparse
import sys
import tempfile
import time
from pathlib import Path
from typing import Any

import httpx

from tests.support import real_servers as servers
from tests.support.images import BLUE, RED, about, image


def main() -> None:
    flags = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    flags.add_argument("--url", required=True, help="a vLLM whose model reads images")
    flags.add_argument("--blind", help="a vLLM or llama-server whose model does not, under the same model name")
    flags.add_argument("--blind-dialect", default="vllm", choices=["vllm", "llama-server"])
    flags.add_argument("--model", default="m")
    options = flags.parse_args()
    env = {"XGEN_BACKENDS__SEEING__URLS": options.url, "XGEN_BACKENDS__SEEING__DIALECT": "vllm"}
    if options.blind:
        env |= {"XGEN_BACKENDS__BLIND__URLS": options.blind, "XGEN_BACKENDS__BLIND__DIALECT": options.blind_dialect}
    with tempfile.TemporaryDirectory() as folder:
        proxy = servers.proxy(Path(folder) / "proxy.log", env=env).start()
        try:
            proxy.wait_ready()
            sys.exit(0 if run(proxy.url, options.model) else 1)
        finally:
            proxy.stop()


def run(url: str, model: str) -> bool:
    for each in httpx.get(url + "/models/status").json()["backends"]:
        print(each["name"], "reads", [need for need in ("images", "audio", "video") if need in each["capabilities"]])
    questions: dict[str, list[Any]] = {"text": [], "red": [image(RED)], "two": [image(RED), image(BLUE)]}
    good = True
    for name, parts in questions.items():
        for stream in (False, True):
            fields = {"stream_options": {"include_usage": True}} if stream else {}
            body = {"model": model, "messages": about(*parts), "max_tokens": 16, "stream": stream, **fields}
            started = time.perf_counter()
            answer = httpx.post(url + "/v1/chat/completions", json={**body, "ignore_eos": True}, timeout=120)
            text, where = answer.text.replace("\n", " "), answer.headers.get("x-backend")
            good = good and answer.status_code == 200 and (where == "seeing" or not parts)
            took, usage = time.perf_counter() - started, text.rpartition('"usage":')[2][:60]
            print(f"{name:5} stream={stream!s:5} {answer.status_code} {where} {took:.2f} s, usage {usage}")
    return good


if __name__ == "__main__":
    main()
