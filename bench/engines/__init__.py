"""Engines with the same weights, prompts and load, side by side: direct and through the proxy."""
