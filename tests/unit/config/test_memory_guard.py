from __future__ import annotations

import pytest
from pydantic import ValidationError

from xgen_proxy.config.memory_guard import MemoryGuard


@pytest.mark.parametrize("values", [{"kv_reduce": 0.99}, {"ram_close": 0.8}, {"kv_close": 1.1}, {"relief": "sleep"}])
def test_what_makes_no_sense_is_refused(values: dict[str, object]) -> None:
    with pytest.raises(ValidationError):
        MemoryGuard.model_validate(values)


def test_thresholds_may_be_equal() -> None:
    assert MemoryGuard(kv_reduce=0.98).kv_reduce == MemoryGuard().kv_close
