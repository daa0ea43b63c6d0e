"""Send images to a vLLM that sees, beside one that does not, and kill it while it answers.

    python -m bench.images --url http://127.0.0.1:8000 --second http://127.0.0.1:8002 --blind http://127.0.0.1:8001

Starts a proxy in front of the servers, which run already and have one public model. Asks without an image, with one and
with two, through each of the APIs, streamed and not, and reports who answered and how many tokens the prompt had. Then
it opens `--streams` streams about an image at --url, kills its engine with SIGKILL, and has bench/judge.py check what
the clients got. Exits with 1 if an image went to the server that does not see, added no tokens, or had no effect on the
answer, or if a stream was broken.
"""

from __future__ import annotations

import argparse
import asyncio
import json
import statistics
import sys
import tempfile
from collections.abc import Iterator
from contextlib import ExitStack
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import httpx

from bench import children
from bench.engines.table import Row, text
from bench.gpu_kill import Stream, engine_of, storm, until_all_up
from tests.support.images import BLUE, RED
from xgen_proxy.models.conditions import conditions

EXAMPLES = """\
examples:
  A tiny vision model of random weights, then the three servers, each in a terminal of its own:
    python tests/support/tiny_vision.py TOKENIZER_DIR /tmp/tiny
    vllm serve /tmp/tiny --served-model-name m --port 8000 --gpu-memory-utilization 0.12 --max-model-len 2048
    vllm serve /tmp/tiny --served-model-name m --port 8002 --gpu-memory-utilization 0.12 --max-model-len 2048
    vllm serve TEXT_MODEL --served-model-name m --port 8001 --gpu-memory-utilization 0.4 --max-model-len 2048
"""
QUESTION = "What is in this picture?"
PICTURES = {"none": (), "one": (RED,), "two": (RED, BLUE)}
PATHS = {"chat": "/v1/chat/completions", "messages": "/v1/messages", "responses": "/v1/responses"}
SEEING = ("seeing", "second")
Json = dict[str, Any]


@dataclass(frozen=True)
class Asked:
    """One request. `images`: none, one or two. `backend`: who answered. `prompt_tokens`: as the answer counts them."""

    api: str
    stream: bool
    images: str
    status: int
    backend: str
    prompt_tokens: int


@dataclass(frozen=True)
class Killed:
    """What came of the streams whose engine was killed. `stall_s`: their longest silences after it, in seconds."""

    streams: int
    cut: int
    resumed: int
    complete: int
    wrong: list[str]
    stall_s: list[float]


def request(api: str, pictures: tuple[str, ...], model: str) -> Json:
    if api == "messages":
        sources = [{"type": "base64", "media_type": "image/png", "data": url.partition(",")[2]} for url in pictures]
        content: list[Json] = [{"type": "text", "text": QUESTION}, *({"type": "image", "source": s} for s in sources)]
        return {"model": model, "max_tokens": 16, "messages": [{"role": "user", "content": content}]}
    if api == "responses":
        content = [{"type": "input_text", "text": QUESTION}]
        content += [{"type": "input_image", "image_url": url, "detail": "auto"} for url in pictures]
        return {"model": model, "max_output_tokens": 16, "input": [{"role": "user", "content": content}]}
    content = [{"type": "text", "text": QUESTION}, *({"type": "image_url", "image_url": {"url": u}} for u in pictures)]
    return {
        "model": model, "max_tokens": 16, "messages": [{"role": "user", "content": content}], "temperature": 0,
        "ignore_eos": True, "stream_options": {"include_usage": True},
    }  # fmt: skip


def ask(url: str, api: str, images: str, stream: bool, model: str) -> Asked:
    """Without an image the request names the backend: the chat template of the other model adds other tokens."""
    body = {**request(api, PICTURES[images], model), "stream": stream}
    if not stream:
        body.pop("stream_options", None)
    chosen = {} if PICTURES[images] else {"x-backend": "seeing"}
    answer = httpx.post(url + PATHS[api], json=body, headers=chosen, timeout=120)
    usages = list(usages_in(events(answer) if stream else [answer.json()]))
    tokens = prompt_tokens(usages[-1]) if usages else 0  # the first of a message's stream may be an estimate
    return Asked(api, stream, images, answer.status_code, answer.headers.get("x-backend", ""), tokens)


def events(answer: httpx.Response) -> list[Any]:
    return [json.loads(line[6:]) for line in answer.text.splitlines() if line.startswith("data: {")]


def usages_in(value: Any) -> Iterator[Json]:
    """Each `usage` in JSON values, wherever an API puts it."""
    if isinstance(value, list):
        for each in value:
            yield from usages_in(each)
    elif isinstance(value, dict):
        if isinstance(value.get("usage"), dict):
            yield value["usage"]
        for each in value.values():
            yield from usages_in(each)


def prompt_tokens(usage: Json) -> int:
    """Messages do not count cached tokens as input tokens, the others do."""
    if "prompt_tokens" in usage:
        return int(usage["prompt_tokens"])
    return int(usage.get("input_tokens") or 0) + int(usage.get("cache_read_input_tokens") or 0)


def first_token(url: str, picture: str, model: str) -> Any:
    body = {**request("chat", (picture,), model), "max_tokens": 1, "logprobs": True, "top_logprobs": 1}
    del body["stream_options"]
    answer = httpx.post(url + PATHS["chat"], json=body, timeout=120).raise_for_status().json()
    found = answer["choices"][0]["logprobs"]["content"][0]
    return found["token"], round(found["logprob"], 2)


