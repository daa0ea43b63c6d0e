"""Measure the error of estimate_tokens() against the model's own tokenizer, on English, Korean and code.

    python -m bench.estimate [--model models/SmolLM2-135M-Instruct.Q4_1.gguf]

Cuts each text into pieces of 200 characters and prints the median, minimum and maximum of estimate / true count. Needs
llama-cpp-python (the cpu requirements), which loads the tokenizer without the weights.
"""

from __future__ import annotations

import argparse
import os
import statistics
from pathlib import Path

from xgen_proxy.request.prompt import estimate_tokens

ROOT = Path(__file__).resolve().parent.parent
PIECE = 200  # characters
DEFAULT = os.environ.get("XGEN_TEST_GGUF", str(ROOT / "models" / "SmolLM2-135M-Instruct.Q4_1.gguf"))


def texts() -> dict[str, str]:
    return {
        "English": (ROOT / "bench/texts/english.txt").read_text(),
        "Korean": (ROOT / "bench/texts/korean.txt").read_text(),
        "code": "".join(
            (ROOT / "proxy" / "xgen_proxy" / name).read_text()
            for name in ("upstream/connection.py", "fleet/admission.py", "fleet/health.py")
        ),
    }


def pieces(text: str) -> list[str]:
    return [text[start : start + PIECE] for start in range(0, len(text) - PIECE + 1, PIECE)]


def ratios(model: str) -> dict[str, list[float]]:
    """Estimate / true count for each piece of each text."""
    from llama_cpp import Llama

    tokenizer = Llama(model, vocab_only=True, verbose=False)

    def truth(text: str) -> int:
        return len(tokenizer.tokenize(text.encode(), add_bos=False))

    return {name: [estimate_tokens(each) / truth(each) for each in pieces(text)] for name, text in texts().items()}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model", default=DEFAULT)
    print(f"{'text':8}  {'pieces':>6}  estimate/truth: median (smallest-largest)")
    for name, found in ratios(parser.parse_args().model).items():
        print(f"{name:8}  {len(found):6}  {statistics.median(found):.2f} ({min(found):.2f}-{max(found):.2f})")


if __name__ == "__main__":
    main()
