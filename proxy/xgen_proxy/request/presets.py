"""Sampling presets by task type and urgency.

creative_writing gets creative, code_generation gets precise; otherwise urgent requests get deterministic and all others
balanced. A preset applies only if the client gave a task type or an urgency, and never replaces a value that it set.
"""

from __future__ import annotations

from typing import Any

from xgen_proxy.request.features import Features

Preset = dict[str, float]

PRESETS: dict[str, Preset] = {
    "creative": {"temperature": 0.9, "top_p": 0.95, "top_k": 50},
    "balanced": {"temperature": 0.7, "top_p": 0.9, "top_k": 40},
    "precise": {"temperature": 0.3, "top_p": 0.8, "top_k": 20},
    "deterministic": {"temperature": 0, "top_p": 1, "top_k": 1},
}
BY_TASK = {"code_generation": "precise", "creative_writing": "creative"}


def preset_for(features: Features) -> str | None:
    """The preset's name, or None if the client gave no hint."""
    if not features.hinted or features.endpoint == "embeddings":
        return None
    return BY_TASK.get(features.task_type or "") or ("deterministic" if features.urgency == "high" else "balanced")


def apply_preset(body: dict[str, Any], features: Features) -> dict[str, Any]:
    """Returns the same object if there is nothing to fill in. A null counts as not set."""
    name = preset_for(features)
    missing = {key: value for key, value in PRESETS[name].items() if body.get(key) is None} if name else {}
    return {**body, **missing} if missing else body
