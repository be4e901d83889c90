"""Why a connection goes where it goes: the kernel's own tables followed by hand, and the environment looked at.

What decides is read from the kernel, row by row as the programs read it, not worked out of the documents; these only give the
names. Then the node's network is asked what would keep the connection from being: routes, forwarding, reverse path filters,
neighbours, MTUs, the peer of a veth that frames are redirected into, programs that are not attached, processes that are in no
cgroup of the node. `Node.explain` collects what is needed.
"""

from __future__ import annotations

import os
import time
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import asdict, dataclass, field, replace
from ipaddress import IPv4Address, IPv6Address
from pathlib import Path
from typing import Any, Literal

import numpy as np

from hookline import net
from hookline.control.placement import Placement, Placements, packed
from hookline.control.pools import Pool
from hookline.control.rows import ServiceRow
from hookline.control.tables import (
    PROTOCOLS,
    SERVICE_MODULO,
    SERVICE_NODE_OWN,
    SERVICE_REDIRECT,
    STATES,
    Tables,
    address_of,
    service_key,
)
from hookline.datapath.loadbalancer.balancer import Attachment, LoadBalancer
from hookline.model.names import NETNS, NodeName, lab_netns_prefix
from hookline.policy import Direction, Side

Address = IPv4Address | IPv6Address
Way = Literal["sockets", "xdp"]
Outcome = Literal["backend", "refused", "dropped", "direct"]

HASH_SEED = 0x686B6C6E  # as in maps.h
DNS_PORT = 53
CAPTURE_DNS = 1
_MASK = (1 << 64) - 1
_SOCKET_PROGRAMS = {4: ("connect4", "sendmsg4"), 6: ("connect6", "sendmsg6")}
_UNRESOLVED = ("incomplete", "failed")


@dataclass(frozen=True, slots=True)
class Source:
    """Who asks.

    Attributes:
        name: As it was given.
        inside: Whether it is this node or one of its pods: then its sockets are served when they connect.
        addresses: Its addresses.
        netns: Its network namespace; None: the node's own, or not on this node.
        namespace_known: Whether ``netns`` says where it is.
        port: The source port, where one was given.
    """

    name: str
    inside: bool
    addresses: tuple[Address, ...]
    netns: Path | None = None
    namespace_known: bool = False
    port: int | None = None


@dataclass(frozen=True, slots=True)
class Destination:
    """What is asked for: ``reference`` is the service's where it has one."""

    name: str
    address: Address
    port: int
    protocol: Literal["TCP", "UDP", "SCTP"]
    reference: str = ""


@dataclass(frozen=True, slots=True)
class Surroundings:
    """What `explain` reads beside the tables.

    Attributes:
        group: The cgroup of the node's processes, relative to the mount; None: the programs of sockets are wanted nowhere.
        attached_group: The kernel's number of the cgroup that the programs are on, ``group_number`` that of ``group``.
    """

    node: NodeName
    uplinks: tuple[str, ...]
    attachments: tuple[Attachment, ...]
    group: str | None
    group_number: int | None
    attached_group: int | None


@dataclass(frozen=True, slots=True)
class Obstacle:
    """What would stop the connection, or some of its packets.

    Attributes:
        kind: One word: ``policy``, ``policy_rows``, ``rp_filter``, ``no_route``, ``neighbour``, ``peer``, ``mtu``,
            ``forwarding``, ``not_attached``, ``cgroup``, ``no_port``.
        backend: Whose way it is in; empty: everybody's.
    """

    kind: str
    what: str
    remedy: str
    backend: str = ""


@dataclass(frozen=True, slots=True)
class Choice:
    """A backend that the connection may be given.

    Attributes:
        share: Of new connections, 0 to 1.
        state: Of its life.
        how: How it is reached: ``nat``, ``dsr``, ``local``, or for sockets ``connected``: by the socket itself.
        next_hop: The neighbour that packets to it are handed to, and the interface; empty where it is the node's own.
    """

    name: str
    address: str
    port: int
    share: float
    state: str
    how: str
    next_hop: str
    interface: str


