"""The estimate of prompt tokens, compared with the model's tokenizer by bench/estimate.py."""

from __future__ import annotations

import statistics

from bench.estimate import ratios
from xgen_proxy.routing.policy import ESTIMATE_MARGIN


def test_the_margin_covers_the_error(gguf: str) -> None:
    found = ratios(gguf)
    assert found.keys() == {"English", "Korean", "code"}
    for each in found.values():
        assert 0.85 < statistics.median(each) < 1.15
        assert max(each) < ESTIMATE_MARGIN
