"""Pools: which backends stand behind which addresses and ports, as data.

A pool is one port of one service in one address family; the addresses that it is reached on share its backends and its table.
`hookline.control.compiling` makes them of what documents say.
"""

from __future__ import annotations

import hashlib
from dataclasses import dataclass, field
from ipaddress import IPv4Address, IPv6Address
from typing import Literal

from hookline.model import HealthCheck

Address = IPv4Address | IPv6Address
Protocol = Literal["TCP", "UDP"]
State = Literal["starting", "active", "draining", "down"]
Scope = Literal["any", "inside"]
Reach = Literal["cluster", "local"]
BALANCED = ("TCP", "UDP")


@dataclass(frozen=True, slots=True)
class Target:
    """One backend.

    Attributes:
        weight: As the documents have it; 0 takes no new connections.
        name: The pod's or external host's that has the address, else the address.
        state: Where it is in its life: only ``starting`` and ``active`` ones take new connections.
        share: Percent of its weight that it has while it is ``starting``.
    """

    address: Address
    port: int
    weight: int
    name: str
    state: State = "active"
    share: int = 100

    @property
    def identity(self) -> bytes:
        """What stays the same as long as it is the same backend, on every node: the hash ring's key."""
        return b"%b/%d" % (self.address.packed, self.port)

    @property
    def effective_weight(self) -> int:
        """The weight with which it takes new connections now; 0 where it takes none."""
        if self.state == "active":
            return self.weight
        if self.state == "starting" and self.weight and self.share:
            return max(1, self.weight * self.share // 100)
        return 0


@dataclass(frozen=True, slots=True)
class Frontend:
    """What clients connect to. The scope says which: all, or only the sockets of this node and its pods."""

    address: Address
    port: int
    protocol: Protocol
    scope: Scope = "any"

    def __str__(self) -> str:
        host = f"[{self.address}]" if self.address.version == 6 else str(self.address)
        return f"{host}:{self.port}/{self.protocol.lower()}"


@dataclass(frozen=True, slots=True)
class Pool:
    """The backends of one port of one service in one family, and the frontends that share them.

    Attributes:
        service: The object's reference, ``VirtualService/default/orders``.
        port: The port's name, or its number.
        frontends: At least one; addresses for all and for this node's own sockets may stand side by side.
        targets: Each once.
        table_size: Slots of its table, a prime; for ``modulo`` what the weights need; 0 without active targets.
        affinity_seconds: How long a silent client keeps its backend; 0 where each connection is placed anew.
        drain_seconds: How long a backend that leaves keeps its connections; 0 ends them at once.
        health_check: How backends are asked whether they are well; None: nobody asks.
        slow_start_seconds: How long the share of a backend grows that begins to take connections.
        all_down: What becomes of connections where every backend is down.
        reach: ``local``: only backends of this node are in it, as a policy of the service asks for.
    """

    service: str
    port: str
    version: Literal[4, 6]
    protocol: Protocol
    frontends: tuple[Frontend, ...]
    targets: tuple[Target, ...]
    forwarding: Literal["nat", "dsr"]
    algorithm: Literal["maglev", "modulo"]
    table_size: int
    affinity_seconds: int = 0
    drain_seconds: float = 0
    health_check: HealthCheck | None = None
    slow_start_seconds: float = 0
    all_down: Literal["failOpen", "reset"] = "reset"
    reach: Reach = "cluster"
    key: int = field(init=False)

    def __post_init__(self) -> None:
        text = f"{self.service}\0{self.port}\0{self.version}\0{self.protocol}"
        if self.reach != "cluster":
            text += f"\0{self.reach}"
        digest = hashlib.blake2b(text.encode(), digest_size=8, person=b"pool").digest()
        # Never 0, which a row that no pool owns has.
        object.__setattr__(self, "key", int.from_bytes(digest, "little") | 1)

    @property
    def active(self) -> tuple[Target, ...]:
        """The targets that take new connections."""
        return tuple(target for target in self.targets if target.effective_weight)