@dataclass(frozen=True, slots=True)
class Permission:
    """What policies say of the connection as it is after a service's translation.

    Attributes:
        backend: Whose way it is; empty: the destination's own.
        source: Who the policies see; this node, where it translates the source's address too.
        egress: What the source's end says, ``ingress`` the destination's.
        decided_by: One line.
        allowed: Whether the ends allow it whose nodes were asked.
        judged_by: Name of the node whose firewall judges, by direction; empty where none does.
        enforced: By direction, whether what is said is what that node goes by. False: it was not asked, and what is said is what
            the documents known here mean.
        would_deny: References of audited policies that would deny it, by direction.
    """

    backend: str
    source: str
    address: str
    port: int
    allowed: bool
    egress: Side
    ingress: Side
    decided_by: str
    judged_by: dict[Direction, str] = field(default_factory=dict)
    enforced: dict[Direction, bool] = field(default_factory=dict)
    would_deny: dict[Direction, tuple[str, ...]] = field(default_factory=dict)


@dataclass(slots=True)
class Explanation:
    """The answer.

    Attributes:
        way: Where it is decided: when a socket of this node connects, or by XDP when its packet arrives.
        outcome: ``backend``: one of `backends`; ``refused``, ``dropped``; ``direct``: no service takes it.
        table: Which: ``scope``, ``service``, ``port``, ``size``, ``algorithm``, ``affinity_seconds``, ``slot`` where it is known.
        chosen: The backend, where it is certain.
        why: In words, in order.
        permissions: What policies say of each way that the connection may go; empty where there are none.
    """

    source: str
    destination: str
    address: str
    port: int
    protocol: str
    way: Way
    outcome: Outcome = "direct"
    table: dict[str, Any] | None = None
    chosen: Choice | None = None
    backends: list[Choice] = field(default_factory=list)
    others: list[Choice] = field(default_factory=list)
    why: list[str] = field(default_factory=list)
    obstacles: list[Obstacle] = field(default_factory=list)
    permissions: list[Permission] = field(default_factory=list)

    def as_dict(self) -> dict[str, Any]:
        """The answer as plain values."""
        return asdict(self)


def explain(
    source: Source,
    destination: Destination,
    *,
    balancer: LoadBalancer | None,
    tables: Tables | None,
    pools: Sequence[Pool],
    around: Surroundings,
) -> Explanation:
    """What becomes of a new connection. Called in the node's network namespace.

    Args:
        source: Who asks.
        destination: What for.
        balancer: The node's, None where nothing is loaded.
        tables: Its tables.
        pools: The wanted ones, for names.
        around: The rest.
    """
    answer = Explanation(
        source.name,
        destination.name,
        str(destination.address),
        destination.port,
        destination.protocol.lower(),
        "sockets" if source.inside else "xdp",
    )
    if destination.protocol == "SCTP":
        answer.why.append("services are TCP and UDP")
        _direct(answer, source, destination.address)
        return answer
    if balancer is None or tables is None:
        answer.why.append("nothing is balanced on this node: no programs are loaded")
        _direct(answer, source, destination.address)
        return answer
    follow = _Follow(
        source, destination, balancer, tables, {pool.key: pool for pool in pools}, around, answer
    )
    if source.inside:
        follow.sockets()
    else:
        follow.xdp()
    return answer


