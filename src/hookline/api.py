"""What a person does with nodes and labs, from Python as from the command line.

    with hookline.Node("lab/demo") as node:
        node.apply("service.yaml")
        for pool in node.services():
            print(pool.pool.service, pool.connections)

This is where nodes and labs meet: `hookline.control` knows nodes and no labs, `hookline.lab` knows labs and nothing of what
runs on their nodes. `Node` announces its services on its lab's network; `lab_up` and `refresh_lab` tell every node of a lab
which pods and machines there are.
"""

from __future__ import annotations

import os
from collections.abc import Callable, Iterable, Mapping
from dataclasses import replace
from ipaddress import IPv4Address, IPv6Address
from typing import TYPE_CHECKING, Any, Union

from hookline import control, lab
from hookline.control import Recovery
from hookline.errors import HooklineError
from hookline.lab import Lab, LabError
from hookline.model import HostPolicy, NetworkPolicy, NodeConfig, Pod, Resource, parse
from hookline.model.names import NodeName

if TYPE_CHECKING:
    from hookline.agent import RemoteNode

Address = IPv4Address | IPv6Address
PathLike = str | os.PathLike[str]
AnyNode = Union["Node", "RemoteNode"]
"""A node, worked on by this process or by its agent: the same calls."""

__all__ = [
    "AnyNode",
    "Node",
    "add_pod",
    "lab_down",
    "lab_up",
    "open_node",
    "refresh_lab",
    "selected_elsewhere",
]

OWNER = "lab"
"""What owns the objects that a lab's nodes have from their lab."""


class Node(control.Node):
    """A node: this machine (``host``), a lab's (``lab/LAB/NODE``) or a lab's first (``lab/LAB``).

    What it holds of the kernel is pinned there: closing it, or the end of the process, takes nothing away.

    Args:
        name: The node's name.

    Raises:
        model.names.InvalidName: The name is none.
        lab.LabError: There is no such lab, or it has no such node.
    """

    def __init__(self, name: str | NodeName = "host") -> None:
        resolved = name if isinstance(name, NodeName) else lab.resolve_node(name)
        if resolved.lab is None:
            super().__init__(resolved)
            return
        self._lab = Lab.open(resolved.lab)
        self._lab.member(f"node/{resolved.node}")
        super().__init__(resolved, before_change=self._refuse_taken, on_change=self._announce)

    def recover(self, *, drop_unclaimed: bool = False) -> Recovery:
        """As `control.Node.recover`; a lab tells its node again who is there, which a lost state does not know."""
        found = super().recover()
        if found.lost and self.name.lab is not None:
            self.apply(self._lab.resources(), owner=OWNER)
        if found.lost and drop_unclaimed:
            super().recover(drop_unclaimed=True)
        return replace(found, unclaimed=self.check_state().unclaimed)

    def _refuse_taken(self, _: control.Node, addresses: frozenset[Address]) -> None:
        """Refuses services on another member's address: the lab's network would have two ways to it."""
        self._lab.refresh()
        for member in self._lab.members:
            if member.endpoint == f"node/{self.name.node}":
                continue
            for address in addresses & set(member.addresses):
                raise LabError(
                    f"no service on node {self.name} can have the address {address}",
                    why=f"it is the address of {member.endpoint}",
                    remedy="give the service an address of its own",
                )

    def _announce(self, _: control.Node) -> None:
        """Has the lab's network bring the node its services' packets; ``dsr`` backends get the addresses."""
        own = self._lab.member(f"node/{self.name.node}").addresses
        self._lab.announce(
            self.name.node,
            {
                address: {"backends": backends, "loopback": bool(backends)}
                for address, backends in self.service_addresses().items()
                if address not in own
            },
        )


def open_node(
    name: str | NodeName = "host",
    *,
    before_direct: Callable[[], None] = lambda: None,
    on_hang: Callable[[HooklineError], None] | None = None,
) -> Node | RemoteNode:
    """A node by its agent where one answers, else directly. Close it, or use it as a context manager.

    Args:
        name: The node's name.
        before_direct: Called before the node is worked on directly; may refuse by raising.
        on_hang: For those who only read: told that the agent is there and does not answer, after which the node is read
            directly. Without it that is an error, as a change must not pass by an agent that may go on.

    Raises:
        model.names.InvalidName: The name is none.
        lab.LabError: There is no such lab, or it has no such node.
        agent.AgentHangs: The agent is there and does not answer, and ``on_hang`` is not given.
        agent.AgentError: The agent that answers is of another version, or keeps its state elsewhere.
    """
    resolved = name if isinstance(name, NodeName) else lab.resolve_node(name)
    if resolved.agent_socket.exists():
        from hookline.agent import AgentHangs, connect  # the HTTP client is for those who have an agent

        try:
            remote = connect(resolved, reading=on_hang is not None)
        except AgentHangs as error:
            if on_hang is None:
                raise
            on_hang(error)
            remote = None
        if remote is not None:
            return remote
    before_direct()
    return Node(resolved)


