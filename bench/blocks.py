"""Cut streams within tool calls, JSON and reasoning, and let the other engine take over: vLLM → llama-server and back.

    python -m bench.blocks --kills 100 --vllm PATH/TO/vllm --vllm-model DIR --gguf FILE --json bench/results/blocks.json

Each stream is cut after a random number of events, as the kernel cuts the connections of a process that dies; a seeded
client asks until `--kills` answers were cut in each kind and direction. Every answer must be one valid stream: valid
arguments, JSON by the schema, reasoning that stays reasoning. Prints a table: answers that were cut, those taken over
within a block, and what was wrong. Exits with 1 unless every answer was valid. Both directions run at once.

`routing.hold_constrained` is on where vLLM takes over JSON: its grammar begins with the first new token, so that it
cannot go on within JSON that the client has seen. vLLM gets `--reasoning-parser deepseek_r1`, a template that opens
reasoning, and a copy of the model's folder whose tokenizer has the tags of reasoning.
"""

from __future__ import annotations

import argparse
import json
import os
import random
import sys
import tempfile
import threading
from collections import Counter
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import ExitStack, contextmanager
from dataclasses import asdict, dataclass
from pathlib import Path

import httpx

from bench import children
from tests.support import real_servers as servers
from tests.support.block_kinds import BLOCKS_TEMPLATE, KINDS, wrong
from tests.support.real_servers import Proxy, Server
from tests.support.stream_cutter import StreamCutter
from tests.support.waiting import wait_until
from xgen_proxy.models.conditions import conditions

PATH = "/v1/chat/completions"
TAGS = {3: "<think>", 4: "</think>"}  # put in place of two tokens that no text has
TRIES = 4  # requests for each cut that is wanted: some answers end before it


def reasoning_model(source: Path, folder: Path) -> Path:
    """A copy of a model's folder whose tokenizer has the tags of reasoning."""
    folder.mkdir()
    for file in source.iterdir():
        if file.name != "tokenizer.json":
            (folder / file.name).symlink_to(file.resolve())
    tokenizer = json.loads((source / "tokenizer.json").read_text())
    vocabulary = tokenizer["model"]["vocab"]
    for token in tokenizer["added_tokens"]:
        if tag := TAGS.get(token["id"]):
            vocabulary.pop(token["content"], None)
            vocabulary[tag] = token["id"]
            token |= {"content": tag, "special": False}
    (folder / "tokenizer.json").write_text(json.dumps(tokenizer))
    return folder


@contextmanager
def proxy_between(log: Path, first: Server, second: Server, *, hold: bool) -> Iterator[tuple[Proxy, StreamCutter]]:
    """`first` is cut, `second` takes over."""
    cutter = StreamCutter(first.url)
    env = {"XGEN_ROUTING__HOLD_CONSTRAINED": str(hold), "XGEN_LOG_FORMAT": "json"}
    for name, server, url, device in (("FIRST", first, cutter.url, "gpu"), ("SECOND", second, second.url, "cpu")):
        dialect = "vllm" if server.name == "vLLM" else server.name
        values = {"URLS": url, "DIALECT": dialect, "DEVICE_CLASS": device, "CONTEXT": str(servers.CONTEXT)}
        env |= {f"XGEN_BACKENDS__{name}__{key}": value for key, value in values.items()}
    proxy = servers.proxy(log, env=env)
    proxy.start_s = 120  # on a busy machine
    try:
        proxy.start().wait_ready()
        wait_until(lambda: all_up(proxy), 60, "both backends to be up")
        yield proxy, cutter
    finally:
        proxy.stop()
        cutter.close()


def all_up(proxy: Proxy) -> bool:
    backends = httpx.get(f"{proxy.url}/models/status", timeout=10).json()["backends"]
    return all(replica["up"] for backend in backends for replica in backend["replicas"])


def cut_and_judge(proxy: Proxy, cutter: StreamCutter, kind: str, kills: int, seed: int) -> Counter[str]:
    """Counts of "cut", "resumed", and of each thing that was wrong."""
    rng = random.Random(seed)
    found: Counter[str] = Counter()
    body = {**KINDS[kind], "stream": True, "backend": "first", "stream_options": {"include_usage": True}}
    with httpx.Client(base_url=proxy.url, timeout=120, trust_env=False) as client:
        events = client.post(PATH, json=body).text.count("\ndata: {")
        for _ in range(kills * TRIES):
            if found["cut"] >= kills:
                break
            cuts = cutter.cuts
            cutter.cut_after = rng.randint(1, max(events - 2, 2))
            answer = client.post(PATH, json=body)
            cutter.cut_after = None
            if cutter.cuts == cuts:
                continue
            found["cut"] += 1
            found["resumed"] += ": resumed on second@" in answer.text
            if reason := wrong(kind, answer.text):
                found[reason[:300]] += 1
                print(f"bench.blocks: {kind}, cut {found['cut']}: {reason}\n{answer.text}", file=sys.stderr, flush=True)
            if found["cut"] % 25 == 0:
                print(
                    f"bench.blocks: {kind} from {proxy.log.stem}: {found['cut']} of {kills}",
                    file=sys.stderr,
                    flush=True,
                )
            good = client.post(PATH, json={**body, "stream": False, "stream_options": None, "max_tokens": 1})
            good.raise_for_status()  # it keeps the circuit breaker closed
    return found


