"""The lab's network: namespaces, the fabric between them, addresses and routes (a picture is in
docs/design.md).

Every interface is made inside the lab's namespaces, with a number chosen here: ``lo`` is 1, a member's
``eth0`` and the fabric's ``br0`` are 2. So all of a namespace's changes can be written down before the first
is made, sent in one go, and what is the same for many members is encoded once.

The next hop of every route is on the link (``onlink``): members have addresses as /32 and /128 and no network
of their own. What no route names is unreachable at the fabric, at once.
"""

from __future__ import annotations

import hashlib
import os
import socket
from collections.abc import Callable, Iterable, Iterator, Sequence
from contextlib import ExitStack, contextmanager
from ipaddress import ip_address, ip_network

from hookline import net
from hookline.lab._plan import Family, Member, Plan
from hookline.model.names import Address, fabric_netns
from hookline.net import Change, Netlink

LOOPBACK, UPLINK, BRIDGE = 1, 2, 2
UPLINK_NAME, BRIDGE_NAME = "eth0", "br0"
FABRIC_ADDRESSES: dict[Family, Address] = {4: ip_address("169.254.0.1"), 6: ip_address("fe80::1")}
"""The router's addresses on the fabric: members' default route goes there."""
FABRIC_SOURCE = ip_address("fd00:169:254::1")
"""From where the router sends ICMPv6 errors: a link-local address would not be forwarded to pods."""
POD_GATEWAYS: dict[Family, Address] = {4: ip_address("169.254.1.1"), 6: ip_address("fe80::1")}
"""The node's addresses at its end of every pod's link."""

_EVERYTHING = {4: ip_network("0.0.0.0/0"), 6: ip_network("::/0")}
_FIRST_PORT = 10
_ENDS_AND_ROUTERS = {
    "ipv4/conf/{}/rp_filter": 0,
    "ipv4/conf/{}/send_redirects": 0,
    "ipv4/conf/{}/accept_redirects": 0,
}
_ENDS_AND_ROUTERS_6 = {
    "ipv6/conf/{}/disable_ipv6": 0,
    "ipv6/conf/{}/accept_dad": 0,
    "ipv6/conf/{}/accept_ra": 0,
    "ipv6/conf/{}/accept_redirects": 0,
}
_ENDS = {
    # A service's address on the loopback (direct server return) is neither answered for nor asked from.
    "ipv4/conf/{}/arp_ignore": 1,
    "ipv4/conf/{}/arp_announce": 2,
}


def host_end(endpoint: str) -> str:
    """The name of the other end of a member's link, in its node or in the fabric: ``hl`` and 8 hex digits."""
    return "hl" + hashlib.sha256(endpoint.encode()).hexdigest()[:8]


def build(plan: Plan, progress: Callable[[int, int], None] = lambda done, total: None) -> None:
    """Make the whole network of a lab.

    Args:
        plan: Who there is.
        progress: Told after every namespace how many of how many there are.

    Raises:
        NetworkError: The kernel refused something. What was made stays, for `remove`.
    """
    _make_namespace(fabric_netns(plan.lab).name, plan.families, router=True)
    for done, member in enumerate(plan.members, 2):
        _make_namespace(member.netns.name, plan.families, router=member.kind == "node")
        progress(done, len(plan.members) + 1)
    uplinked = (*plan.nodes, *plan.externals)
    _connect_to_fabric(plan, uplinked)
    for member in uplinked:
        with Netlink(member.netns) as netlink:
            netlink.apply(_uplink_changes(plan, member))
    for node in plan.nodes:
        connect_pods(plan, node, [pod for pod in plan.pods if pod.node == node.name])
    with Netlink(fabric_netns(plan.lab)) as netlink:
        netlink.apply(_fabric_changes(plan))


