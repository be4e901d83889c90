"""LocalRedirectPolicy: traffic of the node's own pods and programs to an address or a service goes to a pod of the same node.

The fields are those of Cilium's CiliumLocalRedirectPolicy, https://docs.cilium.io/en/stable/network/kubernetes/local-redirect-policy/.
"""

from __future__ import annotations

from typing import Annotated, Any, Literal

from pydantic import Field, PlainValidator, model_validator

from hookline.model._fields import PORT_LIMIT, NamespaceName, ObjectName, PortName, port_refusals
from hookline.model._problems import Refused, value_text
from hookline.model._resource import Own, OwnMetadata, OwnResource
from hookline.model._selectors import LabelSelector, NodeLocalAddress


def _port(value: Any) -> int:
    # Cilium's port is text.
    number = (
        int(value)
        if isinstance(value, str) and value.isascii() and value.isdigit() and len(value) < 6
        else value
    )
    if isinstance(number, int) and not isinstance(number, bool) and 1 <= number <= PORT_LIMIT:
        return number
    raise Refused(f"{value_text(value)} is not a whole number from 1 to {PORT_LIMIT}")


class RedirectPort(Own):
    """A port, with a name where there are several: names say which port goes to which."""

    name: PortName = ""
    port: Annotated[int, PlainValidator(_port, json_schema_input_type=int | str)]
    protocol: Literal["TCP", "UDP"] = "TCP"


Ports = Annotated[tuple[RedirectPort, ...], Field(min_length=1)]


class AddressMatcher(Own):
    """An address with ports."""

    ip: NodeLocalAddress
    to_ports: Ports


class ServiceMatcher(Own):
    """A service of the policy's namespace, by its cluster addresses; without ports all that it has."""

    service_name: ObjectName
    namespace: NamespaceName
    to_ports: tuple[RedirectPort, ...] = ()


class RedirectFrontend(Own):
    """What is connected to: exactly one of the two."""

    address_matcher: AddressMatcher | None = None
    service_matcher: ServiceMatcher | None = None

    @model_validator(mode="after")
    def _one_of(self) -> RedirectFrontend:
        if (self.address_matcher is None) == (self.service_matcher is None):
            raise Refused(
                "a frontend has exactly one of addressMatcher and serviceMatcher; this one has "
                + ("neither" if self.address_matcher is None else "both")
            )
        return self

    @property
    def ports(self) -> tuple[RedirectPort, ...]:
        """The ports of either."""
        matcher = self.address_matcher or self.service_matcher
        return matcher.to_ports if matcher else ()


class RedirectBackend(Own):
    """The pods of the policy's namespace that take it, where they are on the node, and their ports."""

    local_endpoint_selector: LabelSelector
    to_ports: Ports


class LocalRedirectPolicySpec(Own):
    """From where to where.

    Attributes:
        skip_redirect_from_backend: Connections that the pods make themselves are never redirected to them, whatever this says.
    """

    redirect_frontend: RedirectFrontend
    redirect_backend: RedirectBackend
    skip_redirect_from_backend: Annotated[bool, Field(strict=True)] = False
    description: str = ""

    @model_validator(mode="after")
    def _ports_fit(self) -> LocalRedirectPolicySpec:
        matcher = self.redirect_frontend.address_matcher or self.redirect_frontend.service_matcher
        where = "addressMatcher" if self.redirect_frontend.address_matcher else "serviceMatcher"
        frontend = matcher.to_ports if matcher else ()
        backend = self.redirect_backend.to_ports
        front_at = ("redirectFrontend", where, "toPorts")
        back_at = ("redirectBackend", "toPorts")
        refusals = [*port_refusals(frontend, front_at), *port_refusals(backend, back_at)]
        if refusals:
            raise Refused.all(refusals)
        if len(frontend) == 1 and len(backend) == 1:
            if frontend[0].protocol != backend[0].protocol:
                raise Refused(
                    f"the frontend's port is {frontend[0].protocol} and the pods' is {backend[0].protocol}",
                    at=(*back_at, 0, "protocol"),
                )
            return self
        known = {port.name: port for port in backend}
        for index, port in enumerate(frontend):
            other = known.get(port.name)
            if other is None:
                refusals.append(
                    Refused(
                        f"no port of redirectBackend is called {value_text(port.name)}",
                        at=(*front_at, index, "name"),
                    )
                )
            elif other.protocol != port.protocol:
                refusals.append(
                    Refused(
                        f"{value_text(port.name)} is {port.protocol} here and {other.protocol} in redirectBackend",
                        at=(*front_at, index, "protocol"),
                    )
                )
        if refusals:
            raise Refused.all(refusals)
        return self

    def backend_port(self, name: str) -> RedirectPort | None:
        """The pods' port for a frontend's port of this name; None where there is none."""
        ports = self.redirect_backend.to_ports
        if len(ports) == 1 and len(self.redirect_frontend.ports) <= 1:
            return ports[0]
        return next((port for port in ports if port.name == name), None)


class LocalRedirectPolicy(OwnResource):
    """Traffic that goes to the node's own pod instead (``hookline.dev/v1alpha1``)."""

    kind = "LocalRedirectPolicy"
    plural = "localredirectpolicies"
    short_names = ("lrp",)

    metadata: OwnMetadata
    spec: LocalRedirectPolicySpec

    @model_validator(mode="after")
    def _own_namespace(self) -> LocalRedirectPolicy:
        matcher = self.spec.redirect_frontend.service_matcher
        if matcher is not None and matcher.namespace != self.metadata.namespace:
            raise Refused(
                f"{value_text(matcher.namespace)} is not the policy's own namespace, {self.metadata.namespace}: "
                "no one may take another namespace's traffic",
                at=("spec", "redirectFrontend", "serviceMatcher", "namespace"),
            )
        return self

    @property
    def service_reference(self) -> str | None:
        """The `Resource.reference` of the service whose traffic it takes; None where it takes an address'."""
        matcher = self.spec.redirect_frontend.service_matcher
        return f"Service/{matcher.namespace}/{matcher.service_name}" if matcher else None
