"""Names of nodes, labs and endpoints, and the places that follow from them.

A node is ``host``, ``lab/LAB`` or ``lab/LAB/NODE``; from its name follow where its programs are pinned,
where its wanted state is kept, which network namespace it is and which cgroup its processes are in. An
endpoint is what a person types to say who talks to whom: a pod, a machine outside, a node or an address, with a port or without.

Nothing here touches the machine; only the environment variable ``HOOKLINE_STATE`` is read.
"""

from __future__ import annotations

import os
import re
from dataclasses import dataclass, replace
from ipaddress import IPv4Address, IPv6Address, ip_address
from pathlib import Path
from typing import ClassVar, Literal, TypeAlias, cast, get_args

from hookline.errors import HooklineError

Address: TypeAlias = IPv4Address | IPv6Address
Protocol: TypeAlias = Literal["tcp", "udp", "sctp"]
EndpointKind: TypeAlias = Literal["pod", "external", "node", "address"]

DEFAULT_NAMESPACE = "default"
DEFAULT_LAB = "lab"
FIRST_NODE = "node-1"
RESERVED_NAMESPACES = frozenset({"external", "node"})
"""What may stand before the slash of an endpoint beside a namespace, and so cannot be a namespace's name."""

BPFFS = Path("/sys/fs/bpf/hookline")
STATE = Path("/var/lib/hookline")
RUN = Path("/run/hookline")
NETNS = Path("/run/netns")

_LAB = re.compile(r"[a-z0-9-]{1,32}")
_OBJECT = re.compile(r"[A-Za-z0-9_][A-Za-z0-9_-]{0,62}")
_LABEL = re.compile(r"[a-z0-9]([-a-z0-9]{0,61}[a-z0-9])?")
_SUBDOMAIN = re.compile(r"[a-z0-9]([-a-z0-9.]*[a-z0-9])?")
_PORT = re.compile(r"(?P<host>.*):(?P<port>[^:/\]]*)(/(?P<protocol>[^/]*))?")
_LONGEST_FILE_NAME = 255


class InvalidName(HooklineError):  # noqa: N818
    """A name of a lab, node or endpoint that is not one. Exit status 2: it came from a command line."""

    exit_status: ClassVar[int] = 2


def check_loaded_name(name: str) -> str:
    """Return ``name`` if it can be that of an object that a user loads.

    Raises:
        InvalidName: It is not 1 to 63 letters, digits, hyphens and underscores, or begins with a hyphen.
    """
    if not _OBJECT.fullmatch(name):
        raise InvalidName(
            f"{name!r} cannot be an object's name",
            why="it is 1 to 63 letters, digits, hyphens and underscores, and does not begin with a hyphen",
            remedy="give it another: --name counter",
        )
    return name


def check_lab_name(name: str) -> str:
    """Return ``name`` if it can be a lab's.

    Raises:
        InvalidName: It is not 1 to 32 of ``a-z``, ``0-9`` and ``-``.
    """
    if not _LAB.fullmatch(name):
        raise InvalidName(
            f"{name!r} is not a lab's name",
            why="a lab's name is 1 to 32 lower-case letters, digits and hyphens",
            remedy="for example: --name demo",
        )
    return name


def state_root() -> Path:
    """The folder that holds every node's wanted state: ``HOOKLINE_STATE``, else ``/var/lib/hookline``."""
    return Path(os.environ.get("HOOKLINE_STATE") or STATE)


@dataclass(frozen=True, slots=True)
class NodeName:
    """A node's name: this machine (``lab`` is None), or one node of a lab."""

    lab: str | None = None
    node: str = "host"

    @classmethod
    def parse(cls, text: str, *, first_node: str = FIRST_NODE) -> NodeName:
        """Read ``host``, ``lab/LAB`` or ``lab/LAB/NODE``.

        Args:
            text: What was typed.
            first_node: The node that ``lab/LAB`` stands for (``hookline.lab.resolve_node`` knows).

        Raises:
            InvalidName: None of the three forms.
        """
        match text.split("/"):
            case ["host"]:
                return cls()
            case ["lab", lab]:
                return cls(check_lab_name(lab), check_object_name(first_node, "node"))
            case ["lab", lab, node]:
                return cls(check_lab_name(lab), check_object_name(node, "node"))
        raise InvalidName(
            f"{text!r} is not a node's name",
            why="a node is host, lab/LAB or lab/LAB/NODE",
            remedy="hookline lab list shows the labs and their nodes",
        )

    @property
    def pins(self) -> Path:
        """The folder of this node's pins: ``…/host`` or ``…/lab/LAB/NODE`` (bpffs refuses dots: ``_``)."""
        if self.lab is None:
            return BPFFS / self.node
        return lab_pins(self.lab) / self.node.replace(".", "_")

    @property
    def state_dir(self) -> Path:
        """The folder of this node's wanted state: ``…/host`` or ``…/lab/LAB/NODE``."""
        if self.lab is None:
            return state_root() / self.node
        return lab_state_dir(self.lab) / self.node

    @property
    def run_dir(self) -> Path:
        """The folder of what runs for this node, its agent: ``…/host`` or, in the lab's own, ``…/nodes/NODE``."""
        if self.lab is None:
            return RUN / self.node
        return lab_run_dir(self.lab) / "nodes" / self.node

    @property
    def agent_socket(self) -> Path:
        """Where this node's agent answers."""
        return self.run_dir / "agent.sock"

    @property
    def netns(self) -> Path | None:
        """The node's network namespace; None for the host: the one that the command runs in."""
        return None if self.lab is None else node_netns(self.lab, self.node)

    @property
    def cgroup(self) -> str:
        """The cgroup that holds this node's processes, relative to the cgroup2 mount: "" (its root) for the host."""
        return "" if self.lab is None else node_cgroup(self.lab, self.node)

    def __str__(self) -> str:
        return self.node if self.lab is None else f"lab/{self.lab}/{self.node}"


