"""Where the compiled programs lie: beside their sources, in a checkout as in an installed wheel."""

from __future__ import annotations

from functools import cache
from pathlib import Path

from hookline.errors import HooklineError

OBJECT = Path(__file__).with_name("loadbalancer.bpf.o")
DESTROY = Path(__file__).with_name("destroy.bpf.o")


@cache
def object_bytes(path: Path = OBJECT) -> bytes:
    """A compiled object: the load balancer's, or the one that ends sockets.

    Raises:
        HooklineError: It was not compiled.
    """
    try:
        return path.read_bytes()
    except FileNotFoundError:
        raise HooklineError(
            f"the kernel programs are not compiled: {path} is missing",
            why="a checkout holds their sources only",
            remedy="make setup",
        ) from None
