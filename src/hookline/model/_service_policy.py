"""ServicePolicy: what Hookline can do for a Kubernetes Service and the Service itself cannot say."""

from __future__ import annotations

from typing import Literal

from hookline.model._fields import ObjectName
from hookline.model._resource import Own, OwnMetadata, OwnResource
from hookline.model._traffic import TrafficSettings


class PolicyTarget(Own):
    """The object that a policy is for, in the policy's own namespace."""

    kind: Literal["Service"] = "Service"
    name: ObjectName


class ServicePolicySpec(TrafficSettings):
    """`TrafficSettings` for all ports of one Service. A Service has one policy at most."""

    target_ref: PolicyTarget


class ServicePolicy(OwnResource):
    """How a Service's traffic is treated (``hookline.dev/v1alpha1``)."""

    kind = "ServicePolicy"
    plural = "servicepolicies"
    short_names = ("sp",)

    metadata: OwnMetadata
    spec: ServicePolicySpec

    @property
    def service_reference(self) -> str:
        """The `Resource.reference` of the service that it is for."""
        return f"Service/{self.metadata.namespace}/{self.spec.target_ref.name}"