class _Follow:
    """One connection's way through the tables."""

    def __init__(
        self,
        source: Source,
        destination: Destination,
        balancer: LoadBalancer,
        tables: Tables,
        pools: Mapping[int, Pool],
        around: Surroundings,
        answer: Explanation,
    ) -> None:
        self.source, self.destination, self.answer = source, destination, answer
        self.balancer, self.tables, self.pools, self.around = balancer, tables, pools, around
        self.backends = balancer.maps["backends"].read()[1]
        self.placements = Placements(frozenset(around.uplinks))

    # -- sockets of this node

    def sockets(self) -> None:
        """As connect_socket() in sockets.h."""
        answer, address, port = self.answer, self.destination.address, self.destination.port
        served = self._sockets_are_served()
        if not served:
            answer.why.append("its sockets are not served when they connect, so the address stays what it is")
            _direct(answer, self.source, address)
            return
        cookie = self._cookie()
        if cookie is not None and port == DNS_PORT:
            pod = self.balancer.maps["pods"].get({"netns": cookie, "pool": 0})
            if pod is not None and int(pod["flags"]) & CAPTURE_DNS:
                resolver = pod["resolvers"][0 if address.version == 4 else 1]
                resolver_port = int(np.uint16(resolver["port"]).byteswap())
                if not resolver_port:
                    answer.why.append(
                        f"its queries are captured, and the resolver has no IPv{address.version} address"
                    )
                    answer.outcome = "refused"
                    return
                address, port = address_of(resolver["address"]), resolver_port
                answer.why.append(f"its queries are captured (DNSCapture): they go to {_at(address, port)}")
        protocol = self.destination.protocol
        row = self.tables.services.get(service_key(address, port, protocol, "inside"))
        scope = "inside"
        if row is not None and address.is_loopback and cookie is not None and not self._is_host(cookie):
            answer.why.append("node ports on loopback are the host's: its loopback is its own")
            _direct(answer, self.source, address)
            return
        if row is not None and row.flags & SERVICE_REDIRECT:
            name = self._name(row.pool)
            own = {"netns": cookie, "pool": row.pool}
            if cookie is not None and self.balancer.maps["pods"].get(own) is not None:
                answer.why.append(f"{name} does not hold for this pod, which is its backend")
                row = None
            else:
                answer.why.append(f"{name} sends it to a pod of this node")
        if row is None:
            scope = "any"
            row = self.tables.services.get(service_key(address, port, protocol))
        if row is None:
            answer.why.append(f"no service of this node has {_at(address, port)}/{protocol.lower()}")
            _direct(answer, self.source, address)
            self._check_port(address, port)
            if answer.address != str(address):
                answer.address, answer.port = str(address), port
            return
        client = bytes([255] * 8) + _netns_words(cookie) if cookie is not None else None
        self._table(row, scope, client)

    def _sockets_are_served(self) -> bool:
        around, version = self.around, self.destination.address.version
        there = {one.program for one in around.attachments if one.hook.startswith("cgroup")}
        missing = [name for name in _SOCKET_PROGRAMS[version] if name not in there]
        if around.group is None:
            self._stop(
                "not_attached",
                "the programs of sockets are switched off, or this kernel has none",
                "hookline doctor",
            )
            return False
        if missing:
            self._stop(
                "not_attached",
                f"{', '.join(missing)} {'is' if len(missing) == 1 else 'are'} not attached to the node's cgroup",
                "hookline apply -f FILE attaches them, the agent by itself",
            )
            return False
        if around.attached_group != around.group_number:
            self._stop(
                "not_attached",
                "the programs of sockets are on another cgroup than the node's processes",
                "hookline apply -f FILE attaches them to the right one",
            )
            return False
        if self.source.namespace_known:
            inode = os.stat(self.source.netns or "/proc/thread-self/ns/net").st_ino
            outside = processes_outside(inode, around.group)
            if outside:
                shown = ", ".join(f"{number} ({name}) in /{group}" for number, name, group in outside[:3])
                self._stop(
                    "cgroup",
                    f"{len(outside)} of its processes {'is' if len(outside) == 1 else 'are'} in no cgroup of the node, and "
                    f"their sockets are not served: {shown}",
                    f"start them below the cgroup /{around.group}",
                )
        return True

    def _cookie(self) -> int | None:
        if not self.source.namespace_known:
            return None
        with net.inside(self.source.netns):
            return net.own_cookie()

    def _is_host(self, cookie: int) -> bool:
        """Whether a network namespace is the host's: a lab's never is, and the host's commands run in it."""
        return self.around.node.netns is None and cookie == net.own_cookie()

    # -- packets that arrive

    def xdp(self) -> None:
        """As balance_packet() in loadbalancer.bpf.c."""
        answer, wanted = self.answer, self.destination
        there = {one.interface for one in self.around.attachments if one.program == "balance"}
        missing = [name for name in self.around.uplinks if name not in there]
        if missing:
            self._stop(
                "not_attached",
                f"balance is not attached to {', '.join(missing)}: what arrives there is the stack's",
                "hookline apply -f FILE attaches it, the agent by itself",
            )
        row = self.tables.services.get(service_key(wanted.address, wanted.port, wanted.protocol))
        if row is not None:
            client = self._client_address()
            self._table(row, "any", packed(client) if client is not None else None)
            return
        address_row = self.tables.services.get(service_key(wanted.address))
        if address_row is None:
            answer.why.append(f"no service of this node has the address {wanted.address}: XDP passes it on")
            _direct(answer, Source(str(self.around.node), True, ()), wanted.address)
        elif address_row.flags & SERVICE_NODE_OWN:
            answer.why.append(
                f"no service has port {wanted.port}/{wanted.protocol.lower()}, and {wanted.address} is the node's own: "
                "it is the stack's"
            )
            _direct(answer, Source(str(self.around.node), True, ()), wanted.address)
        else:
            answer.outcome = "dropped"
            answer.why.append(
                f"{wanted.address} is a service's, and no service has port {wanted.port}/{wanted.protocol.lower()}: "
                "it is dropped and counted as no_service"
            )
            self._check_port(wanted.address, wanted.port)

    def _check_port(self, address: Address, port: int) -> None:
        """An address that services alone have, asked for a port that none of them has: nobody is there."""
        marker = self.tables.services.get(service_key(address))
        if marker is None or marker.flags & SERVICE_NODE_OWN:
            return
        there: dict[str, list[str]] = {}
        for pool in self.pools.values():
            if pool.service.startswith("LocalRedirectPolicy/"):
                continue
            for one in pool.frontends:
                if one.address == address:
                    there.setdefault(pool.service, []).append(f"{one.port}/{one.protocol.lower()}")
        if there:
            wanted = f"{port}/{self.destination.protocol.lower()}"
            has = "; ".join(f"{name} has {', '.join(sorted(set(ports)))}" for name, ports in there.items())
            names = " and ".join(there)
            self._stop(
                "no_port",
                f"{names} {'has' if len(there) == 1 else 'have'} no port {wanted} at {address}: {has}",
                f"ask for a port that is there, or add {wanted} to the service",
            )

    def _client_address(self) -> Address | None:
        return next(
            (one for one in self.source.addresses if one.version == self.destination.address.version), None
        )

    # -- the table

    def _table(self, row: ServiceRow, scope: str, client: bytes | None) -> None:
        answer, pool = self.answer, self.pools.get(row.pool)
        slots = self.tables.slots(row)
        modulo = bool(row.flags & SERVICE_MODULO)
        answer.table = {
            "scope": scope,
            "service": self._name(row.pool),
            "port": pool.port if pool else "",
            "reach": pool.reach if pool else "",
            "size": len(slots),
            "algorithm": "modulo" if modulo else "maglev",
            "affinity_seconds": row.affinity_seconds,
            "slot": None,
        }
        words = "for the sockets of this node alone" if scope == "inside" else "for all"
        answer.why.append(f"{self._name(row.pool)} has it, by its rows {words}")
        if pool is not None and pool.reach == "local":
            answer.why.append("a policy of the service lets in backends of this node only")
        counts = (
            np.bincount(slots, minlength=len(self.backends))
            if len(slots)
            else np.zeros(len(self.backends), int)
        )
        rows = sorted(
            (number for number in np.flatnonzero(self.backends["pool"] == np.uint64(row.pool)).tolist()),
            key=lambda number: -int(counts[number]),
        )
        forwarding: Literal["nat", "dsr"] = pool.forwarding if pool else "nat"
        choices = {
            number: self._choice(number, counts[number] / len(slots) if len(slots) else 0.0, pool, forwarding)
            for number in rows
            if int(self.backends["flags"][number]) & 1
        }
        answer.backends = [one for number, one in choices.items() if counts[number]]
        answer.others = [one for number, one in choices.items() if not counts[number]]
        for one in answer.others:
            answer.why.append(f"{one.name} ({one.address}) takes no new connections: it is {one.state}")
        if not len(slots):
            answer.outcome = "refused"
            answer.why.append(
                "no backend takes connections: "
                + (
                    "the socket is refused"
                    if self.source.inside
                    else "it is answered with a reset or port unreachable"
                )
            )
            return
        answer.outcome = "backend"
        number, slot = self._decided(row, slots, client)
        answer.table["slot"] = slot
        if number is None and len(answer.backends) == 1:
            answer.chosen = answer.backends[0]
            answer.why.append("it is the only backend that takes connections")
        elif number is not None and number in choices:
            answer.chosen = choices[number]
            if slot is not None:
                answer.why.append(f"slot {slot} of {len(slots)} names it")
        else:
            answer.why.append(
                "each connection is given a backend by chance, each by its share"
                if self.source.inside
                else "the client's port decides, each backend by its share"
            )
        concerned = [answer.chosen] if answer.chosen is not None else answer.backends
        by_choice = {id(one): number for number, one in choices.items()}
        for one in concerned:
            self._obstacles(one, address_of(self.backends["address"][by_choice[id(one)]]), forwarding)

    def _decided(self, row: ServiceRow, slots: Any, client: bytes | None) -> tuple[int | None, int | None]:
        """The backend's row and the slot, as far as they are certain: affine_backend(), flow_hash()."""
        if row.affinity_seconds:
            if client is None:
                self.answer.why.append(
                    "the service keeps clients with their backends, and this one's address is not known"
                )
                return None, None
            table = self.balancer.maps["affinity"]
            known = table.get(np.frombuffer(client + row.pool.to_bytes(8, "little"), table.key_dtype)[0])
            if known is not None and self._takes_new(known, row.affinity_seconds):
                self.answer.why.append(
                    f"session affinity: this client has a backend, for {row.affinity_seconds} s after its last connection"
                )
                return int(known["backend"]), None
            self.answer.why.append(
                "session affinity: this client has no backend yet, and a hash of it decides"
            )
            digest = _mix_words(HASH_SEED, client)
            slot = _slot(row, _mix(digest ^ row.pool) & 0xFFFFFFFF)
            return int(slots[slot]), slot
        if self.source.inside or self.source.port is None or client is None:
            return None, None
        slot = _slot(row, flow_hash(client, self.source.port, self.destination))
        return int(slots[slot]), slot

    def _takes_new(self, known: Any, seconds: int) -> bool:
        backend = self.backends[int(known["backend"])]
        silent = time.clock_gettime_ns(time.CLOCK_MONOTONIC) - int(known["last_used_ns"])
        return (
            silent <= seconds * 1_000_000_000
            and int(backend["flags"]) & 1 == 1
            and int(backend["generation"]) == int(known["generation"])
            and int(backend["state"]) in (STATES["starting"], STATES["active"])
        )

    def _choice(
        self, number: int, share: float, pool: Pool | None, forwarding: Literal["nat", "dsr"]
    ) -> Choice:
        entry = self.backends[number]
        address, port = address_of(entry["address"]), int(np.uint16(entry["port"]).byteswap())
        names = {(one.address, one.port): one.name for one in (pool.targets if pool else ())}
        state = next((name for name, value in STATES.items() if value == int(entry["state"])), "none")
        if self.source.inside:
            route = self._route_of_source(address)
            how, hop, interface = "connected", str(route.gateway or address), route.interface
        else:
            placement = self.placements.place(address, forwarding)
            how = placement.how
            hop, interface = placement.next_hop or (str(address), self.placements.route(address).interface)
        return Choice(
            names.get((address, port), str(address)),
            str(address),
            port,
            float(share),
            state,
            how,
            hop,
            interface,
        )

    def _route_of_source(self, address: Address) -> net.Route:
        if not self.source.namespace_known:
            return self.placements.route(address)
        with net.inside(self.source.netns):
            return net.route_to(address)

    # -- what would stop it

    def _obstacles(self, choice: Choice, address: Address, forwarding: Literal["nat", "dsr"]) -> None:
        if self.source.inside:
            self._obstacles_of_sockets(choice, address)
        else:
            self._obstacles_of_xdp(choice, address, self.placements.place(address, forwarding))

    def _obstacles_of_sockets(self, choice: Choice, address: Address) -> None:
        of_source = self._route_of_source(address)
        if of_source.kind == "unreachable":
            self._stop(
                "no_route",
                f"{self.source.name} has no route to {address}",
                "ip route, in its network namespace",
                choice,
            )
            return
        here = self.placements.route(address)
        if here.kind == "unreachable":
            self._stop("no_route", f"the node has no route to {address}", f"ip route get {address}", choice)
            return
        if of_source.kind == "local":
            return  # its own address: by loopback, and never through the node
        pod = self.source.netns is not None and self.source.netns != self.around.node.netns
        if pod:
            with net.inside(self.source.netns):
                mtu = _mtu(of_source.interface)
            own = self._client_address()
            arrives = self.placements.route(own).interface if own is not None else ""
            if here.kind != "local":
                self._check_forwarding(arrives, address.version, choice)
                self._check_mtu(here.interface, mtu, f"{self.source.name}'s {of_source.interface}", choice)
        if here.kind != "local":
            self._check_neighbour(str(here.gateway or address), here.interface, choice)

    def _obstacles_of_xdp(self, choice: Choice, address: Address, placement: Placement) -> None:
        if placement.how == "unreachable":
            self._stop("no_route", f"the node has no route to {address}", f"ip route get {address}", choice)
            return
        route = self.placements.route(address)
        client = self._client_address()
        for uplink in self.around.uplinks:
            if placement.forwarded:
                self._check_forwarding(uplink, address.version, choice)
            if placement.how == "local" and client is not None:
                self._check_reverse_path(uplink, client, choice)
            if route.kind != "local":
                self._check_mtu(route.interface, _mtu(uplink), f"the uplink {uplink}", choice)
        if route.kind != "local":
            self._check_neighbour(str(route.gateway or address), route.interface, choice)
        if placement.how in ("nat", "dsr"):
            self._check_peer(route.interface, choice)

    def _check_forwarding(self, interface: str, version: int, choice: Choice) -> None:
        path = Path(f"/proc/sys/net/ipv{version}/conf/{interface}/forwarding")
        whole = Path(
            "/proc/sys/net/ipv4/ip_forward" if version == 4 else "/proc/sys/net/ipv6/conf/all/forwarding"
        )
        if _sysctl(path) == 0 or (version == 6 and _sysctl(whole) == 0):
            name = ".".join((whole if _sysctl(whole) == 0 else path).parts[3:])
            self._stop(
                "forwarding",
                f"IPv{version} forwarding is switched off on {interface}",
                f"sysctl -w {name}=1",
                choice,
            )

    def _check_reverse_path(self, interface: str, client: Address, choice: Choice) -> None:
        if client.version != 4:
            return  # IPv6 has no such filter
        values = [
            _sysctl(Path(f"/proc/sys/net/ipv4/conf/{name}/rp_filter")) or 0 for name in ("all", interface)
        ]
        back = net.route_to(client)
        strict = max(values) == 1
        if max(values) and (back.kind == "unreachable" or (strict and back.interface != interface)):
            way = f"by {back.interface}" if back.interface else "nowhere"
            self._stop(
                "rp_filter",
                f"rp_filter of {interface} drops what comes from {client}: the way back leads {way}",
                f"sysctl -w net.ipv4.conf.{interface}.rp_filter=0, and all likewise; or mend the route to {client}",
                choice,
            )

    def _check_mtu(self, interface: str, arriving: int | None, where: str, choice: Choice) -> None:
        leaving = _mtu(interface)
        if arriving and leaving and leaving < arriving:
            self._stop(
                "mtu",
                f"{interface} takes packets up to {leaving} octets, {where} {arriving}: larger ones do not get through",
                f"ip link set {interface} mtu {arriving}",
                choice,
            )

    def _check_neighbour(self, address: str, interface: str, choice: Choice) -> None:
        for one in net.neighbours():
            if str(one.address) == address and one.interface == interface and one.state in _UNRESOLVED:
                self._stop(
                    "neighbour",
                    f"{address} does not answer on {interface}: the neighbour is {one.state}",
                    f"see that {address} is up and on that link; ip neigh show {address}",
                    choice,
                )

    def _check_peer(self, interface: str, choice: Choice) -> None:
        if any(
            one.program == "balance" and one.interface == interface and "generic" in one.hook
            for one in self.around.attachments
        ):
            return  # the stack sends
        peer = veth_peer(interface, self.around.node)
        if peer is None:
            return
        namespace, name, takes = peer
        if not takes:
            self._stop(
                "peer",
                f"the other end of {interface}, {name} in {namespace}, has neither GRO nor an XDP program: it drops frames "
                "that are redirected into it",
                f"ethtool -K {name} gro on, there",
                choice,
            )

    def _stop(self, kind: str, what: str, remedy: str, choice: Choice | None = None) -> None:
        found = Obstacle(kind, what, remedy, choice.name if choice is not None else "")
        if not any(replace(one, backend="") == replace(found, backend="") for one in self.answer.obstacles):
            self.answer.obstacles.append(found)

    def _name(self, pool: int) -> str:
        known = self.pools.get(pool)
        return known.service if known is not None else "a service that no object wants any more"


