"""Processes by their ids."""

from __future__ import annotations

import psutil


def is_running(pid: int) -> bool:
    """False for a zombie."""
    try:
        return psutil.Process(pid).status() != psutil.STATUS_ZOMBIE
    except psutil.NoSuchProcess:
        return False
