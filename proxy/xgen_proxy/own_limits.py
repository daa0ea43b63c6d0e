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
CAUSES = 10  # httpx wraps the kernel's error three times


def is_exhausted(error: BaseException) -> bool:
    """Whether a connection failed because this process, or its machine, has none of something left."""
    cause: BaseException | None = error
    for _ in range(CAUSES):
        if isinstance(cause, socket.gaierror):
            if cause.errno in NAME_LOOKUP:
                return True
        elif isinstance(cause, OSError) and cause.errno in EXHAUSTED:
            return True
        if cause is None:
            break
        cause = cause.__cause__ or cause.__context__
    return not _has_descriptors()  # asyncio joins several errors to one without a number, and a name lookup hides it


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
