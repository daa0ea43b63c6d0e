"""What `models quantize` says of a result."""

from __future__ import annotations

from pathlib import Path

from tests.support.tiny_gguf import tiny_gguf
from xgen_proxy.models.files.gguf_file import read_gguf
from xgen_proxy.models.quantize.quantization import Fallback, Quantized
from xgen_proxy.models.quantize.report import as_json, report


def test_types_and_fallbacks(tmp_path: Path) -> None:
    file = read_gguf(tiny_gguf(tmp_path / "tiny.gguf"))
    result = Quantized(file, {Fallback("Q4_K", "Q5_0", 576, 256): 166})
    text = report(result)
    assert "5 tensors: 3 F16, 2 F32" in text
    assert "166 tensors are Q5_0 instead of Q4_K: their rows have 576 weights, no multiple of 256" in text
    assert as_json(result)["fallbacks"] == [
        {"wanted": "Q4_K", "instead": "Q5_0", "row": 576, "block": 256, "tensors": 166}
    ]