def add_pod(plan: Plan, pod: Member, before_up: Callable[[], None] = lambda: None) -> None:
    """Add a pod to a lab that is there; ``plan`` has the pod already.

    Args:
        plan: Who there is.
        pod: Who is added.
        before_up: Called when the node has its end of the pod's link with all routes, and the pod's own end is down yet.
    """
    node = _node_of(plan, pod)
    _make_namespace(pod.netns.name, plan.families, router=False)
    connect_pods(plan, node, [pod], before_up)
    for member in (*plan.nodes, *plan.externals):
        if member is not node:
            with Netlink(member.netns) as netlink:
                netlink.apply(_routes_via_node(pod, node, UPLINK, source=member))
    with Netlink(fabric_netns(plan.lab)) as netlink:
        netlink.apply(_routes_via_node(pod, node, BRIDGE))


def remove_pod(plan: Plan, pod: Member) -> None:
    """Remove a pod and every route to it, from a lab that stays."""
    node = _node_of(plan, pod)
    forget = [net.delete_route(ip_network(address)) for address in pod.addresses]
    for namespace in (fabric_netns(plan.lab), *(member.netns for member in (*plan.nodes, *plan.externals))):
        with Netlink(namespace) as netlink:
            netlink.apply(forget)
    with net.inside(node.netns):
        indexes = {name: index for index, name in socket.if_nameindex()}
        if index := indexes.get(host_end(pod.endpoint)):
            with Netlink() as netlink:
                netlink.apply([net.delete_link(index)])
    net.delete(pod.netns.name)


def connect_pods(
    plan: Plan, node: Member, pods: Sequence[Member], before_up: Callable[[], None] = lambda: None
) -> None:
    """Join pods to their node: both ends of their links, addresses and routes. The pods' ends come up last."""
    if not pods:
        return
    with net.inside(node.netns):
        first = max((_FIRST_PORT - 1, *(index for index, _ in socket.if_nameindex()))) + 1
    indexes = dict(enumerate(pods, first))
    with Netlink(node.netns) as netlink:
        with _descriptors(pods) as descriptors:
            netlink.apply(
                net.add_veth(host_end(pod.endpoint), index, UPLINK_NAME, UPLINK, descriptor)
                for (index, pod), descriptor in zip(indexes.items(), descriptors, strict=True)
            )
        with net.inside(node.netns):
            for pod in pods:
                net.set_offloads(host_end(pod.endpoint), gro=True, tx_checksum=False)
        for index, pod in indexes.items():
            netlink.apply(_pod_port_changes(plan, node, pod, index))
    before_up()
    for pod in pods:
        with net.inside(pod.netns):
            net.set_offloads(UPLINK_NAME, gro=True, tx_checksum=False)
            with Netlink() as inner:
                inner.apply(_pod_changes(plan, pod))


def _connect_to_fabric(plan: Plan, members: Sequence[Member]) -> None:
    """Join nodes and external hosts to the fabric's bridge; interfaces only."""
    indexes = dict(enumerate(members, _FIRST_PORT))
    with Netlink(fabric_netns(plan.lab)) as netlink, _descriptors(members) as descriptors:
        netlink.apply([net.add_bridge(BRIDGE_NAME, BRIDGE)])
        netlink.apply(
            net.add_veth(host_end(member.endpoint), index, UPLINK_NAME, UPLINK, descriptor)
            for (index, member), descriptor in zip(indexes.items(), descriptors, strict=True)
        )
        with net.inside(fabric_netns(plan.lab)):
            for member in members:
                net.set_offloads(host_end(member.endpoint), gro=True, tx_checksum=False)
        for member in members:
            with net.inside(member.netns):
                net.set_offloads(UPLINK_NAME, gro=True, tx_checksum=False)
        netlink.apply(net.set_up(index, master=BRIDGE) for index in indexes)