def _direct(answer: Explanation, source: Source, address: Address) -> None:
    """No service takes it: where the source's own routes lead."""
    answer.outcome = "direct"
    place = source.netns if source.namespace_known else None
    with net.inside(place):
        route = net.route_to(address)
    if route.kind == "unreachable":
        answer.obstacles.append(
            Obstacle("no_route", f"{source.name} has no route to {address}", f"ip route get {address}")
        )
    elif route.kind == "local":
        answer.why.append(f"{address} is its own")
    else:
        hop = f"{route.gateway} on {route.interface}" if route.gateway else route.interface
        answer.why.append(f"it goes to {address} itself, by {hop}")


# -- what the programs compute


def flow_hash(client: bytes, port: int, destination: Destination) -> int:
    """`flow_hash` of select.h: which slot a packet of this flow has, before it is brought to the table's size."""
    digest = _mix_words(HASH_SEED, client)
    digest = _mix_words(digest, packed(destination.address))
    ports = _swapped(port) << 16 | _swapped(destination.port)
    return _mix(digest ^ (ports << 32 | PROTOCOLS[destination.protocol])) & 0xFFFFFFFF


def _mix(value: int) -> int:
    value ^= value >> 30
    value = value * 0xBF58476D1CE4E5B9 & _MASK
    value ^= value >> 27
    value = value * 0x94D049BB133111EB & _MASK
    return value ^ value >> 31


