"""A TCP forwarder that cuts streams, as a server that dies in mid-answer does, as often as needed.

It closes connections, so that earlier data arrives, as when the kernel closes a dead server's sockets.
"""

from __future__ import annotations

import contextlib
import socket
import threading
from urllib.parse import urlsplit


class StreamCutter:
    """Listens on `url` and forwards to `target`. While `cut_after` is set, each answer ends after that many events."""

    def __init__(self, target: str) -> None:
        parts = urlsplit(target)
        self._target = (parts.hostname or "", parts.port or 80)
        self._listener = socket.create_server(("127.0.0.1", 0))
        self.url = f"http://127.0.0.1:{self._listener.getsockname()[1]}"
        self.cut_after: int | None = None
        self.cuts = 0
        threading.Thread(target=self._accept, daemon=True).start()

    def close(self) -> None:
        self._listener.close()

    def _accept(self) -> None:
        with contextlib.suppress(OSError):
            while True:
                client, _ = self._listener.accept()
                try:
                    server = socket.create_connection(self._target, 10)
                except OSError:
                    client.close()
                    continue
                server.settimeout(None)
                threading.Thread(target=self._forward, args=(client, server), daemon=True).start()
                threading.Thread(target=self._answer, args=(server, client), daemon=True).start()

    def _forward(self, source: socket.socket, target: socket.socket) -> None:
        with contextlib.suppress(OSError):
            while data := source.recv(65536):
                target.sendall(data)
        self._end(source, target)

    def _answer(self, server: socket.socket, client: socket.socket) -> None:
        """Forward event by event, so that cuts fall between events."""
        events = 0
        with contextlib.suppress(OSError):
            while data := server.recv(65536):
                while data:
                    at = data.find(b"data: {", 1)
                    piece, data = (data[:at], data[at:]) if at > 0 else (data, b"")
                    if self.cut_after is not None and piece.startswith(b"data: {"):
                        if events >= self.cut_after:
                            self.cut_after = None
                            self.cuts += 1
                            return self._end(server, client)
                        events += 1
                    client.sendall(piece)
        return self._end(server, client)

    def _end(self, *sockets: socket.socket) -> None:
        for each in sockets:
            with contextlib.suppress(OSError):
                each.shutdown(socket.SHUT_RDWR)
            each.close()
