"""VirtualService: addresses and ports balanced over backends, with what a Service cannot say."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Annotated, Literal

from pydantic import BeforeValidator, Field, model_validator

from hookline.model._fields import Address, IPAddress, Port, PortName, PortOrName, port_refusals
from hookline.model._problems import Refused, value_text
from hookline.model._resource import Own, OwnMetadata, OwnResource
from hookline.model._traffic import TrafficSettings

TABLE_SIZES = (1021, 65537)
"""The smallest and the largest Maglev table; both are prime, as every size must be."""


def _forwarding(value: object) -> object:
    if value in ("ipip", "gue"):
        raise Refused(f"{value_text(value)} is not there yet", remedy="use nat or dsr")
    return value


def _table_size(value: int) -> int:
    smallest, largest = TABLE_SIZES
    if type(value) is not int or not smallest <= value <= largest:
        raise Refused(f"{value_text(value)} is not a prime from {smallest} to {largest}")
    if not _is_prime(value):
        after = next(size for size in range(value, largest + 1) if _is_prime(size))
        raise Refused(
            f"{value} is not prime, and only a prime table gives every backend its share",
            remedy=f"the next prime is {after}",
        )
    return value


def _is_prime(number: int) -> bool:
    return number % 2 == 1 and all(number % divisor for divisor in range(3, int(number**0.5) + 1, 2))


class VirtualServicePort(Own):
    """One port of a virtual service."""

    name: PortName = ""
    port: Port
    target_port: PortOrName | None = None
    protocol: Literal["TCP", "UDP"] = "TCP"

    @property
    def target(self) -> int | str:
        """The backends' port, a number or the name that pods give it: `target_port`, or else `port`."""
        return self.port if self.target_port is None else self.target_port


class Backend(Own):
    """Where connections go: one address, or every pod of the service's namespace that a selector matches.

    Attributes:
        weight: The share of new connections beside the other backends' weights (each pod of a selector has
            it); 0 gives no new ones, and connections that exist go on.
        port: The backend's own port, in place of the service port's target.
    """

    address: Address | None = None
    selector: dict[str, str] | None = None
    weight: Annotated[int, Field(strict=True, ge=0, le=65535)] = 100
    port: Port | None = None

    @model_validator(mode="after")
    def _one_of(self) -> Backend:
        if (self.address is None) == (self.selector is None):
            raise Refused(
                "a backend has exactly one of address and selector; this one has "
                + ("neither" if self.address is None else "both")
            )
        if self.selector is not None and not self.selector:
            raise Refused(
                "an empty selector matches nothing", remedy="name at least one label", at=("selector",)
            )
        return self


class VirtualServiceSpec(TrafficSettings):
    """What a virtual service asks for, with all `TrafficSettings`.

    Attributes:
        forwarding: ``nat`` rewrites both directions; ``dsr`` changes only the layer-2 next hop, and the
            backend, which has the service's address on its loopback, answers the client directly.
        table_size: The Maglev table's size, a prime; None lets Hookline choose at least 100 × the backends.
        backends: May be empty: then connections are refused, and counted.
    """

    addresses: Annotated[tuple[Address, ...], Field(min_length=1)]
    ports: Annotated[tuple[VirtualServicePort, ...], Field(min_length=1)]
    forwarding: Annotated[Literal["nat", "dsr"], BeforeValidator(_forwarding)] = "nat"
    table_size: Annotated[int, BeforeValidator(_table_size)] | None = None
    backends: tuple[Backend, ...]

    @model_validator(mode="after")
    def _together(self) -> VirtualServiceSpec:
        refusals = port_refusals(self.ports)
        refusals += self._address_refusals()
        refusals += self._port_rewrite_refusals()
        refusals += self._backend_refusals()
        if refusals:
            raise Refused.all(refusals)
        return self

    def _address_refusals(self) -> Iterator[Refused]:
        for index, address in enumerate(self.addresses):
            first = self.addresses.index(address)
            if first != index:
                yield Refused(f"{address} is already addresses[{first}]", at=("addresses", index))

    def _port_rewrite_refusals(self) -> Iterator[Refused]:
        if self.forwarding == "dsr":
            because = "dsr changes only the layer-2 next hop and cannot rewrite the port"
            for index, port in enumerate(self.ports):
                if port.target != port.port:
                    yield Refused(
                        f"{value_text(port.target)} is not the service's port {port.port}: {because}",
                        remedy="remove targetPort, or use forwarding: nat",
                        at=("ports", index, "targetPort"),
                    )
            for index, backend in enumerate(self.backends):
                if backend.port is not None and any(backend.port != port.port for port in self.ports):
                    yield Refused(
                        f"{backend.port} is not the service's port: {because}",
                        remedy="remove port, or use forwarding: nat",
                        at=("backends", index, "port"),
                    )

    def _backend_refusals(self) -> Iterator[Refused]:
        versions = {address.version for address in self.addresses}
        named = next((port.target for port in self.ports if isinstance(port.target, str)), None)
        seen: dict[tuple[IPAddress, int | None], int] = {}
        for index, backend in enumerate(self.backends):
            address = backend.address
            if address is None:
                continue
            if address.version not in versions:
                yield Refused(
                    f"{address} is IPv{address.version}, and the service has no IPv{address.version} address",
                    at=("backends", index, "address"),
                )
            if address in self.addresses:
                yield Refused(f"{address} is the service's own address", at=("backends", index, "address"))
            if (first := seen.setdefault((address, backend.port), index)) != index:
                yield Refused(f"{address} is already backends[{first}]", at=("backends", index, "address"))
            if named is not None and backend.port is None:
                yield Refused(
                    f'the targetPort "{named}" is a name that pods give a port; {address} is no pod',
                    remedy="give this backend a port, or make targetPort a number",
                    at=("backends", index),
                )


class VirtualService(OwnResource):
    """Addresses and ports that are balanced over backends (``hookline.dev/v1alpha1``)."""

    kind = "VirtualService"
    plural = "virtualservices"
    short_names = ("vs",)

    metadata: OwnMetadata
    spec: VirtualServiceSpec

    @property
    def addresses(self) -> tuple[IPAddress, ...]:
        """The addresses that clients connect to."""
        return self.spec.addresses
