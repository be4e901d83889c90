"""PolicyTest: a table of who may reach whom, tried by ``hookline policy test``."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from itertools import product
from typing import Annotated, Any, Literal

from pydantic import BeforeValidator, Field, PlainSerializer, PlainValidator, WithJsonSchema, model_validator

from hookline.model._fields import Port, Protocol4
from hookline.model._parse import parse
from hookline.model._problems import InvalidResource, Refused, value_text
from hookline.model._resource import Own, OwnMetadata, OwnResource, Resource
from hookline.model.names import Endpoint, InvalidName

PROBE_LIMIT = 100_000


def _end(value: Any) -> str:
    if not isinstance(value, str):
        raise Refused(f"{value_text(value)} is not an end: a pod, external/NAME, node/NAME or an address")
    try:
        end = Endpoint.parse(value)
    except InvalidName as error:
        raise Refused(f"{error.what}: {error.why}", remedy=error.remedy) from None
    if end.port is not None:
        raise Refused(f"{value_text(value)} has a port", remedy=f"write {end.member}, and the port in port")
    return value


End = Annotated[str, PlainValidator(_end, json_schema_input_type=str), WithJsonSchema({"type": "string"})]


def _listed(value: Any) -> Any:
    return value if isinstance(value, list | tuple) else (value,)


def _as_written(value: Sequence[Any]) -> Any:
    return value[0] if len(value) == 1 else list(value)


OneOrMore = (BeforeValidator(_listed), Field(min_length=1), PlainSerializer(_as_written))


class Probe(Own):
    """One question: who asks whom, and what is to become of it.

    Attributes:
        source: ``NAMESPACE/POD`` (a bare name is in ``default``), ``external/NAME``, ``node/NAME`` or an address.
        target: The same.
        family: 4 or 6; None: both, where both ends have both.
    """

    source: End = Field(alias="from")
    target: End = Field(alias="to")
    port: Port
    protocol: Protocol4 = "TCP"
    expect: Literal["allow", "deny"]
    family: Literal[4, 6] | None = None


class ProbeLine(Own):
    """One or more probes: from each of the sources to each of the targets, on each of the ports with each protocol."""

    sources: Annotated[tuple[End, ...], *OneOrMore] = Field(alias="from")
    targets: Annotated[tuple[End, ...], *OneOrMore] = Field(alias="to")
    ports: Annotated[tuple[Port, ...], *OneOrMore] = Field(alias="port")
    protocols: Annotated[tuple[Protocol4, ...], *OneOrMore] = Field(default=("TCP",), alias="protocol")
    expect: Literal["allow", "deny"]
    family: Literal[4, 6] | None = None

    def __len__(self) -> int:
        return len(self.sources) * len(self.targets) * len(self.ports) * len(self.protocols)

    def probes(self) -> Iterator[Probe]:
        """Each of them by itself."""
        for source, target, protocol, port in product(self.sources, self.targets, self.protocols, self.ports):
            yield Probe.model_construct(
                source=source,
                target=target,
                port=port,
                protocol=protocol,
                expect=self.expect,
                family=self.family,
            )


def _file_or_object(value: Any) -> str | Resource:
    if isinstance(value, str):
        if not value:
            raise Refused("a file's name is empty")
        return value
    if isinstance(value, Resource):
        found = value
    else:
        try:
            found = parse(value)
        except InvalidResource as error:
            raise Refused.all(
                [Refused(one.why, remedy=one.remedy, at=one.path) for one in error.problems]
            ) from None
    if isinstance(found, PolicyTest):
        raise Refused("a PolicyTest is no resource of another", at=("kind",))
    return found


def _written(value: str | Resource) -> Any:
    return value if isinstance(value, str) else value.to_document()


FileOrObject = Annotated[
    str | Resource,
    PlainValidator(_file_or_object, json_schema_input_type=str | dict[str, Any]),
    PlainSerializer(_written),
    WithJsonSchema({}),
]
"""A file beside the table's own, or an object written out."""


def _once_each(resources: tuple[str | Resource, ...]) -> tuple[str | Resource, ...]:
    first: dict[str, int] = {}
    refusals = []
    for index, one in enumerate(resources):
        key = one if isinstance(one, str) else one.reference
        if (earlier := first.setdefault(key, index)) != index:
            refusals.append(Refused(f"{key} is already resources[{earlier}]", at=(index,)))
    if refusals:
        raise Refused.all(refusals)
    return resources


Resources = tuple[FileOrObject, ...]


class _Stage(Own):
    """What the table and each of its steps have."""

    description: str = ""
    source: str = ""
    resources: Resources = ()
    lines: tuple[ProbeLine, ...] = Field(default=(), alias="probes")

    @model_validator(mode="after")
    def _resources_once(self) -> _Stage:
        _at("resources", lambda: _once_each(self.resources))
        return self

    @property
    def probes(self) -> tuple[Probe, ...]:
        """Every single probe of the lines, in their order."""
        return tuple(probe for line in self.lines for probe in line.probes())


def _at(field: str, check: Callable[[], object]) -> None:
    try:
        check()
    except Refused as refused:
        raise Refused.all(
            [Refused(why, remedy=remedy, at=(field, *at)) for at, why, remedy in refused.complaints]
        ) from None


class PolicyTestStep(_Stage):
    """A change, and what holds after it.

    Attributes:
        description: What it is about, for people.
        source: Where it is said that this is to be so.
        resources: What is added, or replaces objects of the same kind, namespace and name.
        remove: References (``NetworkPolicy/default/web``) of what goes, before anything comes.
        lines: What is asked then.
    """

    remove: tuple[str, ...] = ()


class PolicyTestSpec(_Stage):
    """The resources to begin with, what is asked of them, and changes.

    Attributes:
        description: What it is about, for people.
        source: Where it is said that this is to be so.
        resources: Files (beside the table's own) and objects.
        lines: What is asked before the first step.
        steps: One after another; each begins with what the one before left.
    """

    steps: tuple[PolicyTestStep, ...] = ()

    @model_validator(mode="after")
    def _asks_something(self) -> PolicyTestSpec:
        if not self.lines and not any(step.lines for step in self.steps):
            raise Refused("the table asks nothing", remedy="add a probe", at=("probes",))
        number = sum(len(line) for stage in (self, *self.steps) for line in stage.lines)
        if number > PROBE_LIMIT:
            raise Refused(
                f"the table has {number} probes; at most {PROBE_LIMIT} are tried",
                remedy="split it",
                at=("probes",),
            )
        return self


class PolicyTest(OwnResource):
    """A table of who may reach whom (``hookline.dev/v1alpha1``)."""

    kind = "PolicyTest"
    plural = "policytests"
    short_names = ("pt",)

    metadata: OwnMetadata
    spec: PolicyTestSpec
