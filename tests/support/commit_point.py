"""Lets a scripted engine break its stream after the commit point: once the client has the first event."""

from __future__ import annotations

import asyncio
import threading

seen = threading.Event()  # set by the client; clear it before each test


async def until_seen() -> None:
    assert await asyncio.to_thread(seen.wait, 10)
