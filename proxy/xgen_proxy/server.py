"""Runs the app in uvicorn with uvloop and httptools, in one process, since a replica's slots are counted in it."""

from __future__ import annotations

import errno
import logging
import math
import socket
from collections.abc import Callable
from types import FrameType

import uvicorn

from xgen_proxy.app import ProxyApp, create_app
from xgen_proxy.config.loading import ConfigSources, doubts
from xgen_proxy.config.settings import NO_KEYS, Settings
from xgen_proxy.downstream.http_protocol import http_protocol
from xgen_proxy.errors import ProxyError
from xgen_proxy.fleet.memory.process import listener
from xgen_proxy.forwarding.outcome import Refusal
from xgen_proxy.garbage_collection import freeze_loaded_objects
from xgen_proxy.observability.logging_setup import set_up_logging
from xgen_proxy.own_limits import raise_descriptor_limit
from xgen_proxy.request.call import Origin

log = logging.getLogger("xgen_proxy.server")

BACKLOG = 2048
KEEP_ALIVE_S = 75  # longer than nginx keeps its connections to the proxy (60 s), so that nginx is the one to close them


class PortInUseError(Exception):
    """The proxy cannot listen on its port. The message names the process that uses it, if /proc reveals it."""


def listen(host: str, port: int) -> socket.socket:
    """Open the listening socket. Call this first, so that a port in use is reported at once. Raises PortInUseError."""
    family = socket.AF_INET6 if ":" in host else socket.AF_INET
    sock = socket.socket(family, socket.SOCK_STREAM)
    sock.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
    try:
        sock.bind((host, port))
    except OSError as error:
        sock.close()
        raise PortInUseError(_explain(host, port, error)) from None
    sock.listen(BACKLOG)
    return sock


def _explain(host: str, port: int, error: OSError) -> str:
    if error.errno != errno.EADDRINUSE:
        return f"cannot listen on {host}:{port}: {error.strerror}; choose another with --host and --port"
    pid = listener(port)
    by = f" by process {pid}" if pid else ""
    return f"port {port} is taken{by}; end that, or choose another with --port"


class Server(uvicorn.Server):
    """Calls `on_exit` when the first signal arrives, before connections drain, so that /ready fails first."""

    def __init__(self, config: uvicorn.Config, on_exit: Callable[[], None]) -> None:
        super().__init__(config)
        self._on_exit = on_exit

    def handle_exit(self, sig: int, frame: FrameType | None) -> None:
        """Exit with 0 after the drain. uvicorn's own handler raises the signal again instead."""
        self._on_exit()
        self.force_exit = self.should_exit  # a second signal, SIGINT or SIGTERM, exits at once
        self.should_exit = True


def server_for(app: ProxyApp, settings: Settings) -> Server:
    gateway = app.gateway

    def get_body_timeout_s() -> float:
        return gateway.settings.limits.body_timeout_s

    def get_cors_origins() -> tuple[str, ...]:
        return gateway.settings.cors_origins

    def report_refused(request_id: str, error: ProxyError, client: str | None) -> None:
        gateway.observer.request_refused(Refusal(Origin(request_id, {}, client), "other", error))

    def start_draining() -> None:
        gateway.draining = True

    config = uvicorn.Config(
        app,
        loop="uvloop",
        http=http_protocol(get_body_timeout_s, report_refused, get_cors_origins),
        ws="none",
        lifespan="on",
        log_config=None,
        access_log=False,
        workers=1,  # regardless of WEB_CONCURRENCY
        server_header=False,
        date_header=True,
        proxy_headers=False,
        timeout_keep_alive=KEEP_ALIVE_S,
        timeout_graceful_shutdown=math.ceil(settings.drain_s),
        backlog=BACKLOG,
    )
    return Server(config, start_draining)


def serve(sources: ConfigSources, announce: Callable[[str], None]) -> None:
    """Serve until a signal arrives. Raises ConfigError, PortInUseError.

    `sources` are read now and again for each reload. `announce` is called with the proxy's URL once it listens.
    """
    settings = sources.load()
    set_up_logging(settings.log_format)
    raise_descriptor_limit()
    sock = listen(settings.host, settings.port)
    app = create_app(settings, sources)
    host, port = sock.getsockname()[:2]
    announce(f"http://{f'[{host}]' if ':' in host else host}:{port}")
    if settings.api_keys in (None, NO_KEYS):
        log.warning("no API key is asked for: who can connect to %s:%d can use the models", host, port)
    for doubt in doubts(settings):
        log.warning("%s", doubt)
    server = server_for(app, settings)
    freeze_loaded_objects()
    server.run(sockets=[sock])
