"""What keeps a cost from being computed, as one sentence that says what to change."""

from __future__ import annotations


class CostError(Exception):
    """Its text is the whole message for the user."""
