"""Addresses of host names, for the connections to the backends.

getaddrinfo() knows what no DNS library does (/etc/nsswitch.conf, mDNS, the names of this machine), but it blocks, and
cannot be cancelled. So each name has at most one lookup at a time, in a thread of its own: a name server that hangs
takes the threads of no other name, and delays neither the loop nor the end of the process. While a lookup fails or
hangs, the last known addresses are used, as discovery keeps the last known replicas.
"""

from __future__ import annotations

import asyncio
import contextlib
import errno
import ipaddress
import socket
import threading
from collections.abc import Callable

HANGING_S = 0.3  # a lookup that takes longer may be hanging: the last known addresses are tried meanwhile

Lookup = asyncio.Future[list[str]]


def is_address(host: str) -> bool:
    with contextlib.suppress(ValueError):
        return bool(ipaddress.ip_address(host.partition("%")[0]))  # an IPv6 address may have a zone
    return False


class HostName:
    """The name of one backend server. An address is a name that needs no lookup."""

    def __init__(self, name: str) -> None:
        self.name = name
        self._fixed = is_address(name)
        self._known = [name] if self._fixed else []
        self._lookup: Lookup | None = None
        self._began = 0.0  # loop time when the lookup did

    async def addresses(self) -> list[str]:
        """Waits for as long as the lookup takes if none are known. Raises OSError."""
        if self._fixed:
            return self._known
        loop = asyncio.get_running_loop()
        if self._lookup is None or self._lookup.done():
            self._began = loop.time()
            self._lookup = _look_up(self.name, loop)
            self._lookup.add_done_callback(self._looked_up)
        lookup = self._lookup
        hanging_at = max(self._began + HANGING_S - loop.time(), 0)
        # wait(), since a cancelled request that awaits the future itself would cancel it for the others
        await asyncio.wait([lookup], timeout=hanging_at if self._known else None)
        if lookup.done() and not (self._known and _no_name_server(lookup.exception())):
            return lookup.result()
        return self._known

    def _looked_up(self, lookup: Lookup) -> None:
        if not lookup.cancelled() and lookup.exception() is None:
            self._known = lookup.result()


def _no_name_server(error: BaseException | None) -> bool:
    return isinstance(error, socket.gaierror) and error.errno == socket.EAI_AGAIN


def _look_up(name: str, loop: asyncio.AbstractEventLoop) -> Lookup:
    """Raises OSError if there are no threads left."""
    lookup: Lookup = loop.create_future()

    def settle(put: Callable[..., object], value: object) -> None:
        with contextlib.suppress(RuntimeError):  # the loop has ended meanwhile
            loop.call_soon_threadsafe(lambda: None if lookup.done() else put(value))

    def work() -> None:
        try:
            found = socket.getaddrinfo(name, None, type=socket.SOCK_STREAM)
        except OSError as error:
            settle(lookup.set_exception, error)
        except Exception as error:  # a name that cannot be encoded
            settle(lookup.set_exception, OSError(str(error)))
        else:
            settle(lookup.set_result, list(dict.fromkeys(str(address[0]) for *_, address in found)))

    try:
        threading.Thread(target=work, name=f"lookup of {name}", daemon=True).start()
    except RuntimeError as error:
        raise OSError(errno.EAGAIN, str(error)) from None
    return lookup
