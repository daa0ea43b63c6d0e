"""`models distance`, or `models compare --served`: the distance between the models of two running backends."""

from __future__ import annotations

import argparse
import json
import sys
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

import httpx

from xgen_proxy.models.conditions import conditions, typed, without_password
from xgen_proxy.models.errors import ModelError
from xgen_proxy.models.progress import say
from xgen_proxy.models.served.distance import Figures
from xgen_proxy.models.served.engines import Engine, ask, connect
from xgen_proxy.models.served.measurement import DifferentTokensError, Result, described, measure
from xgen_proxy.models.storage import result_file
from xgen_proxy.values import frozen

FORMAT = "xgen-proxy model distance 1"  # config/fallback.py reads it
SHIPPED = Path(__file__).parent.parent / "compare" / "texts"
FORMULA = (
    "kld_at_least: sum over the tokens that both engines name among their likeliest of p ln(p/q), and the rest as one"
    " further token; a lower bound of the divergence over the whole vocabulary, in nats"
)
TOP = 20  # vLLM's own default of --max-logprobs

EXAMPLES = """\
examples:
  xgen-proxy models distance http://gpu-box:8000 http://127.0.0.1:8081
  xgen-proxy models distance --url http://127.0.0.1:8080 --json distance.json
  xgen-proxy models distance http://gpu-box:8000 http://127.0.0.1:8081 --text letters.txt --text code.py

The first server is the reference, as vLLM on the GPU; the second is what may stand in for it. With --url, a running
proxy tells which backends serve the same model, and each is compared with the GPU's. For each text, by language:

  same top token  the share of positions at which both prefer the same next token, with its standard error: what
                  changes in greedy answers when one stands in for the other
  KLD             the mean divergence of the second from the first in nats, at least: engines name only their 20
                  likeliest tokens, and all others count as one

A server that is asked is busy for that time: 1,000 tokens take a llama-server on two cores half a minute. The proxy
reads the --json file: XGEN_FALLBACK__DISTANCES=distance.json XGEN_FALLBACK__MIN_TOP1=0.95 refuses a fallback to a model
that is farther away.
"""


@frozen
class Pair:
    """Two engines, and what the proxy calls their backends and their model."""

    first: Engine
    second: Engine
    names: tuple[str, str]
    model: str


