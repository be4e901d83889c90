"""What the kernel tells of changes to a namespace's network: interfaces, addresses, routes, removed neighbours.

A netlink socket that has joined the kernel's groups (rtnetlink(7)). What exactly changed is not read: whoever listens looks
at what it cares for again, which also covers messages that were lost.
"""

from __future__ import annotations

import socket
import struct
from pathlib import Path
from typing import Literal

from pyroute2.netlink import rtnl

from hookline.net._namespaces import inside

Happening = Literal["link", "address", "route", "neighbour"]
EVERYTHING: frozenset[Happening] = frozenset({"link", "address", "route", "neighbour"})
_HEADER = struct.Struct("=IHHII")
_KINDS: dict[int, Happening] = {
    rtnl.RTM_NEWLINK: "link",
    rtnl.RTM_DELLINK: "link",
    rtnl.RTM_NEWADDR: "address",
    rtnl.RTM_DELADDR: "address",
    rtnl.RTM_NEWROUTE: "route",
    rtnl.RTM_DELROUTE: "route",
    rtnl.RTM_DELNEIGH: "neighbour",
}
_GROUPS = (
    rtnl.RTMGRP_LINK
    | rtnl.RTMGRP_NEIGH
    | rtnl.RTMGRP_IPV4_IFADDR
    | rtnl.RTMGRP_IPV4_ROUTE
    | rtnl.RTMGRP_IPV6_IFADDR
    | rtnl.RTMGRP_IPV6_ROUTE
)


class Monitor:
    """Listens to one network namespace. Its descriptor becomes readable when something changed.

    Args:
        namespace: The namespace's file; None for the calling thread's.
    """

    def __init__(self, namespace: Path | None = None) -> None:
        with inside(namespace):
            self._socket = socket.socket(
                socket.AF_NETLINK,
                socket.SOCK_RAW | socket.SOCK_CLOEXEC | socket.SOCK_NONBLOCK,
                socket.NETLINK_ROUTE,
            )
        self._socket.bind((0, _GROUPS))

    def fileno(self) -> int:
        """The descriptor to wait for."""
        return self._socket.fileno()

    def close(self) -> None:
        """Stops listening."""
        self._socket.close()

    def read(self) -> frozenset[Happening]:
        """What changed since the last call; everything where the kernel had to drop messages."""
        found: set[Happening] = set()
        while True:
            try:
                data = self._socket.recv(1 << 16)
            except BlockingIOError:
                return frozenset(found)
            except OSError:  # ENOBUFS: some were lost
                return EVERYTHING
            position = 0
            while position + _HEADER.size <= len(data):
                length, kind, *_ = _HEADER.unpack_from(data, position)
                if length < _HEADER.size:
                    break
                if kind in _KINDS:
                    found.add(_KINDS[kind])
                position += -(-length // 4) * 4