def _mix_words(digest: int, address: bytes) -> int:
    words = [int.from_bytes(address[at : at + 4], "little") for at in range(0, 16, 4)]
    digest = _mix(digest ^ (words[0] << 32 | words[1]))
    return _mix(digest ^ (words[2] << 32 | words[3]))


def _swapped(port: int) -> int:
    return int.from_bytes(port.to_bytes(2, "big"), "little")


def _slot(row: ServiceRow, digest: int) -> int:
    return digest % row.table_size if row.flags & SERVICE_MODULO else digest * row.table_size >> 32


def _netns_words(cookie: int) -> bytes:
    return (cookie >> 32).to_bytes(4, "little") + (cookie & 0xFFFFFFFF).to_bytes(4, "little")


# -- the machine


def processes_outside(namespace: int, group: str) -> list[tuple[int, str, str]]:
    """The processes of a network namespace (by its number) that are not in a cgroup or below it: number, name, cgroup."""
    found: list[tuple[int, str, str]] = []
    if not group:
        return found  # everybody is below the root
    for name in os.listdir("/proc"):
        if not name.isdecimal() or int(name) == os.getpid():
            continue
        try:
            if os.stat(f"/proc/{name}/ns/net").st_ino != namespace:
                continue
            place = net.cgroups.of(int(name))
            words = Path(f"/proc/{name}/comm").read_text().strip()
        except (OSError, net.NetworkError):
            continue
        if place != group and not place.startswith(f"{group}/"):
            found.append((int(name), words, place))
    return found