def add_distance(subparsers: Any) -> argparse.ArgumentParser:
    command: argparse.ArgumentParser = subparsers.add_parser(
        "distance",
        help="Measure how far apart the models of two running backends are.",
        description="Measure how far apart the models of two running backends are.",
        epilog=EXAMPLES,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    command.add_argument("urls", nargs="*", metavar="URL", help="two engine servers, the reference first")
    add_served_flags(command)
    return command


def add_served_flags(command: argparse.ArgumentParser) -> None:
    command.add_argument("--url", metavar="PROXY", help="ask this proxy for the backends that serve the same model")
    command.add_argument("--api-key", help="the proxy's key, if it requires one")
    command.add_argument("--engine-key", help="the engines' key, if they require one")
    command.add_argument(
        "--model",
        help="the model's public name, which an engine that serves one model need not know (default: each one's first)",
    )
    command.add_argument(
        "--backends",
        metavar="NAME,NAME",
        help="what the proxy's settings call the two (default: vllm and llama_cpp, by the engine that answers)",
    )
    command.add_argument("--text", action="append", type=Path, metavar="FILE", help="a text, repeatable; named by file")
    command.add_argument(
        "--tokens", type=at_least(8), default=1000, help="tokens to read of each text (default: %(default)s)"
    )
    command.add_argument(
        "--window", type=at_least(8), default=256, help="tokens read in one piece (default: %(default)s)"
    )
    command.add_argument("--json", type=Path, metavar="FILE", help="write everything, for fallback.distances")


def at_least(least: int) -> Any:
    def number(text: str) -> int:
        if not text.isdecimal() or int(text) < least:
            raise argparse.ArgumentTypeError(f"{text!r} is not a number of at least {least}")
        return int(text)

    return number


def run_served(arguments: argparse.Namespace) -> int:
    try:
        if arguments.json is not None and not arguments.json.absolute().parent.is_dir():
            raise ModelError(f"{arguments.json.parent} is not a folder; --json FILE is written there")
        texts = read_texts(arguments.text)
        sizes = {"tokens": arguments.tokens, "window": arguments.window, "top": TOP}
        results = [(pair, measure(pair.first, pair.second, texts, **sizes)) for pair in pairs(arguments)]
        for pair, result in results:
            sys.stdout.write("\n".join(table(pair, result)) + "\n")
        if arguments.json is not None:
            content = as_json(results, sizes, words(arguments))
            with result_file(arguments.json) as file:  # a proxy may read it at any moment
                file.write_text(json.dumps(content, indent=2, ensure_ascii=False) + "\n")
    except ModelError as error:
        say(f"xgen-proxy: {error}")
        return 1 if isinstance(error, DifferentTokensError) else 2
    return 0


def read_texts(paths: Sequence[Path] | None) -> dict[str, str]:
    """By the name of the file, which for the shipped texts is the language. Raises ModelError."""
    files = paths or [SHIPPED / f"{language}.txt" for language in ("english", "korean", "code")]
    try:
        return {file.stem: file.read_text() for file in files}
    except (OSError, UnicodeDecodeError) as error:
        raise ModelError(f"a text cannot be read: {error}") from None


# which engines


def pairs(arguments: argparse.Namespace) -> list[Pair]:
    """Raises ModelError."""
    if arguments.url is not None:
        if arguments.urls:
            raise ModelError("give two servers or --url of a proxy, not both")
        return list(pairs_of_proxy(arguments))
    if len(arguments.urls) != 2:
        raise ModelError("give the addresses of two engine servers, the reference first, or --url of a proxy")
    first, second = (connect(url, arguments.model, arguments.engine_key, alias=True) for url in arguments.urls)
    given = arguments.backends.split(",") if arguments.backends else []
    names = [each.strip() for each in given] or [first.default_backend, second.default_backend]
    if len(names) != 2 or not all(names) or names[0] == names[1]:
        raise ModelError(f"--backends needs two names that differ, such as vllm,llama_cpp; it has {', '.join(names)}")
    return [Pair(first, second, (names[0], names[1]), arguments.model or first.model)]


def pairs_of_proxy(arguments: argparse.Namespace) -> Iterator[Pair]:
    """The backends that serve the model, each with the first one on a GPU. Raises ModelError."""
    headers = {"authorization": f"Bearer {arguments.api_key}"} if arguments.api_key else {}
    with httpx.Client(headers=headers, timeout=10, trust_env=False) as client:
        status = ask(client, f"{arguments.url.rstrip('/')}/models/status")
    try:
        model = arguments.model or status["default_model"]
        backends = [each for each in status["backends"] if model in each["models"]]
        backends.sort(key=lambda each: each["device_class"] != "gpu")
        up = [(each, next((r["url"] for r in each["replicas"] if r["up"]), None)) for each in backends]
    except (LookupError, TypeError):
        raise ModelError(f"{arguments.url} is not an xgen-proxy") from None
    down = [each["name"] for each, url in up if url is None]
    if len(backends) < 2 or down:
        problem = f"{', '.join(down)} has no replica that is up" if down else "one backend serves it, or none"
        raise ModelError(f"nothing to compare for the model {model}: {problem}; `xgen-proxy status` shows the backends")
    engines = [connect(str(url), each["models"][model], arguments.engine_key) for each, url in up]
    for engine, backend in zip(engines[1:], backends[1:], strict=True):
        yield Pair(engines[0], engine, (backends[0]["name"], backend["name"]), str(model))


# what is printed and written


def table(pair: Pair, result: Result) -> list[str]:
    rows = [*result.texts.items(), ("all", result.all)]
    width = max(len(name) for name, _ in rows)
    lines = [
        f"{pair.model}: "
        + " and ".join(
            f"{name} ({engine.name}, {without_password(engine.url)})"
            for name, engine in zip(pair.names, (pair.first, pair.second), strict=True)
        ),
        f"{'text'.ljust(width)}  positions  same top token   KLD at least        named by both",
        *(f"{name.ljust(width)}  {row(each)}" for name, each in rows),
    ]
    if any(each.top1 is None for each in result.texts.values()):
        lines.append(
            "?: llama-cpp-python names tokens by their text, which parts of characters do not have; a llama-server with"
            " the same file can tell"
        )
    return lines


def row(figures: Figures) -> str:
    same = "?" if figures.top1 is None else f"{figures.top1:.1%} ± {figures.top1_se:.1%}"
    return f"{figures.positions:9,}  {same:15}  {figures.kld:.4f} ± {figures.kld_se:.4f}  {figures.named:14.1%}"


def words(arguments: argparse.Namespace) -> list[str]:
    """The command, as it can be typed again, without its keys."""
    flags = ("url", "model", "backends", "text", "tokens", "window", "json")
    return ["xgen-proxy", "models", "distance", *arguments.urls, *typed(arguments, flags)]


def as_json(results: Sequence[tuple[Pair, Result]], sizes: dict[str, int], command: Sequence[str]) -> dict[str, Any]:
    return {
        "format": FORMAT,
        "conditions": conditions(command),
        "sizes": sizes,
        "formula": FORMULA,
        "pairs": [
            {
                "model": pair.model,
                "reference": described(pair.first, pair.names[0]),
                "other": described(pair.second, pair.names[1]),
                "all": result.all.as_dict(),
                "texts": {name: each.as_dict() for name, each in result.texts.items()},
            }
            for pair, result in results
        ],
    }