def lab_pins(lab: str) -> Path:
    """The folder that holds the pins of all nodes of a lab."""
    return BPFFS / "lab" / check_lab_name(lab)


def lab_cgroup(lab: str) -> str:
    """The cgroup that holds those of a lab's nodes, relative to the cgroup2 mount."""
    return f"hookline/{check_lab_name(lab)}"


def node_cgroup(lab: str, node: str) -> str:
    """The cgroup of a lab's node: ``hookline/LAB/NODE`` (no dots, since ``cgroup.procs`` is no name for a group)."""
    return f"{lab_cgroup(lab)}/{node.replace('.', '_')}"


def node_processes_cgroup(lab: str, node: str) -> str:
    """The cgroup of the processes that run on a lab's node itself, beside its pods."""
    return f"{node_cgroup(lab, node)}/host"


def pod_cgroup(lab: str, node: str, namespace: str, pod: str) -> str:
    """The cgroup of a pod's processes, below that of its node."""
    return f"{node_cgroup(lab, node)}/pods/{namespace}_{pod}"


def lab_state_dir(lab: str) -> Path:
    """The folder that holds the wanted state of all nodes of a lab."""
    return state_root() / "lab" / check_lab_name(lab)


def labs_run_dir() -> Path:
    """The folder that holds one folder per lab that is up."""
    return RUN / "labs"


def lab_run_dir(lab: str) -> Path:
    """The folder of a lab's own files: ``lab.json``, ``resources.json``, the server's socket and log."""
    return labs_run_dir() / check_lab_name(lab)


def node_netns(lab: str, node: str) -> Path:
    """The network namespace of a lab's node."""
    return _netns(lab, "node", node)


def pod_netns(lab: str, namespace: str, pod: str) -> Path:
    """The network namespace of a lab's pod."""
    return _netns(lab, "pod", namespace, pod)


def external_netns(lab: str, name: str) -> Path:
    """The network namespace of a lab's machine outside the cluster."""
    return _netns(lab, "external", name)


def fabric_netns(lab: str) -> Path:
    """The network namespace of a lab's switch and router."""
    return _netns(lab, "fabric")


def lab_netns_prefix(lab: str) -> str:
    """What the file names of all network namespaces of a lab begin with, and of no other lab."""
    return f"hl.{check_lab_name(lab)}."


def check_object_name(name: str, kind: str) -> str:
    """Return ``name`` if it can be a pod's, a node's or an external host's (an RFC 1123 subdomain).

    Raises:
        InvalidName: It cannot; the error names ``kind``.
    """
    if len(name) > 253 or not _SUBDOMAIN.fullmatch(name):
        raise InvalidName(
            f"{name!r} is not a name of a {kind}",
            why="it is lower-case letters, digits, hyphens and dots, with a letter or digit at both ends",
        )
    return name


def check_namespace(name: str) -> str:
    """Return ``name`` if it can be a namespace's (an RFC 1123 label, and not a word that endpoints use).

    Raises:
        InvalidName: It cannot.
    """
    if name in RESERVED_NAMESPACES:
        raise InvalidName(
            f"{name!r} cannot be a namespace's name",
            why=f"{name}/NAME means {'a node' if name == 'node' else 'an ExternalHost'} in every command",
            remedy="choose another name for the namespace",
        )
    if not _LABEL.fullmatch(name):
        raise InvalidName(
            f"{name!r} is not a namespace's name",
            why="it is 1 to 63 lower-case letters, digits and hyphens, with a letter or digit at both ends",
        )
    return name


