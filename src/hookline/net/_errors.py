"""What can go wrong with the machine's network."""

from __future__ import annotations

import errno
import os
from typing import ClassVar

from hookline.errors import HooklineError


class NetworkError(HooklineError):
    """A link, route, address, neighbour or namespace that cannot be read or changed.

    ``errno`` is the kernel's, 0 where the kernel was not asked.
    """

    def __init__(self, what: str, *, why: str = "", remedy: str = "", errno: int = 0) -> None:
        super().__init__(what, why=why, remedy=remedy)
        self.errno = errno


class NetworkNotPermitted(NetworkError):  # noqa: N818
    """The kernel refuses this user: a capability is missing. Exit status 3."""

    exit_status: ClassVar[int] = 3


def network_error(what: str, number: int, *, why: str = "", remedy: str = "") -> NetworkError:
    """The error for a call that failed with this errno; `NetworkNotPermitted` where that is the cause."""
    why = why or os.strerror(number)
    if number in (errno.EPERM, errno.EACCES):
        return NetworkNotPermitted(
            what,
            why=f"{why}: network namespaces and links need CAP_NET_ADMIN and CAP_SYS_ADMIN",
            remedy="run as root; in a container add --cap-add NET_ADMIN --cap-add SYS_ADMIN",
            errno=number,
        )
    return NetworkError(what, why=why, remedy=remedy, errno=number)