def _fabric_changes(plan: Plan) -> Iterator[Change]:
    yield net.set_up(BRIDGE)
    for family in plan.families:
        yield net.add_address(BRIDGE, FABRIC_ADDRESSES[family], 64 if family == 6 else None, link_scope=True)
        yield net.add_route(_EVERYTHING[family])
    if 6 in plan.families:
        yield net.add_address(BRIDGE, FABRIC_SOURCE)
    for member in (*plan.nodes, *plan.externals):
        for address in member.addresses:
            yield net.add_route(ip_network(address), BRIDGE)
    for pod in plan.pods:
        yield from _routes_via_node(pod, _node_of(plan, pod), BRIDGE)


def _uplink_changes(plan: Plan, member: Member) -> Iterator[Change]:
    """Addresses and routes of a node or external host, but for the node's own pods."""
    yield net.set_up(UPLINK)
    for address in member.addresses:
        yield net.add_address(UPLINK, address)
    for family in plan.families:
        source = member.address(family)
        yield net.add_route(_EVERYTHING[family], UPLINK, via=FABRIC_ADDRESSES[family], source=source)
    for other in (*plan.nodes, *plan.externals):
        if other is not member:
            for address in other.addresses:
                yield net.add_route(ip_network(address), UPLINK, source=member.address(address.version))
    for pod in plan.pods:
        node = _node_of(plan, pod)
        if node is not member:
            yield from _routes_via_node(pod, node, UPLINK, source=member)


def _pod_changes(plan: Plan, pod: Member) -> Iterator[Change]:
    yield net.set_up(UPLINK)
    for address in pod.addresses:
        yield net.add_address(UPLINK, address)
    for family in plan.families:
        yield net.add_route(_EVERYTHING[family], UPLINK, via=POD_GATEWAYS[family], source=pod.address(family))


def _pod_port_changes(plan: Plan, node: Member, pod: Member, index: int) -> Iterator[Change]:
    yield net.set_up(index)
    for family in plan.families:
        yield net.add_address(index, POD_GATEWAYS[family], 64 if family == 6 else None, link_scope=True)
    for address in pod.addresses:
        yield net.add_route(ip_network(address), index, source=node.address(address.version))


def _routes_via_node(
    pod: Member, node: Member, interface: int, *, source: Member | None = None
) -> list[Change]:
    return [
        net.add_route(
            ip_network(address),
            interface,
            via=node.address(address.version),
            source=source.address(address.version) if source else None,
        )
        for address in pod.addresses
    ]


def _node_of(plan: Plan, pod: Member) -> Member:
    return next(node for node in plan.nodes if node.name == pod.node)


def _make_namespace(name: str, families: Iterable[Family], *, router: bool) -> None:
    with net.inside(net.create(name)):
        net.write_sysctls(_settings(families, router))
        with Netlink() as netlink:
            netlink.apply([net.set_up(LOOPBACK)])


def _settings(families: Iterable[Family], router: bool) -> dict[str, int]:
    settings: dict[str, int] = {}
    per_interface = dict(_ENDS_AND_ROUTERS)
    if router:
        settings |= {"ipv4/ip_forward": 1, "ipv4/icmp_ratelimit": 0}  # forwarding first: it resets the others
    else:
        per_interface |= _ENDS
        settings |= {"ipv4/tcp_tw_reuse": 1}  # a client may open connections faster than they are forgotten
    if 6 in families:
        per_interface |= _ENDS_AND_ROUTERS_6
        if router:
            settings |= {"ipv6/conf/all/forwarding": 1, "ipv6/icmp/ratelimit": 0}
    for setting, value in per_interface.items():
        for which in ("all", "default"):
            settings[setting.format(which)] = value
    return settings


@contextmanager
def _descriptors(members: Sequence[Member]) -> Iterator[list[int]]:
    """The members' namespaces as open descriptors."""
    with ExitStack() as stack:
        opened = []
        for member in members:
            descriptor = os.open(member.netns, os.O_RDONLY | os.O_CLOEXEC)
            stack.callback(os.close, descriptor)
            opened.append(descriptor)
        yield opened