def kill(url: str, options: argparse.Namespace) -> Killed:
    """Raises StartError."""
    body = {**request("chat", (RED,), options.model), "max_tokens": options.max_tokens, "stream": True}
    streams = [Stream({**body, "backend": "seeing"}) for _ in range(options.streams)]
    killed = asyncio.run(storm(url, streams, engine_of(options.url), options))
    return Killed(
        streams=len(streams),
        cut=sum(stream.cut for stream in streams),
        resumed=sum(stream.continued for stream in streams),
        complete=sum(not stream.wrong for stream in streams),
        wrong=[stream.wrong for stream in streams if stream.wrong],
        stall_s=[round(stream.stall(killed), 3) for stream in streams if stream.cut],
    )


def measure(options: argparse.Namespace, folder: Path) -> Json:
    """The content of the result file, without its conditions. Raises StartError."""
    urls = {"seeing": options.url, "second": options.second, "blind": options.blind}
    env = {}
    for name, url in urls.items():
        env[f"XGEN_BACKENDS__{name.upper()}__URLS"] = url
        env[f"XGEN_BACKENDS__{name.upper()}__DIALECT"] = "vllm"
    with ExitStack() as stack:
        log = folder / "proxy.log"
        process = stack.enter_context(children.running(children.PROXY, log, env=env))
        url = f"http://127.0.0.1:{children.listening_port(process, log)}"
        until_all_up(url, len(urls))
        status = httpx.get(url + "/models/status", timeout=10).json()["backends"]
        asked = [
            ask(url, api, images, stream, options.model)
            for api in PATHS for stream in (False, True) for images in PICTURES
        ]  # fmt: skip
        tokens = [first_token(url, picture, options.model) for picture in (RED, BLUE, RED)]
        return {
            "reads_images": {each["name"]: "images" in each["capabilities"] for each in status},
            "asked": [asdict(each) for each in asked],
            "another_image_another_token": tokens[0] == tokens[2] != tokens[1],
            "killed": asdict(kill(url, options)),
        }


def faults(found: Json) -> Iterator[str]:
    """What did not hold."""
    if found["reads_images"] != {"seeing": True, "second": True, "blind": False}:
        yield f"it was not learnt who reads images: {found['reads_images']}"
    tokens = {(each["api"], each["stream"], each["images"]): each["prompt_tokens"] for each in found["asked"]}
    for each in found["asked"]:
        if each["status"] != 200 or each["backend"] not in SEEING:
            yield f"{each} was not answered by a server that sees"
    for api, stream in dict.fromkeys((api, stream) for api, stream, _ in tokens):
        none, one, two = (tokens[api, stream, images] for images in PICTURES)
        if not 0 < none < one < two:
            yield f"{api}, stream={stream}: the images added no tokens: {none}, {one}, {two}"
    if not found["another_image_another_token"]:
        yield "another image did not change the answer"
    killed = found["killed"]
    if not killed["streams"] == killed["cut"] == killed["resumed"] == killed["complete"]:
        yield f"not each stream was cut, resumed and complete: {killed}"


def table(found: Json) -> Iterator[Row]:
    """Of the result file: an API a row, and the streams that were killed."""
    yield "API", "answered by", "prompt tokens without an image", "with one", "with two"
    for api in PATHS:
        own = [each for each in found["asked"] if each["api"] == api]
        where = sorted({each["backend"] for each in own if each["images"] != "none"})
        counts = [sorted({each["prompt_tokens"] for each in own if each["images"] == images}) for images in PICTURES]
        yield PATHS[api], ", ".join(where), *(", ".join(map(str, each)) for each in counts)


def kill_table(found: Json) -> Iterator[Row]:
    killed = found["killed"]
    counts = (str(killed[name]) for name in ("streams", "cut", "resumed", "complete"))
    stalls = killed["stall_s"] or [0]
    yield "streams", "cut by the kill", "resumed", "complete", "stall p50, s", "longest, s"
    yield *counts, f"{statistics.median(stalls):.2f}", f"{max(stalls):.2f}"


def main() -> int:
    parser = argparse.ArgumentParser(
        prog="python -m bench.images", description=__doc__, epilog=EXAMPLES,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )  # fmt: skip
    flag = parser.add_argument
    flag("--url", required=True, help="a vLLM on this machine whose model reads images; its engine is killed")
    flag("--second", required=True, help="another one, which takes its streams over")
    flag("--blind", required=True, help="a vLLM whose model does not read images, under the same model name")
    flag("--model", default="m", help="(%(default)s)")
    flag("--streams", type=int, default=16, help="at once when the engine is killed (%(default)s)")
    flag("--max-tokens", type=int, default=512, help="of each (%(default)s)")
    flag("--after", type=int, default=64, help="chunks of each before the kill (%(default)s)")
    flag("--limit", type=float, default=120, help="seconds to finish after the kill (%(default)s)")
    flag("--json", type=Path, metavar="FILE")
    options = parser.parse_args()
    children.end_on_sigterm()
    with tempfile.TemporaryDirectory() as folder:
        try:
            found = measure(options, Path(folder))
        except (children.StartError, OSError, httpx.HTTPError) as error:
            print(f"images: {error}", file=sys.stderr)
            return 1
    print(text(table(found)), text(kill_table(found)), sep="\n")
    if options.json:
        how = conditions(["python", "-m", "bench.images", *sys.argv[1:]])
        how["versions"]["vllm"] = (
            httpx.get(f"{options.second}/version", timeout=10).raise_for_status().json()["version"]
        )
        options.json.write_text(json.dumps({"conditions": how, **found}, indent=1))
    wrong = list(faults(found))
    print(*(f"images: {each}" for each in wrong), sep="\n", file=sys.stderr)
    return 1 if wrong else 0


if __name__ == "__main__":
    sys.exit(main())
