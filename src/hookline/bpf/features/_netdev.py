"""What a driver declares of XDP, by the generic netlink family "netdev" (Linux 6.3).

Documentation/netlink/specs/netdev.yaml of the Linux source. The few messages are made by hand: pyroute2 of
Debian's age does not have the family, and takes far longer to import than to ask.
"""

from __future__ import annotations

import errno as errnos
import os
import socket
import struct

__all__ = ["xdp_features"]

_HEADER = struct.Struct("=IHHII")
_GENERIC = struct.Struct("=BBH")
_NETLINK_GENERIC, _REQUEST, _ERROR, _CONTROL = 16, 1, 2, 16
_GET_FAMILY, _FAMILY_NAME, _FAMILY_ID = 3, 2, 1
_DEV_GET, _DEV_IFINDEX, _DEV_XDP_FEATURES = 1, 1, 3


def xdp_features(index: int) -> int:
    """The bits of ``enum netdev_xdp_act`` of an interface; bit 0: XDP programs run in its driver.

    Raises:
        OSError: The kernel has no such family (before Linux 6.3), or no such interface.
    """
    with socket.socket(socket.AF_NETLINK, socket.SOCK_RAW, _NETLINK_GENERIC) as asker:
        asker.settimeout(2)
        family = _ask(asker, _CONTROL, _GET_FAMILY, _attribute(_FAMILY_NAME, b"netdev\0"))
        number = struct.unpack_from("=H", family[_FAMILY_ID])[0]
        device = _ask(asker, number, _DEV_GET, _attribute(_DEV_IFINDEX, struct.pack("=I", index)))
        if _DEV_XDP_FEATURES not in device:
            raise OSError(errnos.ENODATA, "the kernel does not say what the driver can do")
        return int(struct.unpack_from("=Q", device[_DEV_XDP_FEATURES])[0])


def _ask(asker: socket.socket, family: int, command: int, attributes: bytes) -> dict[int, bytes]:
    """The attributes of the answer to one request."""
    body = _GENERIC.pack(command, 1, 0) + attributes
    asker.send(_HEADER.pack(_HEADER.size + len(body), family, _REQUEST, 1, 0) + body)
    answer = asker.recv(65536)
    length, kind, *_ = _HEADER.unpack_from(answer)
    if kind == _ERROR:
        errno = -struct.unpack_from("=i", answer, _HEADER.size)[0]
        if family == _CONTROL and errno == errnos.ENOENT:
            raise OSError(errno, "drivers declare it from Linux 6.3 on")
        raise OSError(errno, os.strerror(errno))
    return _attributes(answer[_HEADER.size + _GENERIC.size : length])


def _attribute(number: int, value: bytes) -> bytes:
    return struct.pack("=HH", 4 + len(value), number) + value + bytes(-len(value) % 4)


def _attributes(data: bytes) -> dict[int, bytes]:
    found, place = {}, 0
    while place + 4 <= len(data):
        length, number = struct.unpack_from("=HH", data, place)
        if length < 4:
            break
        found[number & 0x3FFF] = data[place + 4 : place + length]
        place += length + 3 & ~3
    return found
