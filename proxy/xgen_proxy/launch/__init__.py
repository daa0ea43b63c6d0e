"""Starts clients on this proxy, or prints what they must be told to use it."""
