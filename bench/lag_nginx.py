"""Measure how much later each chunk of a stream arrives through nginx, TLS included, than directly from the server.

    python -m bench.lag_nginx

Upstream and client are those of bench/streams.py: each chunk contains the time it was sent. nginx runs with
nginx/nginx.conf, in Docker or on this machine, directly in front of the upstream. Rounds alternate between direct and
through nginx, over HTTP/1.1; direct is without TLS, so that the cost of TLS, the client's share too, counts as nginx's.
nginx allows 256 requests at once per address.
"""

from __future__ import annotations

import argparse
import os
import sys
import tempfile
from contextlib import ExitStack
from pathlib import Path

import uvloop

from bench import children
from bench.streams import Round, delays, load, progress
from tests.support.nginx import NameServer, Nginx, UnavailableError, runner
from tests.support.waiting import wait_until

EXAMPLES = """\
examples:
  100 streams of one chunk every 100 ms, five rounds
    python -m bench.lag_nginx
  faster
    python -m bench.lag_nginx --streams 200 --gap-ms 50
"""
TARGET_MS = 2.0


def start(stack: ExitStack, folder: Path) -> tuple[int, Nginx]:
    """(port of the upstream, nginx in front of it). Raises UnavailableError."""
    log = folder / "upstream.log"
    upstream = children.listening_port(stack.enter_context(children.running(children.UPSTREAM, log)), log)
    names = NameServer("127.0.0.1")
    stack.callback(names.close)
    nginx = Nginx(runner(), folder, upstream, names)
    stack.callback(nginx.stop)
    nginx.start()
    with nginx.client() as client:
        wait_until(lambda: client.get("/v1/models").status_code == 200, 20, "nginx to find the upstream")
    return upstream, nginx


def run(options: argparse.Namespace, upstream: int, nginx: Nginx) -> tuple[list[Round], list[Round]]:
    """(direct, through) rounds, one of each per repeat."""
    direct: list[Round] = []
    through: list[Round] = []
    tls = nginx.context()
    for number in range(options.repeats):
        turns = [("direct", direct, upstream, None), ("through", through, nginx.tls, tls)]
        for name, rounds, port, context in turns if number % 2 == 0 else reversed(turns):
            progress(f"{name}, {number + 1} of {options.repeats}")
            result = Round()
            uvloop.run(load(port, options.streams, options.chunks, options.gap_ms, result, context))
            rounds.append(result)
    return direct, through


def report(options: argparse.Namespace, direct: list[Round], through: list[Round]) -> str:
    lines = [
        f"{options.streams} streams, {options.chunks} chunks each, one each {options.gap_ms:g} ms;"
        f" median (least to most) of {options.repeats} rounds; load average {os.getloadavg()[0]:.1f}"
        f" on {os.cpu_count()} cores\n"
    ]
    lines += delays(direct, through)
    lines.append(f"target: p99 added of at most {TARGET_MS:g} ms")
    errors = [error for each_round in direct + through for error in each_round.errors]
    lines.append(f"errors: {len(errors)}" + "".join(f"\n  {error}" for error in errors[:5]))
    return "\n".join(lines)


def main() -> int:
    parser = argparse.ArgumentParser(
        description=__doc__, epilog=EXAMPLES, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--streams", type=int, default=100)
    parser.add_argument("--chunks", type=int, default=100, help="per stream (%(default)s)")
    parser.add_argument("--gap-ms", type=float, default=100, help="between two chunks of a stream (%(default)s)")
    parser.add_argument("--repeats", type=int, default=5)
    options = parser.parse_args()
    children.end_on_sigterm()
    with tempfile.TemporaryDirectory() as folder, ExitStack() as stack:
        try:
            upstream, nginx = start(stack, Path(folder))
        except UnavailableError as error:
            print(f"lag_nginx: {error}", file=sys.stderr)
            return 2
        direct, through = run(options, upstream, nginx)
    print(report(options, direct, through))
    return 1 if any(each.errors for each in direct + through) else 0


if __name__ == "__main__":
    sys.exit(main())
