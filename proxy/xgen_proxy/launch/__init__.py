"""Starts clients with the settings for this proxy, or prints those settings."""