def veth_peer(interface: str, node: NodeName) -> tuple[str, str, bool] | None:
    """The other end of a veth of the calling thread's namespace: where it is, its name, whether it takes redirected frames.

    None where the interface is none, or its other end cannot be told for certain.
    """
    mine = net.link_numbers(interface)
    if not mine or not mine["iflink"] or mine["netns"] < 0:
        return None
    if node.lab is not None:
        places = [NETNS / name for name in net.list_names(lab_netns_prefix(node.lab))]
    else:
        places = [Path("/proc/1/ns/net"), *(NETNS / name for name in net.list_names())]
    for place in places:
        try:
            if net.id_here(place) != mine["netns"]:
                continue
            with net.inside(place):
                for one in net.interfaces():
                    if one.index == mine["iflink"] and one.kind == "veth":
                        takes = net.offloads(one.name).gro or bool(net.link_numbers(one.name)["xdp"])
                        return place.name, one.name, takes
        except (net.NetworkError, OSError):
            continue
    return None


def _mtu(interface: str) -> int | None:
    return next((one.mtu for one in net.interfaces() if one.name == interface), None)


def _sysctl(path: Path) -> int | None:
    try:
        return int(path.read_text())
    except (OSError, ValueError):
        return None


def _at(address: Address, port: int) -> str:
    return f"[{address}]:{port}" if address.version == 6 else f"{address}:{port}"


def shares(backends: Iterable[Choice]) -> dict[str, float]:
    """The share of each backend by its name."""
    found: dict[str, float] = {}
    for one in backends:
        found[one.name] = found.get(one.name, 0.0) + one.share
    return found
