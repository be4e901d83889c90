"""What systemd is told: sd_notify(3) is one datagram to the socket that ``NOTIFY_SOCKET`` names."""

from __future__ import annotations

import os
import socket


def notify(*lines: str) -> bool:
    """Tells the service manager, such as ``READY=1``. False where there is none."""
    address = os.environ.get("NOTIFY_SOCKET", "")
    if not address:
        return False
    if address.startswith("@"):
        address = "\0" + address[1:]
    try:
        with socket.socket(socket.AF_UNIX, socket.SOCK_DGRAM | socket.SOCK_CLOEXEC) as channel:
            channel.sendto("\n".join(lines).encode(), address)
    except OSError:
        return False  # a manager that has gone has nobody to be told
    return True


def watchdog_seconds() -> float | None:
    """How often the service manager wants to hear from this process; None where it does not."""
    microseconds, pid = os.environ.get("WATCHDOG_USEC", ""), os.environ.get("WATCHDOG_PID", "")
    if not microseconds.isdigit() or int(microseconds) == 0 or (pid and pid != str(os.getpid())):
        return None
    return int(microseconds) / 1e6
