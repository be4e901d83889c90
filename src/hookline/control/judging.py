"""The firewall's rows followed by hand: what becomes of a connection that is open, as the programs will see its next packet.

The programs judge a connection again at its next packet. Who wants to know of those that are silent, or what rows would do
that are not in force, asks here; the lookups are those of ``datapath/firewall/judge.h``.
"""

from __future__ import annotations

from collections.abc import Iterable
from ipaddress import IPv4Address, IPv6Address

from hookline.control.placement import packed
from hookline.datapath.firewall.firewall import NODE_ITSELF, Rows, Tracked
from hookline.policy import Direction, PolicyRow

Address = IPv4Address | IPv6Address

ANY, WORLD, OWN_NODE = 0, 1, 2
WITH_PORTS = frozenset({6, 17, 33, 132, 136})
_ALL = (1 << 128) - 1


class Judge:
    """Holds connections against rows; what was asked once is remembered."""

    def __init__(self, rows: Rows) -> None:
        self._rows = rows
        self._lengths = sorted({bits for _, bits in rows.identities}, reverse=True)
        self._identities: dict[Address, tuple[int, int]] = {}
        self._verdicts: dict[tuple[int, int, int, int], bool] = {}
        self._port_bits: list[int] | None = None

    def is_allowed(self, one: Tracked) -> bool:
        """Whether a connection would be let begin as it did."""
        port = one.local_port if one.direction == "ingress" else one.remote_port
        return self._is_allowed(one.interface, one.remote, one.protocol, port, one.direction)

    def allows(
        self, local: Address, remote: Address, protocol: int, port: int, direction: Direction
    ) -> bool | None:
        """Whether a new connection would be let begin at a pod of this node; None where no such pod has the address.

        Args:
            local: The pod's end, ``remote`` the other.
            protocol: The IP protocol.
            port: The destination's.
            direction: As the pod sees it.
        """
        _, interface = self._identity(local)
        if not interface:
            return None
        return self._is_allowed(interface, remote, protocol, port, direction)

    def _is_allowed(self, at: int, remote: Address, protocol: int, port: int, direction: Direction) -> bool:
        row = self._rows.endpoints.get(at)
        if row is None:
            return at == NODE_ITSELF  # the node itself is not judged then
        group = row.ingress if direction == "ingress" else row.egress
        if not group:
            return True
        identity, interface = self._identity(remote)
        if at != NODE_ITSELF and (identity == OWN_NODE or interface == at):
            return True
        key = group, identity, protocol, port if protocol in WITH_PORTS else -1
        allowed = self._verdicts.get(key)
        if allowed is None:
            allowed = self._verdicts[key] = self._look_up(*key)
        return allowed or _default(row, direction)

    def _identity(self, address: Address) -> tuple[int, int]:
        found = self._identities.get(address)
        if found is None:
            octets = packed(address)
            found = (WORLD, 0)
            for bits in self._lengths:
                kept = int.from_bytes(octets, "big") & (_ALL << (128 - bits) & _ALL)
                row = self._rows.identities.get((kept.to_bytes(16, "big"), bits))
                if row is not None:
                    found = row
                    break
            self._identities[address] = found
        return found

    def _look_up(self, group: int, identity: int, protocol: int, port: int) -> bool:
        return any(self._rule(group, one, protocol, port) for one in (identity, ANY))

    def _rule(self, group: int, identity: int, protocol: int, port: int) -> bool:
        rules = self._rows.rules
        for bits in range(16 if port >= 0 else 0, -1, -1):
            kept = port & (0xFFFF << (16 - bits) & 0xFFFF) if bits else 0
            found = rules.get((group, identity, protocol, kept, bits))
            if found is not None:
                return found[1]
        found = rules.get((group, identity, None, 0, 0))
        return found is not None and found[1]


def _default(row: PolicyRow, direction: Direction) -> bool:
    return row.default_allow_ingress if direction == "ingress" else row.default_allow_egress


def no_longer_allowed(rows: Rows, tracked: Iterable[Tracked]) -> list[Tracked]:
    """The connections that these rows do not allow, those among them that are cut already too."""
    judge = Judge(rows)
    return [one for one in tracked if one.cut or not (one.exempt or judge.is_allowed(one))]


def cut_by(before: Rows, after: Rows, tracked: Iterable[Tracked]) -> set[frozenset[tuple[Address, int]]]:
    """The open connections that a change of rows forbids, each by its two ends and so once, wherever it is known.

    What is over is not open, and what was forbidden before is not this change's doing. An end without a row before was
    not looked at, and could have any connection.

    Args:
        before: The rows that the change replaces, ``after`` the new ones.
        tracked: The connections, before the change or after it: then its own cuts may be among them.
    """
    old, new = Judge(before), Judge(after)
    return {
        frozenset(((one.local, one.local_port), (one.remote, one.remote_port)))
        for one in tracked
        if not (one.exempt or one.state == "closed" or new.is_allowed(one))
        and (one.interface not in before.endpoints or old.is_allowed(one))
    }
