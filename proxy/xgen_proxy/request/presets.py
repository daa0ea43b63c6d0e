"""Sampling presets by task type and urgency. Pure.

creative for creative_writing, precise for code_generation, else deterministic when urgent, else balanced. They apply
only where the client gave a task type or an urgency, and never over a value that it set.
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
    """The preset's name; None where the client gave no hint."""
    if not features.hinted or features.endpoint == "embeddings":
        return None
    return BY_TASK.get(features.task_type or "") or ("deterministic" if features.urgency == "high" else "balanced")


def fill(body: dict[str, Any], features: Features) -> dict[str, Any]:
    """The same object where nothing is to be filled in. A null counts as not set."""
    name = preset_for(features)
    missing = {key: value for key, value in PRESETS[name].items() if body.get(key) is None} if name else {}
    return {**body, **missing} if missing else body
