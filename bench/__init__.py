"""Measurements. Each prints its numbers with their spread; nothing in README.md comes from anywhere else."""
