"""Kubernetes' LabelSelector, and what the kinds that pick pods share."""

from __future__ import annotations

from collections.abc import Mapping
from ipaddress import IPv4Address
from typing import Annotated, Any, Literal

from pydantic import Field, PlainSerializer, PlainValidator, WithJsonSchema, model_validator

from hookline.model._fields import BROADCAST, IPAddress, LabelKey, Labels, LabelValue, host_address
from hookline.model._problems import Refused, value_text
from hookline.model._resource import Own


class LabelExpression(Own):
    """One condition on a label."""

    key: LabelKey
    operator: Literal["In", "NotIn", "Exists", "DoesNotExist"]
    values: tuple[LabelValue, ...] = ()

    @model_validator(mode="after")
    def _values(self) -> LabelExpression:
        needs = self.operator in ("In", "NotIn")
        if needs and not self.values:
            raise Refused(f"{self.operator} needs at least one value", at=("values",))
        if not needs and self.values:
            raise Refused(f"{self.operator} takes no values", remedy="remove them", at=("values",))
        return self

    def accepts(self, labels: Mapping[str, str]) -> bool:
        """Whether labels fulfil the condition."""
        match self.operator:
            case "In":
                return labels.get(self.key) in self.values
            case "NotIn":
                return labels.get(self.key) not in self.values
            case "Exists":
                return self.key in labels
        return self.key not in labels


class LabelSelector(Own):
    """Which objects by their labels: all conditions together. Empty, it takes every object."""

    match_labels: Labels = Field(default={})
    match_expressions: tuple[LabelExpression, ...] = ()

    def accepts(self, labels: Mapping[str, str]) -> bool:
        """Whether an object with these labels is meant."""
        return self.match_labels.items() <= labels.items() and all(
            expression.accepts(labels) for expression in self.match_expressions
        )


def _node_address(value: Any) -> IPAddress:
    if not isinstance(value, str | IPAddress):
        raise Refused(
            f"{value_text(value)} is not an IPv4 or IPv6 address, which is text such as 169.254.20.10"
        )
    address = host_address(str(value))
    for wrong, reason in (
        (address.is_unspecified, 'is the unspecified address, which means "any" or "none"'),
        (address.is_loopback, "is a loopback address, which is another machine's in every pod"),
        (address.is_multicast, "is a multicast address; a unicast one is needed"),
        (
            address.is_link_local and not isinstance(address, IPv4Address),
            "is link-local: without an interface it means nothing",
        ),
        (address == BROADCAST, "is the broadcast address; a unicast one is needed"),
    ):
        if wrong:
            raise Refused(f"{value_text(str(value))} {reason}")
    return address


NodeLocalAddress = Annotated[
    IPAddress,
    PlainValidator(_node_address, json_schema_input_type=str),
    PlainSerializer(str, return_type=str),
    WithJsonSchema({"type": "string"}),
]
"""A unicast address that the node's own programs may connect to: also 169.254.0.0/16, which no packet brings from outside."""
