"""A container's HEALTHCHECK: exit status 0 if the server in it can generate, else 1.

    python healthcheck.py [PATH]        PATH answers 200 without waiting for a model (default: by ENGINE)

Requests one token until one arrives, and again every GENERATE_S. In between, PATH has to answer. Tokens are requested
no more often, because their prompt replaces a chat in llama.cpp's cache. A busy server delays the token; it is healthy
as long as it uses CPU. Standard library only, since compose.yaml also mounts this file into vLLM's own image.
"""

from __future__ import annotations

import http.client
import json
import os
import sys
import time
from pathlib import Path

PORT = 8000
HEALTH_PATHS = {"llama-cpp-python": "/openapi.json", "llama-server": "/health"}  # /v1/models waits for the model's lock
GENERATE_S = 600.0
TIMEOUT_S = 10.0
BUSY = 0.2  # cores; a computing server uses at least this much
GENERATED = Path("/tmp/generated")  # noqa: S108  touched when a token arrives; /tmp belongs to the container


def main() -> int:
    path = sys.argv[1] if sys.argv[1:] else HEALTH_PATHS[os.environ["ENGINE"]]
    if not answers("GET", path):
        return 1
    if generated_recently():
        return 0
    before = cpu_seconds()
    if answers("POST", "/v1/completions", {"prompt": "Hi", "max_tokens": 1}):
        GENERATED.touch()
        return 0
    return 0 if GENERATED.exists() and cpu_seconds() - before > BUSY * TIMEOUT_S else 1


def generated_recently() -> bool:
    try:
        return time.time() - GENERATED.stat().st_mtime < GENERATE_S
    except FileNotFoundError:
        return False


def answers(method: str, path: str, body: dict[str, object] | None = None) -> bool:
    connection = http.client.HTTPConnection("127.0.0.1", PORT, timeout=TIMEOUT_S)
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
    """CPU time used by all other processes of this container."""
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
