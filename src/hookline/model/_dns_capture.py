"""DNSCapture: the DNS queries of chosen pods go to a chosen resolver, whatever their resolv.conf says."""

from __future__ import annotations

from typing import Annotated

from pydantic import Field, model_validator

from hookline.model._fields import IPAddress, Port
from hookline.model._problems import Refused
from hookline.model._resource import Own, OwnMetadata, OwnResource
from hookline.model._selectors import LabelSelector, NodeLocalAddress

DNS_PORT = 53


class Resolver(Own):
    """Who answers: one address, one of each family, or a pod of the capture's namespace on the same node.

    Attributes:
        selector: Labels of the pod; where several match, the first by name.
        port: The resolver's own port, for UDP and TCP.
    """

    address: NodeLocalAddress | None = None
    addresses: Annotated[tuple[NodeLocalAddress, ...], Field(min_length=1, max_length=2)] | None = None
    selector: dict[str, str] | None = None
    port: Port = DNS_PORT

    @model_validator(mode="after")
    def _one_of(self) -> Resolver:
        given = [name for name in ("address", "addresses", "selector") if getattr(self, name) is not None]
        if len(given) != 1:
            raise Refused(
                "a resolver has exactly one of address, addresses and selector; this one has "
                + (" and ".join(given) or "none")
            )
        if self.selector is not None and not self.selector:
            raise Refused(
                "an empty selector matches nothing", remedy="name at least one label", at=("selector",)
            )
        if self.addresses and len({address.version for address in self.addresses}) != len(self.addresses):
            raise Refused("one address of each family is enough", at=("addresses",))
        return self

    @property
    def fixed(self) -> tuple[IPAddress, ...]:
        """The addresses that it names; none with a selector."""
        return (self.address,) if self.address is not None else self.addresses or ()


class DNSCaptureSpec(Own):
    """Whose queries, and who answers them.

    Attributes:
        pod_selector: Pods of the capture's namespace; ``{}`` takes all of them.
    """

    pod_selector: LabelSelector
    resolver: Resolver


class DNSCapture(OwnResource):
    """Pods whose DNS queries are answered by another resolver (``hookline.dev/v1alpha1``)."""

    kind = "DNSCapture"
    plural = "dnscaptures"
    short_names = ("dc",)

    metadata: OwnMetadata
    spec: DNSCaptureSpec
