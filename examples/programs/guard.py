"""A data plane of one's own: programs on hooks, and a policy by address that they share."""

import struct
from collections.abc import Mapping
from contextlib import ExitStack
from ipaddress import ip_network
from typing import Any

from hookline import bpf


class DataPlane(ExitStack):
    """Programs and their policy; all of it is gone when the ``with`` block ends."""

    policy: Any = None  # a bpf.Map, once a program is loaded

    def load_program(self, kind: str, path: str) -> None:
        """Attach the object's program for a hook, such as ``"xdp:eth0"`` or ``"tc:eth0:egress"``."""
        obj = self.enter_context(bpf.Object.open(path))
        if self.policy is not None:
            obj.reuse("policy", self.policy)
        self.policy = obj.load().maps["policy"]
        program = next(p for p in obj.programs.values() if kind.startswith(f"{p.section}:"))
        self.enter_context(program.attach(kind))

    def update_policy(self, rules: Mapping[str, bool]) -> None:
        """Drop packets of these prefixes, or let them pass: ``{"10.0.0.0/8": True, "10.1.0.0/16": False}``."""
        wanted = {_key(prefix): {"drop": drop} for prefix, drop in rules.items()}
        stale = [key for key in self.policy if key.tobytes() not in wanted]
        self.policy.write(list(wanted), list(wanted.values()))
        self.policy.remove(stale)


def _key(prefix: str) -> bytes:
    """The policy's key: the prefix's length, then an IPv6 address; IPv4 is written as ::ffff:a.b.c.d."""
    network = ip_network(prefix)
    mapped = 0 if network.version == 6 else 0xFFFF << 32
    length = network.prefixlen + (96 if mapped else 0)
    return struct.pack("=I", length) + (mapped | int(network.network_address)).to_bytes(16, "big")