@dataclass(frozen=True, slots=True)
class Endpoint:
    """Who talks: a pod, an external host, a node or an address; with a port where one was given.

    ``namespace`` is a pod's; an address has ``address`` and no name. ``port`` is None or 1 to 65535.
    """

    kind: EndpointKind
    name: str = ""
    namespace: str = ""
    address: Address | None = None
    port: int | None = None
    protocol: Protocol = "tcp"

    @classmethod
    def parse(cls, text: str) -> Endpoint:
        """Read an endpoint.

        ``NAMESPACE/POD``, ``POD`` (in ``default``), ``external/NAME``, ``node/NAME``, or an address; after it
        ``:PORT`` or ``:PORT/tcp|udp|sctp``. An IPv6 address stands in brackets when a port follows.

        Raises:
            InvalidName: None of these.
        """
        whole = _address(text)
        if whole is not None:
            return cls("address", address=whole)
        match = _PORT.fullmatch(text)
        if match is None:
            return cls._parse_host(text, text)
        host = cls._parse_host(match["host"], text)
        return replace(host, port=_port(match["port"], text), protocol=_protocol(match["protocol"], text))

    @classmethod
    def _parse_host(cls, host: str, text: str) -> Endpoint:
        bracketed = host.startswith("[") and host.endswith("]")
        address = _address(host[1:-1] if bracketed else host)
        if address is not None:
            if bracketed == (address.version == 6):
                return cls("address", address=address)
            raise _invalid_endpoint(
                text, "brackets are for IPv6 addresses, and an IPv6 address before :PORT needs them"
            )
        match host.split("/"):
            case ["external", name]:
                return cls("external", check_object_name(name, "external host"))
            case ["node", name]:
                return cls("node", check_object_name(name, "node"))
            case [namespace, name]:
                return cls("pod", check_object_name(name, "pod"), check_namespace(namespace))
            case [name] if _SUBDOMAIN.fullmatch(name):
                return cls("pod", name, DEFAULT_NAMESPACE)
        raise _invalid_endpoint(text, "it is neither a name nor an address")

    @property
    def member(self) -> str:
        """The endpoint without its port: ``default/a``, ``external/x``, ``node/n`` or the address."""
        match self.kind:
            case "pod":
                return f"{self.namespace}/{self.name}"
            case "address":
                return str(self.address)
        return f"{self.kind}/{self.name}"

    def at(self, port: int, protocol: Protocol = "tcp") -> Endpoint:
        """The same endpoint with this port."""
        return replace(self, port=port, protocol=protocol)

    def netns(self, lab: str) -> Path:
        """The network namespace of this member of a lab.

        Raises:
            InvalidName: An address has none.
        """
        match self.kind:
            case "pod":
                return pod_netns(lab, self.namespace, self.name)
            case "external":
                return external_netns(lab, self.name)
            case "node":
                return node_netns(lab, self.name)
        raise _invalid_endpoint(
            str(self), "an address is not a member of a lab; name a pod, external/NAME or node/NAME"
        )

    def __str__(self) -> str:
        if self.port is None:
            return self.member
        host = f"[{self.address}]" if self.address is not None and self.address.version == 6 else self.member
        return f"{host}:{self.port}" + ("" if self.protocol == "tcp" else f"/{self.protocol}")


def _netns(lab: str, *parts: str) -> Path:
    name = lab_netns_prefix(lab) + ".".join(parts)
    if len(name) > _LONGEST_FILE_NAME:
        raise InvalidName(
            f"the name {'/'.join(parts)} is too long for lab {lab}",
            why=f"its network namespace's name would have {len(name)} characters of {_LONGEST_FILE_NAME}",
            remedy="shorten the lab's or the object's name",
        )
    return NETNS / name


def _address(text: str) -> Address | None:
    if "%" in text:  # an address with a zone is not one that a packet carries
        return None
    try:
        return ip_address(text)
    except ValueError:
        return None


def _port(text: str, endpoint: str) -> int:
    if not (text.isascii() and text.isdigit() and 1 <= int(text) <= 65535):
        raise _invalid_endpoint(endpoint, f"the port {text!r} is not a number from 1 to 65535")
    return int(text)


def _protocol(text: str | None, endpoint: str) -> Protocol:
    if text is None:
        return "tcp"
    if text.lower() not in get_args(Protocol):
        raise _invalid_endpoint(
            endpoint, f"the protocol {text!r} is not one of {', '.join(get_args(Protocol))}"
        )
    return cast(Protocol, text.lower())


def _invalid_endpoint(text: str, why: str) -> InvalidName:
    return InvalidName(
        f"{text!r} is not an endpoint",
        why=why,
        remedy="say NAMESPACE/POD, POD, external/NAME, ADDRESS or [ADDRESS] (IPv6), and :PORT[/tcp|udp|sctp]",
    )
