"""The limits of this process: descriptors, ports, memory. A failure that they cause is no fault of a backend's."""

from __future__ import annotations

import errno
import logging
import resource
import socket

log = logging.getLogger("xgen_proxy")

EXHAUSTED = {errno.EMFILE, errno.ENFILE, errno.ENOBUFS, errno.ENOMEM, errno.EADDRNOTAVAIL, errno.EAGAIN}
NAME_LOOKUP = {socket.EAI_MEMORY, socket.EAI_SYSTEM}
FEW_DESCRIPTORS = 4096  # a stream takes two


def is_exhausted(error: OSError) -> bool:
    """Whether a connection failed because this process, or its machine, has none of something left."""
    known = NAME_LOOKUP if isinstance(error, socket.gaierror) else EXHAUSTED
    # asyncio joins several errors to one without a number, and a name lookup hides the cause.
    return error.errno in known or not _has_descriptors()


def _has_descriptors() -> bool:
    try:
        socket.socket().close()
    except OSError:
        return False
    return True


def raise_descriptor_limit() -> int:
    """Raise the soft limit of open descriptors to the hard one. Returns the limit, and logs it if it is low."""
    soft, hard = resource.getrlimit(resource.RLIMIT_NOFILE)
    if soft != hard:
        try:
            resource.setrlimit(resource.RLIMIT_NOFILE, (hard, hard))
            soft = hard
        except (OSError, ValueError) as error:  # macOS refuses "unlimited"
            log.warning("the limit of open files stays at %d: %s", soft, error)
    if soft != resource.RLIM_INFINITY and soft < FEW_DESCRIPTORS:
        log.warning("at most %d files may be open, two for each stream: raise the limit (ulimit -n)", soft)
    return soft
