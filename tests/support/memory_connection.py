"""A client's connection to an app in uvicorn, without sockets: what arrives is given, what is written is kept."""

from __future__ import annotations

import asyncio
from typing import Any

from starlette.types import ASGIApp
from uvicorn import Config
from uvicorn.protocols.http.httptools_impl import RequestResponseCycle
from uvicorn.server import ServerState

from xgen_proxy.downstream.http_protocol import http_protocol


class MemoryTransport(asyncio.Transport):
    """Keeps what is written to it."""

    def __init__(self, protocol: asyncio.Protocol) -> None:
        super().__init__()
        self.protocol: asyncio.BaseProtocol = protocol
        self.written = b""
        self.closed = False
        self.ended = False

    def set_protocol(self, protocol: asyncio.BaseProtocol) -> None:
        self.protocol = protocol

    def write(self, data: Any) -> None:
        assert not self.ended, "written after the end"
        self.written += data

    def write_eof(self) -> None:
        self.ended = True

    def close(self) -> None:
        self.closed = True

    def is_closing(self) -> bool:
        return self.closed

    def pause_reading(self) -> None:
        pass

    def resume_reading(self) -> None:
        pass

    def get_write_buffer_size(self) -> int:
        return 0


class Connection:
    """A client's connection to `app` in uvicorn, without sockets."""

    def __init__(self, app: ASGIApp) -> None:
        self.state = ServerState()
        self.state.default_headers = [(b"date", b"now")]
        config = Config(app, ws="none", log_config=None)
        self.protocol = http_protocol(lambda: 30.0, lambda *_: None, tuple)(config, self.state, {})
        self.transport = MemoryTransport(self.protocol)
        self.protocol.connection_made(self.transport)

    @property
    def cycle(self) -> RequestResponseCycle:
        return self.protocol.cycle

    async def receive(self, data: bytes) -> None:
        """As an event loop does; then the app gets a turn."""
        if not self.transport.closed:
            assert isinstance(self.transport.protocol, asyncio.Protocol)
            self.transport.protocol.data_received(data)
            await asyncio.sleep(0)

    async def finish(self) -> None:
        async with asyncio.timeout(10):
            while tasks := list(self.state.tasks):  # a pipelined request starts a task of its own
                await asyncio.wait(tasks)

    def outcome(self) -> dict[str, Any]:
        """The bytes sent, and every plain value of the cycle's state."""
        cycle = {name: value for name, value in vars(self.cycle).items() if isinstance(value, int | None)}
        return {
            **cycle,
            "message_event": self.cycle.message_event.is_set(),
            "written": self.transport.written,
            "closed": self.transport.closed,
            "total_requests": self.state.total_requests,
        }
