"""The resources that a user writes, as typed, validated data; pure: no kernel, no I/O.

One class for each kind, `Resource` their base. `parse` makes one from a plain document, or raises
`InvalidResource` with everything that is wrong with it. Kubernetes' own kinds keep the fields that Hookline
does not know; Hookline's refuse them.

A new kind is one class in one file, and its line below.
"""

from hookline.model._external_host import ExternalHost, ExternalHostSpec, ExternalPort
from hookline.model._fields import IPAddress
from hookline.model._kubernetes import (
    Container,
    ContainerPort,
    Endpoint,
    EndpointConditions,
    EndpointPort,
    EndpointSlice,
    Namespace,
    Node,
    Pod,
    Service,
    ServicePort,
    ServiceSpec,
)
from hookline.model._node_config import Features, Interface, MapSizes, NatPorts, NodeConfig, NodeConfigSpec
from hookline.model._parse import parse
from hookline.model._problems import FieldPath, InvalidResource, Locate, Origin, Problem, Refused
from hookline.model._resource import (
    HOOKLINE,
    ClusterMetadata,
    Metadata,
    OwnClusterMetadata,
    OwnMetadata,
    Resource,
    find_kind,
    supported_kinds,
)
from hookline.model._virtual_service import (
    TABLE_SIZES,
    Backend,
    VirtualService,
    VirtualServicePort,
    VirtualServiceSpec,
)

__all__ = [
    "HOOKLINE",
    "TABLE_SIZES",
    "Backend",
    "ClusterMetadata",
    "Container",
    "ContainerPort",
    "Endpoint",
    "EndpointConditions",
    "EndpointPort",
    "EndpointSlice",
    "ExternalHost",
    "ExternalHostSpec",
    "ExternalPort",
    "Features",
    "FieldPath",
    "IPAddress",
    "Interface",
    "InvalidResource",
    "Locate",
    "MapSizes",
    "Metadata",
    "Namespace",
    "NatPorts",
    "Node",
    "NodeConfig",
    "NodeConfigSpec",
    "Origin",
    "OwnClusterMetadata",
    "OwnMetadata",
    "Pod",
    "Problem",
    "Refused",
    "Resource",
    "Service",
    "ServicePort",
    "ServiceSpec",
    "VirtualService",
    "VirtualServicePort",
    "VirtualServiceSpec",
    "find_kind",
    "parse",
    "supported_kinds",
]
