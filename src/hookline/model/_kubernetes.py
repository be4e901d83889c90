"""The Kubernetes kinds that Hookline reads: Namespace, Node, Pod, Service, EndpointSlice.

Only the fields that Hookline uses are typed; the rest is accepted and kept as it is. Addresses stay as
they were written, and the `addresses` properties give them parsed. Defaults are those of Kubernetes' API.
"""

from __future__ import annotations

from collections.abc import Iterable
from typing import Annotated, Literal

from pydantic import AfterValidator, Field, model_validator

from hookline.model._fields import (
    PORT_LIMIT,
    AddressText,
    IPAddress,
    Port,
    PortOrName,
    Protocol4,
    Switch,
    host_address,
    port_refusals,
)
from hookline.model._problems import Refused, value_text
from hookline.model._resource import ClusterMetadata, Native, NativeResource
from hookline.model._traffic import AFFINITY_SECONDS, DAY_SECONDS

SERVICE_NAME_LABEL = "kubernetes.io/service-name"
ZONE_LABEL = "topology.kubernetes.io/zone"


class Namespace(NativeResource):
    """A namespace (``v1``)."""

    api_version = "v1"
    kind = "Namespace"
    plural = "namespaces"
    short_names = ("ns",)

    metadata: ClusterMetadata


class NodeAddress(Native):
    """One of a node's addresses; ``type`` is InternalIP, ExternalIP, Hostname, InternalDNS or ExternalDNS."""

    type: str
    address: str

    @model_validator(mode="after")
    def _is_address(self) -> NodeAddress:
        if self.type in ("InternalIP", "ExternalIP"):
            _refuse_at("address", self.address)
        return self


class NodeSpec(Native):
    """The networks of a node's pods."""

    pod_cidr: str = ""
    pod_cidrs: tuple[str, ...] = ()


class NodeStatus(Native):
    """What the node reports about itself."""

    addresses: tuple[NodeAddress, ...] = ()


class Node(NativeResource):
    """A machine of the cluster (``v1``)."""

    api_version = "v1"
    kind = "Node"
    plural = "nodes"
    short_names = ("no",)

    metadata: ClusterMetadata
    spec: NodeSpec = NodeSpec()
    status: NodeStatus = NodeStatus()

    @property
    def addresses(self) -> tuple[IPAddress, ...]:
        """The node's addresses inside the cluster (``InternalIP``)."""
        return _parsed(entry.address for entry in self.status.addresses if entry.type == "InternalIP")

    @property
    def service_addresses(self) -> tuple[IPAddress, ...]:
        """The addresses on which node ports are reached: inside and outside of the cluster."""
        kinds = ("InternalIP", "ExternalIP")
        return _parsed(entry.address for entry in self.status.addresses if entry.type in kinds)

    @property
    def zone(self) -> str:
        """The zone that the node is in, empty where it does not say."""
        return self.metadata.labels.get(ZONE_LABEL, "")


class ContainerPort(Native):
    """A port that a container says it listens on."""

    name: str = ""
    container_port: Port
    protocol: Protocol4 = "TCP"


class Container(Native):
    """A container, for its ports."""

    name: str = ""
    ports: tuple[ContainerPort, ...] = ()


class PodSpec(Native):
    """Where a pod runs and what it listens on."""

    node_name: str = ""
    host_network: Switch = False
    containers: tuple[Container, ...] = ()


class PodIP(Native):
    """One of a pod's addresses."""

    ip: AddressText


class PodCondition(Native):
    """One of the things that a pod says about itself; ``Ready`` is the one that services ask."""

    type: str
    status: str = "Unknown"


class PodStatus(Native):
    """A pod's addresses and state."""

    phase: str = ""
    conditions: tuple[PodCondition, ...] = ()
    pod_ip: AddressText | None = None
    pod_ips: tuple[PodIP, ...] = ()


