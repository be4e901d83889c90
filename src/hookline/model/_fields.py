"""The types of fields that several kinds share: addresses, ports, names.

Each validator answers in plain words (`Refused`) with the offending value and what is allowed.
"""

from __future__ import annotations

import ipaddress
import re
from collections.abc import Mapping, Sequence
from functools import lru_cache
from ipaddress import IPv4Address, IPv6Address
from typing import Annotated, Any, Literal, Protocol

from pydantic import (
    AfterValidator,
    BeforeValidator,
    Field,
    PlainSerializer,
    PlainValidator,
    WithJsonSchema,
)

from hookline.model._problems import Refused, value_text

IPAddress = IPv4Address | IPv6Address

BROADCAST = IPv4Address("255.255.255.255")
SUBDOMAIN = re.compile(r"[a-z0-9]([a-z0-9-]*[a-z0-9])?(\.[a-z0-9]([a-z0-9-]*[a-z0-9])?)*")
LABEL = re.compile(r"[a-z0-9]([a-z0-9-]*[a-z0-9])?")
LABEL_NAME = re.compile(r"[A-Za-z0-9]([A-Za-z0-9_.-]*[A-Za-z0-9])?")
PORT_NAME = re.compile(r"(?=.*[a-z])[a-z0-9]+(-[a-z0-9]+)*")
PORT_LIMIT = 65535


@lru_cache(maxsize=1 << 16)
def host_address(text: str) -> IPAddress:
    """One plain IPv4 or IPv6 address: no network, port, zone or host name.

    Raises:
        Refused: For anything else.
    """
    try:
        address = ipaddress.ip_address(text)
    except ValueError:
        raise _not_an_address(text) from None
    if isinstance(address, IPv6Address):
        if address.scope_id is not None:
            raise Refused(f"{value_text(text)} has a zone, which means something on one machine only")
        if address.ipv4_mapped is not None:
            raise Refused(
                f"{value_text(text)} is an IPv4 address in IPv6 clothes",
                remedy=f"write {address.ipv4_mapped}",
            )
    return address


@lru_cache(maxsize=1 << 16)
def _reachable_address(text: str) -> IPAddress:
    address = host_address(text)
    for wrong, reason in (
        (address.is_unspecified, 'is the unspecified address, which means "any" or "none"'),
        (address.is_loopback, "is a loopback address, which no packet from the network carries"),
        (address.is_multicast, "is a multicast address; a unicast one is needed"),
        (address.is_link_local, "is link-local: it means something on one link only and is not routed"),
        (address == BROADCAST, "is the broadcast address; a unicast one is needed"),
    ):
        if wrong:
            raise Refused(f"{value_text(text)} {reason}")
    return address


def _not_an_address(text: str) -> Refused:
    shown = value_text(text)
    if "/" in text:
        bare, _, _ = text.partition("/")
        return Refused(f"{shown} is a network; one plain host address is needed", remedy=f"write {bare[:45]}")
    host, colon, port = text.rpartition(":")
    if colon and port.isdigit() and re.fullmatch(r"[0-9.]+|\[[0-9a-fA-F:.]+\]", host):
        return Refused(
            f"{shown} has a port; one plain host address is needed", remedy="give the port in its own field"
        )
    return Refused(f"{shown} is not an IPv4 or IPv6 address")


def _address(value: Any) -> IPAddress:
    if isinstance(value, str):
        return _reachable_address(value)
    if isinstance(value, IPv4Address | IPv6Address):
        return _reachable_address(str(value))
    raise Refused(f"{value_text(value)} is not an IPv4 or IPv6 address, which is text such as 192.0.2.10")


def _address_as_written(value: str) -> str:
    host_address(value)
    return value


Address = Annotated[
    IPAddress,
    PlainValidator(_address, json_schema_input_type=str),
    PlainSerializer(str, return_type=str),
    WithJsonSchema({"type": "string"}),
]
"""A unicast address that packets can be sent to from another machine; for Hookline's own kinds."""

AddressText = Annotated[str, AfterValidator(_address_as_written)]
"""A host address kept as it was written; for Kubernetes' kinds."""


def _port_name(value: str) -> str:
    if len(value) > 15 or not PORT_NAME.fullmatch(value):
        raise Refused(
            f"{value_text(value)} is not a port's name: at most 15 of a-z, 0-9 and single hyphens, "
            "with at least one letter"
        )
    return value


