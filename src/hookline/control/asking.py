"""Who asks and for what: endpoints as they are typed, found among a node's objects."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from ipaddress import IPv4Address, IPv6Address
from pathlib import Path
from typing import Literal, cast

from hookline import net
from hookline.control._errors import ControlError, NotThere
from hookline.control.explain import Destination, Source
from hookline.control.pools import Pool
from hookline.model import ExternalHost, Node, Pod, Resource
from hookline.model.names import Endpoint, NodeName, node_netns, pod_netns

Address = IPv4Address | IPv6Address


def who_asks(
    endpoint: Endpoint, node: NodeName, names: frozenset[str], resources: Iterable[Resource], group: str
) -> Source:
    """The source of a connection. Called in the node's network namespace.

    Args:
        endpoint: As it was typed.
        node: Whose tables decide.
        names: What documents call that node.
        resources: Its wanted objects.
        group: The cgroup of its processes, relative to the mount.

    Raises:
        NotThere: There is none of that name.
    """
    name = endpoint.member
    if endpoint.kind == "node" and endpoint.name in names | {node.node}:
        place = node_netns(node.lab, endpoint.name) if node.lab is not None else None
        addresses = tuple(one.ip for interface in net.interfaces() for one in interface.addresses)
        usable = [one for one in addresses if not (one.is_loopback or one.is_link_local)]
        return Source(name, True, tuple(usable), place, True, endpoint.port)
    for resource in resources:
        if isinstance(resource, Pod):
            mine = (
                endpoint.address in resource.addresses
                if endpoint.address is not None
                else (
                    endpoint.kind == "pod"
                    and (resource.namespace, resource.name) == (endpoint.namespace, endpoint.name)
                )
            )
            if mine:
                here = resource.spec.node_name in names | {node.node, ""}
                place = _namespace_of(resource, node, group) if here else None
                shown = f"{resource.namespace}/{resource.name}"
                return Source(shown, here, resource.addresses, place, place is not None, endpoint.port)
        elif (
            isinstance(resource, ExternalHost)
            and endpoint.kind == "external"
            and resource.name == endpoint.name
        ):
            return Source(name, False, tuple(resource.addresses), port=endpoint.port)
        elif isinstance(resource, Node) and endpoint.kind == "node" and resource.name == endpoint.name:
            return Source(name, False, resource.addresses, port=endpoint.port)
    if endpoint.address is not None:
        return Source(name, False, (endpoint.address,), port=endpoint.port)
    raise NotThere(
        f"node {node} knows no {name}",
        why="none of its objects is called so",
        remedy="hookline get all names them; an address will do, too",
    )


def _namespace_of(pod: Pod, node: NodeName, group: str) -> Path | None:
    if node.lab is not None:
        return pod_netns(node.lab, pod.namespace, pod.name)
    seen: set[int] = {net.own_number()}
    for number in net.cgroups.processes(group):
        place = Path(f"/proc/{number}/ns/net")
        try:
            inode = place.stat().st_ino
            if inode in seen:
                continue
            seen.add(inode)
            with net.inside(place):
                if any(map(net.has_address, pod.addresses)):
                    return place
        except (OSError, net.NetworkError):
            continue
    return None


def asked_for(
    endpoint: Endpoint,
    pools: Sequence[Pool],
    resources: Iterable[Resource],
    source: Source,
    family: int | None,
    node: NodeName,
) -> Destination:
    """The target of a connection: a service by its name, else a pod, or an address.

    Raises:
        NotThere: There is none of that name, or not in a family that the source has.
        ControlError: No port was given.
    """
    if endpoint.port is None:
        raise ControlError(
            f"which port of {endpoint}?", why="none was given", remedy=f"say {endpoint}:PORT[/udp]"
        )
    protocol = cast(Literal["TCP", "UDP", "SCTP"], endpoint.protocol.upper())
    has = {one.version for one in source.addresses} or {4, 6}
    if endpoint.address is not None:
        asked_version = endpoint.address.version
        if asked_version not in has:
            raise NotThere(
                f"{source.name} has no IPv{asked_version} address to ask {endpoint.address} from",
                why=f"it has {', '.join(map(str, source.addresses))}",
                remedy="ask for an address of the same family",
            )
        if family not in (None, asked_version):
            raise ControlError(
                f"{endpoint.address} is no IPv{family} address",
                why=f"--family {family} was given",
                remedy="leave --family out",
            )
        return Destination(str(endpoint), endpoint.address, endpoint.port, protocol)
    name = f"{endpoint.namespace}/{endpoint.name}"
    mine = [pool for pool in pools if pool.service.partition("/")[2] == name and endpoint.kind == "pod"]
    found: dict[Address, str] = {}
    for pool in mine:
        for frontend in pool.frontends:
            found.setdefault(frontend.address, pool.service)
    # The addresses that have this very port first.
    exact = [
        frontend.address
        for pool in mine
        for frontend in pool.frontends
        if (frontend.port, frontend.protocol) == (endpoint.port, protocol)
    ]
    for resource in resources:
        if not mine and isinstance(resource, Pod) and f"{resource.namespace}/{resource.name}" == name:
            found |= dict.fromkeys(resource.addresses, "")
    if not found:
        raise NotThere(
            f"there is no service {endpoint.member}",
            why="no object of this node has addresses under that name",
            remedy=f"hookline get all --node {node} names Services and VirtualServices; an address will do, too",
        )
    versions = [family] if family else [4, 6]
    for version in versions:
        for address in (*exact, *found):
            if address.version == version and version in has:
                return Destination(str(endpoint), address, endpoint.port, protocol, found[address])
    raise NotThere(
        f"{endpoint.member} and {source.name} have no IP{f'v{family}' if family else ''} address each",
        why=f"{endpoint.member} has {', '.join(map(str, found))}",
        remedy="leave --family out" if family else "ask from one that has an address of the same family",
    )