class Pod(NativeResource):
    """A pod (``v1``)."""

    api_version = "v1"
    kind = "Pod"
    plural = "pods"
    short_names = ("po",)

    spec: PodSpec = PodSpec()
    status: PodStatus = PodStatus()

    @property
    def addresses(self) -> tuple[IPAddress, ...]:
        """The pod's addresses: ``status.podIP`` first, then ``status.podIPs``, each once."""
        first = (self.status.pod_ip,) if self.status.pod_ip else ()
        return _parsed((*first, *(entry.ip for entry in self.status.pod_ips)))

    @property
    def is_ready(self) -> bool:
        """Whether the pod says that it can be used; one that says nothing can."""
        return all(entry.status == "True" for entry in self.status.conditions if entry.type == "Ready")

    @property
    def is_terminating(self) -> bool:
        """Whether the pod is going away."""
        return self.metadata.deletion_timestamp is not None

    @property
    def has_ended(self) -> bool:
        """Whether the pod is done for good: nothing listens in it any more."""
        return self.status.phase in ("Succeeded", "Failed")

    @property
    def ports(self) -> tuple[ContainerPort, ...]:
        """The declared ports of all containers."""
        return tuple(port for container in self.spec.containers for port in container.ports)

    def port_number(self, target: int | str, protocol: str) -> int | None:
        """A target port's number: itself, or the declared port of that name; None where there is none."""
        if isinstance(target, int):
            return target
        for port in self.ports:
            if port.name == target and port.protocol == protocol:
                return port.container_port
        return None


class ServicePort(Native):
    """One port of a service."""

    name: str = ""
    port: Port
    target_port: PortOrName | None = None
    protocol: Protocol4 = "TCP"
    node_port: Annotated[int, Field(strict=True, ge=0, le=PORT_LIMIT)] | None = None

    @property
    def target(self) -> int | str:
        """The pods' port, a number or a name: `target_port`, or else `port`."""
        return self.port if self.target_port is None else self.target_port


def _cluster_ip(value: str) -> str:
    if value not in ("", "None"):
        host_address(value)
    return value


ClusterIP = Annotated[str, AfterValidator(_cluster_ip)]


class ClientIPConfig(Native):
    """How long a client stays with its backend."""

    timeout_seconds: Annotated[int, Field(strict=True, ge=1, le=DAY_SECONDS)] | None = None


class SessionAffinityConfig(Native):
    """The settings of a service's session affinity."""

    client_ip: ClientIPConfig = ClientIPConfig()


class ServiceSpec(Native):
    """What a service asks for. ``clusterIP: None`` is a headless service, which is not balanced."""

    type: Literal["ClusterIP", "NodePort", "LoadBalancer", "ExternalName"] = "ClusterIP"
    cluster_ip: ClusterIP = ""
    cluster_ips: tuple[ClusterIP, ...] = ()
    external_ips: tuple[AddressText, ...] = ()
    ports: tuple[ServicePort, ...] = ()
    selector: dict[str, str] = Field(default={})
    ip_families: tuple[Literal["IPv4", "IPv6"], ...] = ()
    session_affinity: Literal["None", "ClientIP"] = "None"
    session_affinity_config: SessionAffinityConfig = SessionAffinityConfig()
    internal_traffic_policy: Literal["Cluster", "Local"] = "Cluster"
    external_traffic_policy: Literal["Cluster", "Local"] = "Cluster"
    traffic_distribution: Literal["PreferClose", "PreferSameZone", "PreferSameNode"] | None = None
    publish_not_ready_addresses: Switch = False
    health_check_node_port: Annotated[int, Field(strict=True, ge=0, le=PORT_LIMIT)] | None = None
    load_balancer_source_ranges: tuple[str, ...] = ()

    @model_validator(mode="after")
    def _together(self) -> ServiceSpec:
        if refusals := port_refusals(self.ports):
            raise Refused.all(refusals)
        return self


class Ingress(Native):
    """An address that a load balancer outside gave the service.

    Attributes:
        ip_mode: ``Proxy``: the load balancer ends connections itself, and its address is not the nodes' to answer.
    """

    ip: AddressText | None = None
    ip_mode: Literal["VIP", "Proxy"] = "VIP"
    hostname: str = ""


class LoadBalancerStatus(Native):
    """What a load balancer outside gave the service."""

    ingress: tuple[Ingress, ...] = ()


class ServiceStatus(Native):
    """A service's state."""

    load_balancer: LoadBalancerStatus = LoadBalancerStatus()


