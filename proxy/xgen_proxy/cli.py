"""The command line: serve, check, route, status, key, models, cost. Only commands print."""

from __future__ import annotations

import argparse
import os
import sys
from collections.abc import Callable, Iterable, Sequence
from pathlib import Path
from typing import Any

import httpx
import orjson

from xgen_proxy import __version__
from xgen_proxy.api.api_keys import new_key
from xgen_proxy.config.loading import ConfigError, ConfigSources, doubts
from xgen_proxy.costs import commands as cost_commands
from xgen_proxy.dialects.registry import DIALECTS
from xgen_proxy.models import commands as model_commands
from xgen_proxy.models.errors import ModelError
from xgen_proxy.server import PortInUseError, serve

EXAMPLES = """\
examples:
  xgen-proxy serve --llama-cpp http://127.0.0.1:8081
  xgen-proxy serve --llama-cpp http://127.0.0.1:8081 --vllm http://gpu-box:8000
  xgen-proxy check
  echo '{"messages": [{"role": "user", "content": "Hi"}]}' | xgen-proxy route
  xgen-proxy status
  xgen-proxy models pull smollm2
"""

SERVE_EXAMPLES = """\
examples:
  one CPU backend:           xgen-proxy serve --llama-cpp http://127.0.0.1:8081
  llama.cpp's own server:    xgen-proxy serve --llama-cpp http://127.0.0.1:8081 --engine llama-server
  GPU with CPU as fallback:  xgen-proxy serve --vllm http://gpu-box:8000 --llama-cpp http://127.0.0.1:8081
  several replicas:          xgen-proxy serve --vllm http://gpu-1:8000,http://gpu-2:8000
  everything from a file:    xgen-proxy serve --config xgen-proxy.toml

Every other setting comes from the environment (XGEN_ROUTING__LONG_PROMPT_WORDS=200), .env, the secrets directory or
the TOML file. `xgen-proxy check` lists all settings with their values.
"""

CHECK_EXAMPLES = """\
examples:
  xgen-proxy check --llama-cpp http://127.0.0.1:8081
  XGEN_ROUTING__LONG_PROMPT_WORDS=200 xgen-proxy check --vllm http://gpu-box:8000

Each line is a setting, its value and the source of the value: flag, environment, .env, the secrets directory, the TOML
file or default. If a setting is invalid, the command says which one and how to correct it, and exits with 2. It warns
of an alias (models.aliases) for a model that no backend serves, if the settings name the models of all backends.
"""

ROUTE_EXAMPLES = """\
examples:
  echo '{"messages": [{"role": "user", "content": "Hi"}], "urgency": "high"}' | xgen-proxy route
  xgen-proxy route request.json --url http://127.0.0.1:8080

Asks a running proxy how it would route this request now, without sending it to a backend. Prints the candidates in the
order in which they would be tried, each with the reason, and the backends that were ruled out, each with the reason.
"""

STATUS_EXAMPLES = """\
examples:
  xgen-proxy status
  xgen-proxy status --details
  xgen-proxy status --url http://proxy-box:8080

Each line is one replica. `busy` is requests in flight / slots, `load` is 0 for idle and 1 for full, and `reason`
explains the state.

--details adds tables of what is known besides. KV cache: `in use`, its `blocks` and the tokens of one, its `tokens` in
all, the `share` of the GPU's memory that vLLM may take, `hits` (prompt tokens found in the prefix cache) and
`preempted` (requests that lost their blocks) since vLLM started. Models: vocabulary, trained context, layers, width.
GPUs: those of the proxy's machine. `?` is unknown.
"""

KEY_EXAMPLES = """\
examples:
  xgen-proxy key

Prints a new key for a client, and its hash for the setting api_keys (XGEN_API_KEYS=<hash>[,<hash>…]). The proxy stores
only the hash, so keep the key: it cannot be shown again.
"""


def main(argv: Sequence[str] | None = None) -> int:
    arguments = parser().parse_args(argv)
    run: Callable[[argparse.Namespace], int] = arguments.run
    try:
        code = run(arguments)
        sys.stdout.flush()
        return code
    except (ConfigError, PortInUseError, CommandError) as error:
        print(f"xgen-proxy: {error}", file=sys.stderr)
        return 2
    except ModelError as error:
        print(f"xgen-proxy: {error}", file=sys.stderr)
        return error.status
    except KeyboardInterrupt:
        return 130
    except BrokenPipeError:  # as in `xgen-proxy check | head`
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        return 141


class CommandError(Exception):
    """Ends the command with this message and exit status 2."""


