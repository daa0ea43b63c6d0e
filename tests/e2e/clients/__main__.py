"""Run the clients and write what they could do to results.json, which docs/clients.md shows.

python -m tests.e2e.clients [CLIENT …]
"""

from __future__ import annotations

import json
import sys
import tempfile
from pathlib import Path

from tests.e2e.clients.installed import install_node, install_python
from tests.e2e.clients.matrix import CLIENTS, RESULTS, recorded, row


def main(names: list[str]) -> None:
    unknown = set(names) - {client.name for client in CLIENTS}
    if unknown:
        sys.exit(f"no such client: {', '.join(sorted(unknown))}; there are: {', '.join(each.name for each in CLIENTS)}")
    install_python()
    install_node()
    known = {each["client"]: each for each in recorded()} if RESULTS.exists() else {}
    for client in CLIENTS:
        if not names or client.name in names:
            with tempfile.TemporaryDirectory() as folder:
                known[client.name] = row(client, Path(folder))
            print(*known[client.name].values(), sep=" | ", flush=True)
            rows = [known[each.name] for each in CLIENTS if each.name in known]
            RESULTS.write_text(json.dumps(rows, indent=1, ensure_ascii=False) + "\n")
    print("Now run: python docs/tables.py")


if __name__ == "__main__":
    main(sys.argv[1:])
