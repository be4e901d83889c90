"""Kernel settings of a network namespace, under ``/proc/sys/net``."""

from __future__ import annotations

import os
import socket
from collections.abc import Mapping

from hookline.net._errors import network_error


def write_sysctls(settings: Mapping[str, int]) -> None:
    """Write settings of the calling thread's network namespace, such as ``{"ipv4/ip_forward": 1}``.

    Raises:
        NetworkError: The kernel has no such setting or refuses the value.
    """
    for name, value in settings.items():
        try:
            descriptor = os.open(f"/proc/sys/net/{name}", os.O_WRONLY | os.O_CLOEXEC)
            try:
                os.write(descriptor, str(value).encode())
            finally:
                os.close(descriptor)
        except OSError as error:
            raise network_error(f"cannot set net/{name} to {value}", error.errno or 0) from None


def ipv6_available() -> bool:
    """Whether this kernel has IPv6 (it has not when booted with ``ipv6.disable=1``)."""
    if not os.path.isdir("/proc/sys/net/ipv6/conf"):
        return False
    try:
        socket.socket(socket.AF_INET6, socket.SOCK_DGRAM).close()
    except OSError:
        return False
    return True