def lab_up(
    what: PathLike | Iterable[PathLike | Resource],
    name: str = "lab",
    *,
    say: Callable[[str], None] = lambda line: None,
    progress: Callable[[int, int], None] = lambda done, total: None,
) -> Lab:
    """Makes a lab, tells its nodes who is there, and applies what else the files hold.

    Every node gets the lab's Namespaces, Nodes, Pods and ExternalHosts, owned by the lab, so that selectors find pods. A
    NodeConfig is applied to the node of its name, policies (`NetworkPolicy`, `HostPolicy`) to every node, as a cluster has them,
    all other kinds to the first node: as if ``apply`` had read them from the same file.

    Args:
        what: Files, folders or resources.
        name: The lab's.
        say: Told, a line at a time, what the user ought to know.
        progress: Told after every network namespace how many of how many there are.

    Raises:
        model.InvalidResource: A document is wrong; nothing was made.
        LabError: It cannot be a lab, or there is one of that name; nothing was made.
        HooklineError: The kernel refused something; what was made is gone again.
    """
    resources = control.load(what)
    mine = [resource for resource in resources if isinstance(resource, lab.LAB_KINDS)]
    others = [resource for resource in resources if not isinstance(resource, lab.LAB_KINDS)]
    made = lab.up(mine, name, say=say, progress=progress)
    try:
        for member in made.nodes:
            with Node(NodeName(name, member.name)) as node:
                node.apply(made.resources(), owner=OWNER)
        for node_name, given in _by_node(made, others, say).items():
            with Node(node_name) as node:
                for warning in node.apply(given).plan.warnings:
                    say(warning)
    except BaseException:
        lab.down(name)
        raise
    return made


def lab_down(name: str = "lab") -> None:
    """Removes a lab, with the programs, the state and everything else of its nodes.

    Raises:
        LabError: There is no such lab, or another process is changing it.
    """
    lab.down(name)


def add_pod(place: Lab, pod: Resource | Mapping[str, Any]) -> tuple[Resource, ...]:
    """Adds a pod to a lab and tells the nodes: policies are in force for it before it can send or be sent anything.

    It is not ready for services before its servers listen.

    Returns:
        All of the lab's resources, the new one with its addresses.

    Raises:
        LabError: The name or address is taken, or the node is not there; nothing was changed.
        ControlError: A node refuses, for example for want of room in a map; the lab is as it was.
    """

    def tell(resources: Iterable[Resource]) -> None:
        # Not the nodes of this module: they would announce services on the lab's network, which is being changed.
        for member in place.nodes:
            with control.Node(NodeName(place.name, member.name)) as node:
                node.apply(resources, owner=OWNER)

    before = place.resources()

    def announce(resources: Iterable[Resource]) -> None:
        # Policies are for it from now on; services send it nobody before it has a server.
        known = {one.reference for one in before}
        tell([one if one.reference in known else _unready(one) for one in resources])

    try:
        place.add_pod(pod, before_up=announce)
    except BaseException:
        place.refresh()
        if place.resources() == before:
            tell(before)
        raise
    return refresh_lab(place.name).resources()


def _unready(pod: Resource) -> Resource:
    document = pod.to_document()
    status = document.setdefault("status", {})
    others = [one for one in status.get("conditions", ()) if one.get("type") != "Ready"]
    status["conditions"] = [*others, {"type": "Ready", "status": "False"}]
    return parse(document, pod.origin)


def refresh_lab(name: str = "lab") -> Lab:
    """Tells the nodes of a lab which pods it has now, after `Lab.add_pod` or `Lab.remove_pod`; services follow.

    Raises:
        LabError: There is no such lab.
        ControlError: A node refuses, for example for want of room in a map.
    """
    found = Lab.open(name)
    for member in found.nodes:
        with Node(NodeName(name, member.name)) as node:
            node.apply(found.resources(), owner=OWNER)
    return found


def selected_elsewhere(node: AnyNode, references: Iterable[str]) -> Mapping[str, list[str]]:
    """The pods on other nodes of a lab that these policies of one node select; this node does nothing for them.

    Args:
        node: A lab's; any other has no neighbours that this machine knows.
        references: Of objects that the node has; what is no `NetworkPolicy` is passed over.

    Returns:
        ``NAMESPACE/POD on NODE`` by reference, for policies that select any.
    """
    from hookline.policy import selects

    if node.name.lab is None:
        return {}
    resources = node.resources()
    wanted = set(references)
    pods = [
        one
        for one in resources
        if isinstance(one, Pod)
        and not (one.has_ended or one.spec.host_network)
        and one.spec.node_name != node.name.node
    ]
    found = {}
    for one in resources:
        if isinstance(one, NetworkPolicy) and one.reference in wanted:
            there = [
                f"{pod.namespace}/{pod.name} on {pod.spec.node_name}"
                for pod in pods
                if pod.namespace == one.namespace and selects(one.spec.pod_selector, pod.labels)
            ]
            if there:
                found[one.reference] = there
    return found


def _by_node(
    made: Lab, resources: Iterable[Resource], say: Callable[[str], None]
) -> Mapping[NodeName, list[Resource]]:
    names = {member.name for member in made.nodes}
    found: dict[NodeName, list[Resource]] = {}
    for resource in resources:
        if isinstance(resource, NetworkPolicy | HostPolicy):
            for name in sorted(names):
                found.setdefault(NodeName(made.name, name), []).append(resource)
        elif not isinstance(resource, NodeConfig):
            found.setdefault(made.first_node, []).append(resource)
        elif resource.name in names:
            found.setdefault(NodeName(made.name, resource.name), []).append(resource)
        else:
            say(f"{resource.reference} is passed over: the lab's nodes are {', '.join(sorted(names))}")
    return found