def parser() -> argparse.ArgumentParser:
    top = argparse.ArgumentParser(
        prog="xgen-proxy",
        description="An OpenAI-compatible proxy for vLLM (GPU) and llama.cpp (CPU) servers.",
        epilog=EXAMPLES,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    top.add_argument("--version", action="version", version=f"xgen-proxy {__version__}")
    commands = top.add_subparsers(required=True, metavar="COMMAND")

    def add(name: str, run: Callable[[argparse.Namespace], int], help: str, epilog: str) -> argparse.ArgumentParser:
        command = commands.add_parser(
            name, help=help, description=help, epilog=epilog, formatter_class=argparse.RawDescriptionHelpFormatter
        )
        command.set_defaults(run=run)
        return command

    add_settings(add("serve", run_serve, "Start the proxy.", SERVE_EXAMPLES))
    add_settings(add("check", run_check, "Check the settings and print each with its source.", CHECK_EXAMPLES))
    route = add("route", run_route, "Show how a request would be routed, without sending it.", ROUTE_EXAMPLES)
    route.add_argument("file", nargs="?", default="-", help="file with the request as JSON (default: standard input)")
    add_client(route)
    status = add("status", run_status, "Show the state and load of every replica.", STATUS_EXAMPLES)
    status.add_argument("--details", action="store_true", help="also show KV caches, models and GPUs")
    add_client(status)
    add("key", run_key, "Create an API key for a client.", KEY_EXAMPLES)
    model_commands.add_to(commands)
    cost_commands.add_to(commands)
    return top


def add_settings(command: argparse.ArgumentParser) -> None:
    command.add_argument("--host", help="address to listen on (default: 127.0.0.1)")
    command.add_argument("--port", type=int, help="port to listen on; 0 picks a free one (default: 8080)")
    command.add_argument("--vllm", metavar="URL[,URL]", help="vLLM servers, for the GPU; several with commas")
    command.add_argument("--llama-cpp", metavar="URL[,URL]", help="llama.cpp servers, for the CPU; several with commas")
    command.add_argument(
        "--engine",
        choices=[name for name, dialect in DIALECTS.items() if dialect.device_class == "cpu"],
        help="the software of the --llama-cpp servers (default: llama-cpp-python)",
    )
    command.add_argument(
        "--config",
        metavar="FILE",
        help="TOML file with settings, the lowest-priority source (default: ./xgen-proxy.toml)",
    )


def add_client(command: argparse.ArgumentParser) -> None:
    command.add_argument("--url", default="http://127.0.0.1:8080", help="address of the proxy (default: %(default)s)")
    command.add_argument("--api-key", help="API key, if the proxy requires one")


def config_sources(arguments: argparse.Namespace) -> ConfigSources:
    return ConfigSources(flags_of(arguments), Path(arguments.config) if arguments.config is not None else None)


def flags_of(arguments: argparse.Namespace) -> dict[str, Any]:
    """The flags that were given, nested like the settings."""
    flags = {name: getattr(arguments, name) for name in ("host", "port") if getattr(arguments, name) is not None}
    backends: dict[str, dict[str, Any]] = {}
    if arguments.vllm:
        backends["vllm"] = {"urls": arguments.vllm}
    if arguments.llama_cpp:
        backends["llama_cpp"] = {"urls": arguments.llama_cpp}
    if arguments.engine:
        backends.setdefault("llama_cpp", {})["dialect"] = arguments.engine
    return {**flags, "backends": backends} if backends else flags


def run_serve(arguments: argparse.Namespace) -> int:
    serve(config_sources(arguments), announce=lambda url: print(f"listening on {url}", flush=True))
    return 0


def run_check(arguments: argparse.Namespace) -> int:
    sources = config_sources(arguments)
    settings = sources.load()
    print_table([("setting", "value", "from"), *sources.explain(settings)])
    for doubt in doubts(settings):
        print(f"xgen-proxy: warning: {doubt}", file=sys.stderr)
    return 0


def run_route(arguments: argparse.Namespace) -> int:
    body = sys.stdin.buffer.read() if arguments.file == "-" else read_file(arguments.file)
    plan = ask(arguments, "POST", "/route", body)
    if plan.get("error"):
        print(f"refused: {plan['error']['message']}")
    if alias := plan["features"].get("alias"):  # an older proxy has none
        print(f"alias: {alias['asked']} is {plan['features']['model']} (models.aliases, {alias['pattern']})")
    rows = [
        (str(index), each["backend"], each["replica"], f"{each['load']:.2f}", planned_reason(each))
        for index, each in enumerate(plan["candidates"], 1)
    ]
    if rows:
        print_table([("try", "backend", "replica", "load", "reason"), *rows])
    for each in plan["rejections"]:
        print(f"not {each['name']}: {each['reason']}")
    return 1 if plan.get("error") else 0


def planned_reason(candidate: dict[str, Any]) -> str:
    """With the candidate's pressure, if memory is short."""
    memory = candidate.get("memory")  # an older proxy tells none
    return candidate["reason"] if not memory or memory in candidate["reason"] else f"{candidate['reason']}; {memory}"


def read_file(path: str) -> bytes:
    try:
        return Path(path).read_bytes()
    except OSError as error:
        raise CommandError(f"cannot read {path}: {error.strerror}") from None


def run_status(arguments: argparse.Namespace) -> int:
    status = ask(arguments, "GET", "/models/status")
    rows = [
        (
            replica["name"],
            backend["device_class"],
            replica["state"],
            f"{replica['in_flight']}/{replica['slots']}",
            f"{replica['load']['total']:.2f}",
            ",".join(backend["models"]),
            str(backend["context"] or "?"),
            megabytes(replica["memory"]["process_rss_bytes"]),
            reason_of(replica),
        )
        for backend in status["backends"]
        for replica in backend["replicas"]
    ]
    print_table([("replica", "device", "state", "busy", "load", "models", "context", "memory", "reason"), *rows])
    print(f"waiting for a slot: {status['queued']}")
    for pattern, alias in status.get("aliases", {}).items():  # an older proxy has none
        if not alias["served"]:
            print(f"alias {pattern}: no backend serves {alias['model']}")
    if arguments.details:
        print_details(status)
    return 0


def print_details(status: dict[str, Any]) -> None:
    """An older proxy has none."""
    replicas = [replica for backend in status["backends"] for replica in backend["replicas"]]
    caches = [
        (
            each["name"], percent(each["memory"]["kv_usage"]), number(cache["blocks"]), number(cache["block_size"]),
            number(cache["tokens"]), percent(cache["memory_utilization"]), percent(cache["prefix_hit_rate"]),
            number(cache["preemptions"]),
        )
        for each in replicas
        if (cache := each.get("kv_cache"))
    ]  # fmt: skip
    models = [
        (
            each["name"], number(model["vocabulary"]), number(model["context"]), number(model["layers"]),
            number(model["width"]), number(model["parameters"]), megabytes(model["bytes"]),
            model["quantization"] or "?",
        )
        for each in replicas
        if (model := each.get("model"))
    ]  # fmt: skip
    gpus = [
        (each["name"], megabytes(each["used_bytes"]), megabytes(each["total_bytes"]))
        for each in status.get("gpus") or ()
    ]
    for head, rows in (
        (("KV cache", "in use", "blocks", "block", "tokens", "share", "hits", "preempted"), caches),
        (("model", "vocabulary", "context", "layers", "width", "parameters", "size", "quantization"), models),
        (("GPU", "used", "total"), gpus),
    ):
        if rows:
            print()
            print_table([head, *rows])


def percent(value: float | None) -> str:
    return "?" if value is None else f"{value:.0%}"


def number(value: int | None) -> str:
    return "?" if value is None else f"{value:,}"


def reason_of(replica: dict[str, Any]) -> str:
    """Of its state, and of its pressure if memory is short."""
    pressure = replica["memory"].get("pressure")  # an older proxy has none
    return f"{replica['reason']}; {pressure['level']}, {pressure['reason']}" if pressure else str(replica["reason"])


def megabytes(value: int | None) -> str:
    return "?" if value is None else f"{value / 1e6:.0f} MB"


def run_key(arguments: argparse.Namespace) -> int:
    key, hash = new_key()
    print(f"key   {key}\nhash  {hash}")
    return 0


def ask(arguments: argparse.Namespace, method: str, path: str, body: bytes | None = None) -> Any:
    """Send a request to the proxy and return its JSON. Raises CommandError with the proxy's own message."""
    headers = {"content-type": "application/json"} if body is not None else {}
    if arguments.api_key:
        headers["authorization"] = f"Bearer {arguments.api_key}"
    url = arguments.url.rstrip("/") + path
    try:
        response = httpx.request(method, url, content=body, headers=headers, timeout=10, trust_env=False)
    except (httpx.HTTPError, httpx.InvalidURL) as error:
        raise CommandError(
            f"no proxy answers at {arguments.url} ({error}); start one with `xgen-proxy serve`"
        ) from None
    try:
        data = orjson.loads(response.content)
        if response.status_code == 200:
            return data
        message = data["error"]["message"]
    except (orjson.JSONDecodeError, LookupError, TypeError):
        raise CommandError(
            f"the server at {arguments.url} is not an xgen-proxy: {response.status_code} for {path}"
        ) from None
    raise CommandError(message)


def print_table(rows: Iterable[tuple[str, ...]]) -> None:
    rows = list(rows)
    widths = [max(len(row[column]) for row in rows) for column in range(len(rows[0]))]
    for row in rows:
        print("  ".join(cell.ljust(width) for cell, width in zip(row, widths, strict=True)).rstrip())


if __name__ == "__main__":
    sys.exit(main())
