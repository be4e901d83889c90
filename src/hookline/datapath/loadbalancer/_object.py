"""Where the compiled programs lie: beside their sources, in a checkout as in an installed wheel."""

from __future__ import annotations

from pathlib import Path

from hookline.datapath import pinning

OBJECT = Path(__file__).with_name("loadbalancer.bpf.o")
DESTROY = Path(__file__).with_name("destroy.bpf.o")


def object_bytes(path: Path = OBJECT) -> bytes:
    """A compiled object: the load balancer's, or the one that ends sockets.

    Raises:
        HooklineError: It was not compiled.
    """
    return pinning.object_bytes(path)