def _port_or_name(value: Any) -> int | str:
    if isinstance(value, int) and not isinstance(value, bool) and 1 <= value <= PORT_LIMIT:
        return value
    if isinstance(value, str):
        if value.isdigit():
            raise Refused(
                f"{value_text(value)} in quotes is a name, not a number", remedy="remove the quotes"
            )
        return _port_name(value)
    raise Refused(f"{value_text(value)} is neither a whole number from 1 to {PORT_LIMIT} nor a port's name")


Port = Annotated[int, Field(strict=True, ge=1, le=PORT_LIMIT)]
PortName = Annotated[str, AfterValidator(_port_name)]
PortOrName = Annotated[int | str, PlainValidator(_port_or_name, json_schema_input_type=int | str)]
Protocol4 = Literal["TCP", "UDP", "SCTP"]
Strict = Field(strict=True)
WholeNumber = Annotated[int, Strict]
Switch = Annotated[bool, Strict]


def _object_name(value: str) -> str:
    if len(value) > 253 or not SUBDOMAIN.fullmatch(value):
        raise Refused(
            f"{value_text(value)} is not a name: at most 253 of a-z, 0-9, hyphens and dots, "
            "beginning and ending with a letter or digit"
        )
    return value


def _namespace_name(value: str) -> str:
    if value == "":
        return "default"
    if len(value) > 63 or not LABEL.fullmatch(value):
        raise Refused(
            f"{value_text(value)} is not a namespace's name: at most 63 of a-z, 0-9 and hyphens, "
            "beginning and ending with a letter or digit"
        )
    return value


@lru_cache(maxsize=1 << 12)
def _label_key(value: str) -> str:
    prefix, slash, name = value.rpartition("/")
    if slash and not (0 < len(prefix) <= 253 and SUBDOMAIN.fullmatch(prefix)):
        raise Refused(
            f"{value_text(value)} is not a label's key: before the slash stands a DNS name of at most 253 "
            "of a-z, 0-9, hyphens and dots"
        )
    if not (0 < len(name) <= 63 and LABEL_NAME.fullmatch(name)):
        raise Refused(
            f"{value_text(value)} is not a label's key: {'after the slash stand ' if slash else ''}at most 63 letters, "
            "digits, hyphens, underscores and dots, beginning and ending with a letter or digit"
        )
    return value


@lru_cache(maxsize=1 << 14)
def _label_value(value: str) -> str:
    if value and not (len(value) <= 63 and LABEL_NAME.fullmatch(value)):
        raise Refused(
            f"{value_text(value)} is not a label's value: empty, or at most 63 letters, digits, hyphens, "
            "underscores and dots, beginning and ending with a letter or digit"
        )
    return value


def _without_nulls(value: Any) -> Any:
    # Kubernetes reads a null in a map of texts as the empty text: the key stays, and a selector goes on asking for it.
    if isinstance(value, Mapping) and None in value.values():
        return {key: "" if text is None else text for key, text in value.items()}
    return value


LabelKey = Annotated[str, AfterValidator(_label_key)]
LabelValue = Annotated[str, AfterValidator(_label_value)]
Labels = Annotated[dict[LabelKey, LabelValue], BeforeValidator(_without_nulls)]
"""Labels, as Kubernetes limits them: https://kubernetes.io/docs/concepts/overview/working-with-objects/labels/."""

ObjectName = Annotated[str, AfterValidator(_object_name)]
NamespaceName = Annotated[str, AfterValidator(_namespace_name)]


class NamedPort(Protocol):
    """A port of a service, whatever its kind."""

    @property
    def name(self) -> str: ...
    @property
    def port(self) -> int: ...
    @property
    def protocol(self) -> str: ...


def port_refusals(ports: Sequence[NamedPort], at: tuple[str, ...] = ("ports",)) -> list[Refused]:
    """What is wrong with ports taken together: a name missing or used twice, a port used twice."""
    refusals: list[Refused] = []
    names: dict[str, int] = {}
    numbers: dict[tuple[int, str], int] = {}
    for index, port in enumerate(ports):
        if not port.name:
            if len(ports) > 1:
                refusals.append(
                    Refused("a name is required when there are several ports", at=(*at, index, "name"))
                )
        elif (first := names.setdefault(port.name, index)) != index:
            refusals.append(
                Refused(
                    f"{value_text(port.name)} is already the name of ports[{first}]", at=(*at, index, "name")
                )
            )
        if (first := numbers.setdefault((port.port, port.protocol), index)) != index:
            refusals.append(
                Refused(f"{port.port}/{port.protocol} is already ports[{first}]", at=(*at, index, "port"))
            )
    return refusals
