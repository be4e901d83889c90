"""ExternalHost: a machine outside of the cluster, with a name."""

from __future__ import annotations

from typing import Annotated, Literal

from pydantic import Field, model_validator

from hookline.model._fields import Address, IPAddress, Port, PortName, port_refusals
from hookline.model._problems import Refused
from hookline.model._resource import Own, OwnClusterMetadata, OwnResource


class ExternalPort(Own):
    """A port on which the machine listens."""

    name: PortName = ""
    port: Port
    protocol: Literal["TCP", "UDP"] = "TCP"


class ExternalHostSpec(Own):
    """The machine's addresses, in one of two forms, and its ports."""

    address: Address | None = None
    addresses: Annotated[tuple[Address, ...], Field(min_length=1)] | None = None
    ports: tuple[ExternalPort, ...] = ()

    @model_validator(mode="after")
    def _together(self) -> ExternalHostSpec:
        if (self.address is None) == (self.addresses is None):
            raise Refused(
                "a host has exactly one of address and addresses; this one has "
                + ("neither" if self.address is None else "both")
            )
        refusals = port_refusals(self.ports)
        for index, address in enumerate(self.addresses or ()):
            first = (self.addresses or ()).index(address)
            if first != index:
                refusals.append(Refused(f"{address} is already addresses[{first}]", at=("addresses", index)))
        if refusals:
            raise Refused.all(refusals)
        return self


class ExternalHost(OwnResource):
    """A machine outside of the cluster (``hookline.dev/v1alpha1``)."""

    kind = "ExternalHost"
    plural = "externalhosts"
    short_names = ("eh",)

    metadata: OwnClusterMetadata
    spec: ExternalHostSpec

    @property
    def addresses(self) -> tuple[IPAddress, ...]:
        """The machine's addresses."""
        spec = self.spec
        return (spec.address,) if spec.address is not None else spec.addresses or ()