class Service(NativeResource):
    """A service (``v1``). Its backends are in the `EndpointSlice` objects that name it."""

    api_version = "v1"
    kind = "Service"
    plural = "services"
    short_names = ("svc",)

    spec: ServiceSpec = ServiceSpec()
    status: ServiceStatus = ServiceStatus()

    @property
    def is_headless(self) -> bool:
        """Whether clients find the pods by DNS and nothing is to be balanced."""
        return "None" in (self.spec.cluster_ip, *self.spec.cluster_ips) or self.spec.type == "ExternalName"

    @property
    def cluster_addresses(self) -> tuple[IPAddress, ...]:
        """The addresses for clients inside the cluster."""
        spec = self.spec
        return _parsed(text for text in (spec.cluster_ip, *spec.cluster_ips) if text not in ("", "None"))

    @property
    def outside_addresses(self) -> tuple[IPAddress, ...]:
        """The addresses for clients outside: external ones and the load balancer's, without those of ipMode Proxy."""
        ingress = (
            entry.ip for entry in self.status.load_balancer.ingress if entry.ip and entry.ip_mode != "Proxy"
        )
        return _parsed((*self.spec.external_ips, *ingress))

    @property
    def addresses(self) -> tuple[IPAddress, ...]:
        """Every address of the service's own on which clients reach it, each once: cluster, external, load balancer."""
        return tuple(dict.fromkeys((*self.cluster_addresses, *self.outside_addresses)))

    @property
    def has_node_ports(self) -> bool:
        """Whether the service is also reached on the nodes' addresses."""
        return self.spec.type in ("NodePort", "LoadBalancer") and any(p.node_port for p in self.spec.ports)

    @property
    def affinity_seconds(self) -> int:
        """How long a client stays with its backend; 0 where it does not."""
        if self.spec.session_affinity != "ClientIP":
            return 0
        return self.spec.session_affinity_config.client_ip.timeout_seconds or AFFINITY_SECONDS


class EndpointConditions(Native):
    """An endpoint's state; None means that it is not known."""

    ready: Switch | None = None
    serving: Switch | None = None
    terminating: Switch | None = None


class ObjectReference(Native):
    """The object behind an endpoint."""

    kind: str = ""
    namespace: str = ""
    name: str = ""
    uid: str = ""


class HintName(Native):
    """The name of a zone or node."""

    name: str


class EndpointHints(Native):
    """Whose clients should take the endpoint."""

    for_zones: tuple[HintName, ...] = ()
    for_nodes: tuple[HintName, ...] = ()


class Endpoint(Native):
    """A backend of a service: one pod or machine, reached by any of its addresses."""

    addresses: tuple[str, ...]
    conditions: EndpointConditions = EndpointConditions()
    node_name: str | None = None
    target_ref: ObjectReference | None = None
    zone: str | None = None
    hints: EndpointHints | None = None

    @property
    def ips(self) -> tuple[IPAddress, ...]:
        """The addresses, parsed; empty for an endpoint of addressType FQDN."""
        try:
            return _parsed(self.addresses)
        except Refused:
            return ()

    @property
    def is_ready(self) -> bool:
        """Whether the endpoint takes new connections; not known counts as yes."""
        return self.conditions.ready is not False

    @property
    def is_serving(self) -> bool:
        """Whether the endpoint answers, terminating or not; not known counts as yes."""
        return self.conditions.serving is not False

    @property
    def is_terminating(self) -> bool:
        """Whether the endpoint is going away; not known counts as no."""
        return self.conditions.terminating is True


class EndpointPort(Native):
    """A port of every endpoint of a slice; its name is the service port's. No number means any port."""

    name: str | None = None
    port: Port | None = None
    protocol: Protocol4 | None = None


class EndpointSlice(NativeResource):
    """Some of a service's backends (``discovery.k8s.io/v1``)."""

    api_version = "discovery.k8s.io/v1"
    kind = "EndpointSlice"
    plural = "endpointslices"
    short_names = ("eps",)

    address_type: Literal["IPv4", "IPv6", "FQDN"]
    endpoints: tuple[Endpoint, ...] = ()
    ports: tuple[EndpointPort, ...] = ()

    @model_validator(mode="after")
    def _one_family(self) -> EndpointSlice:
        if self.address_type == "FQDN":
            return self
        version = 4 if self.address_type == "IPv4" else 6
        refusals = []
        for index, endpoint in enumerate(self.endpoints):
            for position, text in enumerate(endpoint.addresses):
                at = ("endpoints", index, "addresses", position)
                try:
                    if host_address(text).version != version:
                        refusals.append(
                            Refused(
                                f"{value_text(text)} is not {self.address_type}, the slice's addressType",
                                at=at,
                            )
                        )
                except Refused as refused:
                    refusals.append(Refused(str(refused), at=at))
        if refusals:
            raise Refused.all(refusals)
        return self

    @property
    def service_reference(self) -> str | None:
        """The `Resource.reference` of the service that the slice belongs to; None where it names none."""
        name = self.metadata.labels.get(SERVICE_NAME_LABEL)
        return f"Service/{self.metadata.namespace}/{name}" if name else None


def _parsed(texts: Iterable[str]) -> tuple[IPAddress, ...]:
    return tuple(dict.fromkeys(host_address(text) for text in texts))


def _refuse_at(field: str, text: str) -> None:
    try:
        host_address(text)
    except Refused as refused:
        raise Refused(str(refused), at=(field,)) from None
