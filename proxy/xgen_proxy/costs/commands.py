"""`xgen-proxy cost`: its arguments, and what it reads and writes."""

from __future__ import annotations

import argparse
import json
import sys
from pathlib import Path
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from xgen_proxy.costs.measurements import Measurements
    from xgen_proxy.costs.prices import Prices

EXAMPLES = """\
examples:
  1. a table of prices, to edit:
       xgen-proxy cost --write-prices prices.toml
  2. what each machine can do within your limits, in ms, by vLLM's load generator; --request-rate at several rates:
       vllm bench serve --base-url http://gpu-box:8000 --model MODEL --dataset-name random --request-rate 8 \\
           --goodput ttft:500 tpot:50 --save-result --result-filename gpu-8.json
       vllm bench serve --base-url http://cpu-box:8081 --model MODEL --dataset-name random --request-rate 1 \\
           --goodput ttft:500 tpot:50 --save-result --result-filename cpu-1.json
  3. what that costs, and from which load on the GPU is the cheaper one:
       xgen-proxy cost --prices prices.toml gpu=gpu-8.json gpu=gpu-16.json cpu=cpu-1.json --plot cost.svg

  one engine out of a file of several, direct or through the proxy:
       xgen-proxy cost --prices prices.toml gpu=h100.json:vllm/proxy cpu=engines.json:llama-server
  figures typed by hand, a table for each machine (requests_per_s, output_tokens_per_s, input_tokens_per_s):
       xgen-proxy cost --prices prices.toml mine.toml
  what the traffic of a running proxy costs now, watched for ten minutes:
       xgen-proxy cost --prices prices.toml --url http://127.0.0.1:8080 --for 600

Goodput is the requests per second that met the limits. That of arriving requests (--request-rate) counts, whose queue
grows as that of users does; a closed loop (--max-concurrency alone) has none, and counts only where a subject has
nothing else. Machines are compared as they were measured through the proxy if all were, else direct. 1,000 requests
cost the machine's price per hour / (goodput x 3.6), so they cost more on a machine that is less busy: each line states
its utilisation, the share of the best goodput that was measured there. Machines come whole: the load at which one kind
becomes cheaper is computed with the steps. Several files of one load are repeats: the median, and in brackets the
minimum and maximum.
"""


def add_to(commands: Any) -> None:
    """`commands`: what argparse's add_subparsers() returned."""
    help = "Show what requests and tokens cost, and when a GPU pays."
    command = commands.add_parser(
        "cost", help=help, description=help, epilog=EXAMPLES, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    command.set_defaults(run=run)
    command.add_argument(
        "measurements",
        nargs="*",
        metavar="MACHINE=FILE[:SUBJECT]",
        help="a machine of the prices and what was measured on it; all machines are compared with the last one",
    )
    command.add_argument("--prices", type=Path, metavar="FILE", help="the table of prices (TOML)")
    command.add_argument("--write-prices", type=Path, metavar="FILE", help="write a table of prices to edit, and exit")
    command.add_argument("--plot", type=Path, metavar="FILE", help="draw cost against load as SVG; needs matplotlib")
    command.add_argument("--json", type=Path, metavar="FILE", help="write everything with its conditions")
    command.add_argument(
        "--any-latency", action="store_true", help="count every completed request, even where no goodput was measured"
    )
    command.add_argument("--url", help="a running proxy: what its traffic costs now")
    command.add_argument("--api-key", help="API key, if the proxy requires one")
    command.add_argument(
        "--for", dest="seconds", type=float, default=60.0, metavar="SECONDS", help="how long to watch it (default: 60)"
    )


def run(arguments: argparse.Namespace) -> int:
    from xgen_proxy.costs.errors import CostError

    try:
        sys.stdout.write(answer(arguments))
    except CostError as error:
        sys.stderr.write(f"xgen-proxy: {error}\n")
        return 2
    return 0


def answer(arguments: argparse.Namespace) -> str:
    """The text to show. Raises CostError."""
    from xgen_proxy.costs.errors import CostError
    from xgen_proxy.costs.prices import read_prices, write_template

    if arguments.write_prices:
        write_template(arguments.write_prices)
        return f"wrote {arguments.write_prices}: its numbers are examples, replace them with what you pay\n"
    if not arguments.prices:
        raise CostError("needs --prices FILE; `xgen-proxy cost --write-prices prices.toml` writes one to edit")
    if bool(arguments.url) == bool(arguments.measurements):
        raise CostError("needs either files of measurements or --url of a running proxy; see `xgen-proxy cost --help`")
    prices = read_prices(arguments.prices)
    return answer_live(arguments, prices) if arguments.url else answer_measured(arguments, prices)


def answer_live(arguments: argparse.Namespace, prices: Prices) -> str:
    from xgen_proxy.costs import live
    from xgen_proxy.costs.errors import CostError
    from xgen_proxy.models.progress import Progress

    if arguments.plot or arguments.json:
        raise CostError("--plot and --json are for files of measurements, not for --url")
    if not arguments.seconds > 0:
        raise CostError("--for needs more than 0 seconds")
    progress = Progress("watching", int(arguments.seconds), "s")
    try:
        found = live.watch(arguments.url, arguments.api_key, arguments.seconds, progress.update)
    finally:
        progress.end()
    return live.report(prices, found)


def answer_measured(arguments: argparse.Namespace, prices: Prices) -> str:
    from xgen_proxy.costs import costs, plot, report
    from xgen_proxy.costs.doubts import doubts, left_out
    from xgen_proxy.costs.errors import CostError
    from xgen_proxy.costs.measurements import parse_source, read_measurements

    if arguments.plot:
        plot.need_matplotlib()
    measured = read_measurements(map(parse_source, arguments.measurements), arguments.any_latency)
    subjects = costs.subjects(measured.runs, prices.machine)
    evens = costs.break_evens(subjects)
    notes = doubts(subjects, evens) + left_out(measured.runs, subjects)
    if measured.skipped:
        notes.append(f"runs without goodput that were left out: {measured.skipped}; --any-latency counts them too.")
    if arguments.any_latency:
        notes.append("every completed request counts here, however late it was.")
    if arguments.json:
        write_json(arguments, report.data(prices, subjects, evens, notes), measured)
    if arguments.plot:
        if not evens:
            raise CostError("a plot compares machines: name measurements of two or more")
        plot.draw(arguments.plot, prices.currency, evens)
    return report.text(prices, subjects, evens, notes)


def write_json(arguments: argparse.Namespace, data: dict[str, Any], measured: Measurements) -> None:
    """Raises CostError."""
    from xgen_proxy.costs.errors import CostError
    from xgen_proxy.models.conditions import conditions, typed
    from xgen_proxy.models.errors import ModelError
    from xgen_proxy.models.storage import result_file

    flags = typed(arguments, ("plot", "json", "any_latency"))
    words = ["xgen-proxy", "cost", *typed(arguments, ["prices"]), *arguments.measurements, *flags]
    found = {"conditions": conditions(words), "measured": list(measured.conditions), **data}
    try:
        with result_file(arguments.json) as file:
            file.write_text(json.dumps(found, indent=1, ensure_ascii=False) + "\n", encoding="utf-8")
    except ModelError as error:
        raise CostError(str(error)) from None
