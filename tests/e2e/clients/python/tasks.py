"""What the programs in this folder share: `PROGRAM URL MODEL TASKS` does the tasks and prints what it saw.

TASKS is a JSON list of prompts, and the output is a line of JSON. A program is a file of its own, so that it can be
read as an example of its client.
"""

from __future__ import annotations

import json
import sys
from collections.abc import Callable, Iterable
from importlib.metadata import version
from pathlib import Path
from typing import Any

URL, MODEL = sys.argv[1:3]
Json = dict[str, Any]

TOOL: Json = {
    "name": "write_file",
    "description": "Write a text file.",
    "parameters": {
        "type": "object",
        "properties": {"path": {"type": "string"}, "content": {"type": "string"}},
        "required": ["path", "content"],
    },
}


def write_file(path: str, content: str) -> str:
    """Write a text file."""
    Path(path).write_text(content)
    return f"wrote {len(content)} characters"


def run(package: str, do: Callable[[str], Json]) -> None:
    """`do`: prompt → text, pieces (of the stream; None where the client hides them), usage (prompt, answer)."""
    seen = [attempt(do, prompt) for prompt in json.loads(sys.argv[3])]
    print(json.dumps({"version": version(package), "seen": seen}))


def attempt(do: Callable[[str], Json], prompt: str) -> Json:
    try:
        return do(prompt)
    except Exception as error:
        return {"error": f"{type(error).__name__}: {error}"}


def saw(pieces: Iterable[str], usage: tuple[int, int] | None) -> Json:
    pieces = [piece for piece in pieces if piece]
    return {"text": "".join(pieces), "pieces": len(pieces), "usage": usage}
