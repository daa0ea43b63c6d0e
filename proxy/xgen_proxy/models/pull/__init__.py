"""Fetches models: from the catalogue, Hugging Face, a URL or a path."""
