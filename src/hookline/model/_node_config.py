"""NodeConfig: how Hookline runs on one node. The object's name is the node's."""

from __future__ import annotations

from typing import Annotated, Literal

from pydantic import AfterValidator, Field, model_validator

from hookline.model._problems import Refused, value_text
from hookline.model._resource import Own, OwnClusterMetadata, OwnResource


def _cgroup_path(value: str) -> str:
    if not value.isprintable() or any(part in ("", ".", "..") for part in value.strip("/").split("/")):
        raise Refused(f"{value_text(value)} is not a cgroup's path, such as kubepods.slice")
    return value.strip("/")


def _interface_name(value: str) -> str:
    # dev_valid_name() in the kernel's net/core/dev.c; IFNAMSIZ is 16 with the closing zero.
    if (
        not value
        or len(value.encode("utf-8", "replace")) > 15
        or value in (".", "..")
        or any(letter in "/:" or letter.isspace() or not letter.isprintable() for letter in value)
    ):
        raise Refused(
            f"{value_text(value)} is not an interface's name: 1 to 15 bytes, no space, slash or colon"
        )
    return value


class Interface(Own):
    """An interface that Hookline attaches to.

    Attributes:
        role: ``uplink`` faces the network, ``pod`` faces a pod of this node.
        xdp_mode: ``auto`` is native where the driver can, else generic.
    """

    name: Annotated[str, AfterValidator(_interface_name)]
    role: Literal["uplink", "pod"]
    xdp_mode: Literal["auto", "native", "generic", "offload"] = "auto"


class MapSizes(Own):
    """How many entries the kernel's tables hold; None leaves the size that the program was built with.

    Attributes:
        affinity: Clients of services with session affinity, each counted once for each port of a service that it uses. The
            one that has not been seen for longest is forgotten for a new one.
        endpoints: Pods of this node that policies are for.
        identities: Addresses and prefixes that policies tell apart.
        rules: What policies allow, a row for each class of peers and each port.
        own_addresses: The node's own, for HostPolicies.
        tracked: Connections that the firewall knows.
        fragments: Fragmented packets that it knows the ports of.
        rule_counts: Rules that are counted.
    """

    connections: Annotated[int, Field(strict=True, ge=1024, le=1 << 24)] | None = None
    affinity: Annotated[int, Field(strict=True, ge=1024, le=1 << 24)] | None = None
    services: Annotated[int, Field(strict=True, ge=16, le=1 << 20)] | None = None
    backends: Annotated[int, Field(strict=True, ge=16, le=1 << 22)] | None = None
    maglev_pages: Annotated[int, Field(strict=True, ge=16, le=1 << 20)] | None = None
    endpoints: Annotated[int, Field(strict=True, ge=16, le=1 << 16)] | None = None
    identities: Annotated[int, Field(strict=True, ge=16, le=1 << 22)] | None = None
    rules: Annotated[int, Field(strict=True, ge=16, le=1 << 23)] | None = None
    own_addresses: Annotated[int, Field(strict=True, ge=16, le=1 << 16)] | None = None
    tracked: Annotated[int, Field(strict=True, ge=1024, le=1 << 24)] | None = None
    fragments: Annotated[int, Field(strict=True, ge=64, le=1 << 20)] | None = None
    rule_counts: Annotated[int, Field(strict=True, ge=16, le=1 << 22)] | None = None


class Features(Own):
    """Switches for parts that can be turned off.

    Attributes:
        connect_time: Services for the sockets of this node and its pods: ``auto`` where the kernel can.
    """

    connect_time: Literal["auto", "off"] = "auto"


class NatPorts(Own):
    """The source ports, both ends included, that ``nat`` gives to connections on the backends' side.

    The default lies below Kubernetes' node ports, 30000 to 32767, and Linux's own range for local connections, 32768 to 60999
    (``net.ipv4.ip_local_port_range``). A service on one of the node's own addresses must have a port outside.
    """

    port_min: Annotated[int, Field(strict=True, ge=1024, le=65535)] = 10240
    port_max: Annotated[int, Field(strict=True, ge=1024, le=65535)] = 29999

    @model_validator(mode="after")
    def _in_order(self) -> NatPorts:
        if self.port_min >= self.port_max:
            raise Refused(f"portMin {self.port_min} is not below portMax {self.port_max}")
        return self


class NodeConfigSpec(Own):
    """A node's settings; all have defaults.

    Attributes:
        interfaces: Empty means that the default route's interface is the uplink.
        cgroup: Below the mount of cgroup v2: services at connect time are for processes in it and below it. None is
            the root, and in a lab the node's own.
    """

    interfaces: tuple[Interface, ...] = ()
    maps: MapSizes = MapSizes()
    features: Features = Features()
    nat: NatPorts = NatPorts()
    cgroup: Annotated[str, AfterValidator(_cgroup_path)] | None = None

    @model_validator(mode="after")
    def _once_each(self) -> NodeConfigSpec:
        refusals = []
        seen: dict[str, int] = {}
        for index, interface in enumerate(self.interfaces):
            if (first := seen.setdefault(interface.name, index)) != index:
                refusals.append(
                    Refused(
                        f"{value_text(interface.name)} is already interfaces[{first}]",
                        at=("interfaces", index, "name"),
                    )
                )
        if refusals:
            raise Refused.all(refusals)
        return self


class NodeConfig(OwnResource):
    """How Hookline runs on the node of the same name (``hookline.dev/v1alpha1``)."""

    kind = "NodeConfig"
    plural = "nodeconfigs"
    short_names = ("nc",)

    metadata: OwnClusterMetadata
    spec: NodeConfigSpec = NodeConfigSpec()
