"""The resources that a user writes, as typed, validated data; pure: no kernel, no I/O.

One class for each kind, `Resource` their base. `parse` makes one from a plain document, or raises
`InvalidResource` with everything that is wrong with it. Kubernetes' own kinds keep the fields that Hookline
does not know; Hookline's refuse them.

A new kind is one class in one file, and its line below.
"""

from hookline.model._dns_capture import DNSCapture, DNSCaptureSpec, Resolver
from hookline.model._external_host import ExternalHost, ExternalHostSpec, ExternalPort
from hookline.model._fields import IPAddress
from hookline.model._host_policy import (
    HostEgressRule,
    HostIngressRule,
    HostPolicy,
    HostPolicyPeer,
    HostPolicySpec,
)
from hookline.model._kubernetes import (
    Container,
    ContainerPort,
    Endpoint,
    EndpointConditions,
    EndpointHints,
    EndpointPort,
    EndpointSlice,
    Namespace,
    Node,
    Pod,
    Service,
    ServicePort,
    ServiceSpec,
)
from hookline.model._local_redirect import (
    AddressMatcher,
    LocalRedirectPolicy,
    LocalRedirectPolicySpec,
    RedirectBackend,
    RedirectFrontend,
    RedirectPort,
    ServiceMatcher,
)
from hookline.model._network_policy import (
    EgressRule,
    IngressRule,
    IPBlock,
    IPNetwork,
    NetworkPolicy,
    NetworkPolicyPeer,
    NetworkPolicyPort,
    NetworkPolicySpec,
    PolicyType,
    network_of,
)
from hookline.model._node_config import Features, Interface, MapSizes, NatPorts, NodeConfig, NodeConfigSpec
from hookline.model._parse import parse
from hookline.model._policy_test import PolicyTest, PolicyTestSpec, PolicyTestStep, Probe, ProbeLine
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
from hookline.model._selectors import LabelExpression, LabelSelector
from hookline.model._service_policy import PolicyTarget, ServicePolicy, ServicePolicySpec
from hookline.model._traffic import (
    AFFINITY_SECONDS,
    HealthCheck,
    SessionAffinity,
    Tls,
    TrafficSettings,
    octets_of,
)
from hookline.model._virtual_service import (
    TABLE_SIZES,
    Backend,
    VirtualService,
    VirtualServicePort,
    VirtualServiceSpec,
)

__all__ = [
    "AFFINITY_SECONDS",
    "HOOKLINE",
    "TABLE_SIZES",
    "AddressMatcher",
    "Backend",
    "ClusterMetadata",
    "Container",
    "ContainerPort",
    "DNSCapture",
    "DNSCaptureSpec",
    "EgressRule",
    "Endpoint",
    "EndpointConditions",
    "EndpointHints",
    "EndpointPort",
    "EndpointSlice",
    "ExternalHost",
    "ExternalHostSpec",
    "ExternalPort",
    "Features",
    "FieldPath",
    "HealthCheck",
    "HostEgressRule",
    "HostIngressRule",
    "HostPolicy",
    "HostPolicyPeer",
    "HostPolicySpec",
    "IPAddress",
    "IPBlock",
    "IPNetwork",
    "IngressRule",
    "Interface",
    "InvalidResource",
    "LabelExpression",
    "LabelSelector",
    "LocalRedirectPolicy",
    "LocalRedirectPolicySpec",
    "Locate",
    "MapSizes",
    "Metadata",
    "Namespace",
    "NatPorts",
    "NetworkPolicy",
    "NetworkPolicyPeer",
    "NetworkPolicyPort",
    "NetworkPolicySpec",
    "Node",
    "NodeConfig",
    "NodeConfigSpec",
    "Origin",
    "OwnClusterMetadata",
    "OwnMetadata",
    "Pod",
    "PolicyTarget",
    "PolicyTest",
    "PolicyTestSpec",
    "PolicyTestStep",
    "PolicyType",
    "Probe",
    "ProbeLine",
    "Problem",
    "RedirectBackend",
    "RedirectFrontend",
    "RedirectPort",
    "Refused",
    "Resolver",
    "Resource",
    "Service",
    "ServiceMatcher",
    "ServicePolicy",
    "ServicePolicySpec",
    "ServicePort",
    "ServiceSpec",
    "SessionAffinity",
    "Tls",
    "TrafficSettings",
    "VirtualService",
    "VirtualServicePort",
    "VirtualServiceSpec",
    "find_kind",
    "network_of",
    "octets_of",
    "parse",
    "supported_kinds",
]
