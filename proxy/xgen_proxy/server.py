"""Runs the app in uvicorn: one process, uvloop, httptools. One, because a replica's slots are counted in it."""

from __future__ import annotations

import errno
import gc
import math
import socket
from collections.abc import Callable
from types import FrameType

import uvicorn

from xgen_proxy.app import ProxyApp, create_app
from xgen_proxy.config.settings import Settings
from xgen_proxy.downstream.http_protocol import HTTPProtocol
from xgen_proxy.fleet.process_memory import listener
from xgen_proxy.observability.logging_setup import set_up_logging

BACKLOG = 2048
KEEP_ALIVE_S = 75  # longer than nginx keeps its connections to us (60 s), so that it is never we who cut one


class PortInUseError(Exception):
    """Says who has it, where /proc tells."""


def listen(host: str, port: int) -> socket.socket:
    """Bound before anything else starts, so that a taken port is told at once. Raises PortInUseError."""
    family = socket.AF_INET6 if ":" in host else socket.AF_INET
    sock = socket.socket(family, socket.SOCK_STREAM)
    sock.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
    try:
        sock.bind((host, port))
    except OSError as error:
        sock.close()
        raise PortInUseError(_why(host, port, error)) from None
    sock.listen(BACKLOG)
    return sock


def _why(host: str, port: int, error: OSError) -> str:
    if error.errno != errno.EADDRINUSE:
        return f"cannot listen on {host}:{port}: {error.strerror}; choose another with --host and --port"
    pid = listener(port)
    by = f" by process {pid}" if pid else ""
    return f"port {port} is taken{by}; end that, or choose another with --port"


class Server(uvicorn.Server):
    """Tells the gateway that it drains as soon as a signal comes, so that /ready fails first."""

    def __init__(self, config: uvicorn.Config, app: ProxyApp) -> None:
        super().__init__(config)
        self._app = app

    def handle_exit(self, sig: int, frame: FrameType | None) -> None:
        """Not uvicorn's own, which raises the signal again after the drain: an orderly end exits with 0."""
        self._app.gateway.draining = True
        self.force_exit = self.should_exit  # a second signal, of whichever kind, ends it at once
        self.should_exit = True


def config_for(app: ProxyApp, settings: Settings) -> uvicorn.Config:
    return uvicorn.Config(
        app, loop="uvloop", http=HTTPProtocol, ws="none", lifespan="on", log_config=None, access_log=False,
        workers=1,  # whatever WEB_CONCURRENCY says
        server_header=False, date_header=True, proxy_headers=False, timeout_keep_alive=KEEP_ALIVE_S,
        timeout_graceful_shutdown=math.ceil(settings.drain_s), backlog=BACKLOG,
    )  # fmt: skip


def serve(read: Callable[[], Settings], announce: Callable[[str], None]) -> None:
    """`read` is called again for each reload. Returns when a signal has ended it. Raises ConfigError, PortInUseError."""
    settings = read()
    set_up_logging(settings.log_format)
    sock = listen(settings.host, settings.port)
    app = create_app(settings, read)
    host, port = sock.getsockname()[:2]
    announce(f"http://{f'[{host}]' if ':' in host else host}:{port}")
    server = Server(config_for(app, settings), app)
    spare_the_collector()
    server.run(sockets=[sock])


def spare_the_collector() -> None:
    """What is loaded now stays, and going through it took 13 % of the CPU of a small request. What requests leave in
    circles, failed ones above all, is little to look through. https://docs.python.org/3/library/gc.html#gc.freeze"""
    gc.collect()
    gc.freeze()
    gc.set_threshold(10_000, 10, 10)
