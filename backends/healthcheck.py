"""For a container's HEALTHCHECK: can the server in it generate? The exit status is 0 or 1. Standard library only.

    python healthcheck.py [PATH]        PATH (default: as ENGINE says) answers 200 without waiting for a model

A token is asked for until one came, and again every GENERATE_S; in between the server has to answer at all. Not more
often: the few words asked take the place of somebody's chat in llama.cpp's cache. A busy server lets the token wait,
and is well as long as it computes.
"""

from __future__ import annotations

import http.client
import json
import os
import sys
import time
from pathlib import Path

PORT = 8000
LOOKS = {"llama-cpp-python": "/openapi.json", "llama-server": "/health"}  # /v1/models waits for the model's lock
GENERATE_S = 600.0
PATIENCE_S = 10.0
BUSY = 0.2  # cores: what it uses at least while it computes
GENERATED = Path("/tmp/generated")  # noqa: S108  touched when a token came; /tmp is the container's own


def main() -> int:
    path = sys.argv[1] if sys.argv[1:] else LOOKS[os.environ["ENGINE"]]
    if not answers("GET", path):
        return 1
    if generated_lately():
        return 0
    before = cpu_seconds()
    if answers("POST", "/v1/completions", {"prompt": "Hi", "max_tokens": 1}):
        GENERATED.touch()
        return 0
    return 0 if GENERATED.exists() and cpu_seconds() - before > BUSY * PATIENCE_S else 1


def generated_lately() -> bool:
    try:
        return time.time() - GENERATED.stat().st_mtime < GENERATE_S
    except FileNotFoundError:
        return False


def answers(method: str, path: str, body: dict[str, object] | None = None) -> bool:
    connection = http.client.HTTPConnection("127.0.0.1", PORT, timeout=PATIENCE_S)
    try:
        connection.request(method, path, json.dumps(body) if body else None, {"Content-Type": "application/json"})
        answer = connection.getresponse()
        answer.read()
    except (OSError, http.client.HTTPException):
        return False
    finally:
        connection.close()
    return answer.status == 200


def cpu_seconds() -> float:
    """What all processes of this container but this one have used."""
    ticks = 0
    for stat in Path("/proc").glob("[0-9]*/stat"):
        if stat.parent.name != str(os.getpid()):
            try:
                fields = stat.read_text().rpartition(")")[2].split()
            except OSError:  # it has just ended
                continue
            ticks += int(fields[11]) + int(fields[12])
    return ticks / os.sysconf("SC_CLK_TCK")


if __name__ == "__main__":
    sys.exit(main())