@dataclass
class Row:
    """`valid` of `cut` answers; `wrong`: what was wrong with the others, and how often."""

    kind: str
    first: str
    second: str
    hold: bool
    cut: int
    resumed: int
    valid: int
    wrong: dict[str, int]


def rows_of(args: argparse.Namespace, logs: Path, first: Server, second: Server) -> Iterator[Row]:
    """One direction, kind by kind."""
    for kind in args.kinds:
        hold = kind == "JSON schema" and second.name == "vLLM"
        log = logs / f"proxy-{first.name}-{kind}.log"
        with proxy_between(log, first, second, hold=hold) as (proxy, cutter):
            found = cut_and_judge(proxy, cutter, kind, args.kills, args.seed)
        wrong = {reason: count for reason, count in found.items() if reason not in ("cut", "resumed")}
        valid = found["cut"] - sum(wrong.values())
        yield Row(kind, first.name, second.name, hold, found["cut"], found["resumed"], valid, wrong)


def report(args: argparse.Namespace, logs: Path, llama: Server, vllm: Server) -> list[Row]:
    """Prints each row, and writes all so far to the file."""
    rows: list[Row] = []
    lock = threading.Lock()
    print(f"{'kind':12} {'direction':24} {'cut':>4} {'resumed':>8} {'valid':>6}", flush=True)

    def one_direction(servers: tuple[Server, Server]) -> None:
        for row in rows_of(args, logs, *servers):
            with lock:
                rows.append(row)
                direction = f"{row.first} → {row.second}"
                print(f"{row.kind:12} {direction:24} {row.cut:4} {row.resumed:8} {row.valid:6}", flush=True)
                for reason, count in row.wrong.items():
                    print(f"  {count} {reason}", flush=True)
                write(args.json, rows)

    with ThreadPoolExecutor(2) as both:
        list(both.map(one_direction, [(vllm, llama), (llama, vllm)]))
    return rows


def write(file: Path | None, rows: list[Row]) -> None:
    if file is not None:
        packages = ["vllm", "xllamacpp"]
        found = conditions(["python", "-m", "bench.blocks", *sys.argv[1:]], packages)
        ordered = sorted(rows, key=lambda row: (list(KINDS).index(row.kind), row.first))
        file.write_text(json.dumps({"conditions": found, "rows": [asdict(row) for row in ordered]}, indent=1) + "\n")


def main() -> None:
    flags = argparse.ArgumentParser(prog="bench.blocks", description=__doc__.partition("\n")[0])
    flags.add_argument("--kills", type=int, default=100, help="answers to cut, for each kind and direction")
    flags.add_argument("--seed", type=int, default=1)
    flags.add_argument("--kinds", nargs="+", choices=KINDS, default=list(KINDS))
    flags.add_argument("--json", type=Path, metavar="FILE", help="for the table in docs/measurements.md")
    flags.add_argument(
        "--vllm", default=os.environ.get("XGEN_TEST_VLLM"), help="vLLM's command; default XGEN_TEST_VLLM"
    )
    flags.add_argument("--vllm-model", default=os.environ.get("XGEN_TEST_VLLM_MODEL"), help="the model's folder")
    flags.add_argument("--gguf", default=os.environ.get("XGEN_TEST_GGUF"), help="the same model for llama-server")
    args = flags.parse_args()
    if not (args.vllm and args.vllm_model and args.gguf):
        flags.error(
            "--vllm, --vllm-model and --gguf are needed, or XGEN_TEST_VLLM, XGEN_TEST_VLLM_MODEL and XGEN_TEST_GGUF"
        )
    children.end_on_sigterm()
    with ExitStack() as stack:
        logs = Path(stack.enter_context(tempfile.TemporaryDirectory(prefix="blocks-")))
        vllm = servers.vllm(logs / "vllm.log", args.vllm, str(reasoning_model(Path(args.vllm_model), logs / "model")))
        vllm.command += ["--reasoning-parser", "deepseek_r1", "--chat-template", str(BLOCKS_TEMPLATE)]
        if "tool call" not in args.kinds:  # whose grammars this backend of vLLM 0.32 refuses: "'triggers'"
            # A model of random weights would fill its answer with white space, as llama-server's grammars do not allow.
            config = {"backend": "guidance", "disable_any_whitespace": True}
            vllm.command += ["--structured-outputs-config", json.dumps(config)]
        llama = servers.llama_server(logs / "llama.log", args.gguf, "--chat-template-file", str(BLOCKS_TEMPLATE))
        for server in (llama, vllm):
            stack.enter_context(servers.running(server))
        rows = report(args, logs, llama, vllm)
    sys.exit(0 if all(row.valid == row.cut >= args.kills for row in rows) else 1)


if __name__ == "__main__":
    main()
