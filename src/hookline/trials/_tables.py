"""From table files to steps: for each the resources that hold then, with all addresses, and what is asked; no lab is touched.

All steps of a run are addressed together, so that a pod which is given no address has the same one wherever it comes up, and
no address is given out that some table names.
"""

from __future__ import annotations

import os
from collections.abc import Iterable, Iterator, Mapping, Sequence, Set
from dataclasses import dataclass, field
from typing import Any, cast

from hookline import lab
from hookline.control import Frontend, Pool
from hookline.control.catalogue import Catalogue
from hookline.control.inventory import Here
from hookline.lab import Family, LabError
from hookline.model import (
    ExternalHost,
    Node,
    Pod,
    PolicyTest,
    Probe,
    Resource,
    Service,
    VirtualService,
    parse,
)
from hookline.model.names import Address, Endpoint, InvalidName
from hookline.sources import files
from hookline.trials._errors import TrialError
from hookline.trials._rows import Verdict

FAMILIES: tuple[Family, ...] = (4, 6)
_PLANNED = "plan"  # stands for the lab's name where there is no lab


@dataclass(frozen=True, slots=True)
class Asked:
    """A probe in one family.

    Attributes:
        source: The end that asks, as the table has it; ``target`` likewise.
        asking: The lab's member that asks: ``default/a``, ``node/n``, ``external/x``; ``asked`` the one that is asked.
        via: The service's address and port that are asked, whose one backend is ``asked``; None: the member's own.
        listening: The port on which the asked one listens; the table's where no service has another.
    """

    source: str
    target: str
    asking: str
    asked: str
    port: int
    protocol: str
    family: Family
    expect: Verdict
    via: tuple[Address, int] | None
    listening: int

    @property
    def destination(self) -> str:
        """Who is asked as policies see it, which is after a service's translation."""
        return self.asked if self.via is not None else Endpoint.parse(self.target).member


@dataclass(frozen=True, slots=True)
class Step:
    """What holds at one step of a table.

    Attributes:
        number: 0 before the first of the table's steps.
        resources: All that holds, addresses filled in.
        plan: The members of the lab that it takes.
        asked: Its probes.
    """

    test: str
    number: int
    resources: tuple[Resource, ...]
    plan: lab.Plan
    asked: tuple[Asked, ...]

    def __str__(self) -> str:
        return f"{self.test} step {self.number}" if self.number else self.test


def read_tables(paths: Iterable[str | os.PathLike[str]]) -> list[Step]:
    """The steps of the `PolicyTest`s in these files and folders, in their order.

    Raises:
        model.InvalidResource: A document is wrong, or a file that a table names.
        TrialError: There is no table, two have one name, or a probe names what is not there.
    """
    named = [os.fspath(path) for path in paths]
    loaded = files.load(named)
    tables = [one for one in loaded if isinstance(one, PolicyTest)]
    others = [one for one in loaded if not isinstance(one, PolicyTest)]
    if not tables:
        raise TrialError(
            "there is nothing to try",
            why=f"{', '.join(named) or 'no file'} holds no PolicyTest",
            remedy="examples/policies/policytest.yaml shows one",
        )
    raw = [one for table in tables for one in _raw_steps(table, others)]
    return list(_Addressing(raw).steps())


@dataclass(slots=True)
class _RawStep:
    table: PolicyTest
    number: int
    resources: tuple[Resource, ...]
    probes: Sequence[Probe]

    def __str__(self) -> str:
        return f"{self.table.reference} step {self.number}"


def _raw_steps(table: PolicyTest, others: Sequence[Resource]) -> Iterator[_RawStep]:
    """The table's steps, each with all that holds then; what stands beside tables in their files holds for all of them."""
    held = {one.reference: one for one in others}
    held |= {one.reference: one for one in _resources(table, table.spec.resources)}
    yield _RawStep(table, 0, tuple(held.values()), table.spec.probes)
    for number, step in enumerate(table.spec.steps, 1):
        for reference in step.remove:
            if reference not in held:
                raise TrialError(
                    f"{table.reference} step {number} removes {reference}",
                    why="there is none at that step",
                    remedy=f"there are {', '.join(sorted(held)) or 'no resources'}",
                )
            del held[reference]
        held |= {one.reference: one for one in _resources(table, step.resources)}
        yield _RawStep(table, number, tuple(held.values()), step.probes)


def _resources(table: PolicyTest, given: Iterable[str | Resource]) -> list[Resource]:
    """Resources of a table: files beside its own, and documents."""
    found: list[Resource] = []
    folder = os.path.dirname(table.origin.path) if table.origin is not None else ""
    for one in given:
        found += files.load([os.path.join(folder, one)]) if isinstance(one, str) else [one]
    nested = next((one for one in found if isinstance(one, PolicyTest)), None)
    if nested is not None:
        raise TrialError(
            f"{table.reference} has {nested.reference} among its resources",
            why="a table is no resource of another",
            remedy="name its file on the command line",
        )
    return found


@dataclass(slots=True)
class _Ends:
    """Who the ends of a step's probes are; machines that only probes name are made up."""

    step: _RawStep
    pods: Mapping[str, Pod]
    plan: lab.Plan
    services: Mapping[Frontend, Pool]
    by_address: Mapping[Address, str] = field(init=False)

    def __post_init__(self) -> None:
        self.by_address = {a: member.endpoint for member in self.plan.members for a in member.addresses}

    def backend(self, probe: Probe) -> tuple[str, int] | None:
        """The member and its port behind a service's address, where the target is one.

        Raises:
            TrialError: The service does not have that port, or not one backend.
        """
        address = _endpoint(probe.target, self.step).address
        if address is None or address in self.by_address:
            return None
        pool = next(
            (
                pool
                for one, pool in self.services.items()
                if (one.address, one.port, one.protocol) == (address, probe.port, probe.protocol)
            ),
            None,
        )
        targets = [one for one in pool.targets if one.effective_weight] if pool is not None else []
        if len(targets) != 1:
            raise TrialError(
                f"{self.step}: {probe.target}:{probe.port}/{probe.protocol} cannot be probed",
                why=f"{len(targets)} backends take its connections, and which of them is asked would be chance"
                if pool is not None
                else "the service has no such port",
                remedy="give the service one backend" if pool is not None else "probe a port that it has",
            )
        return self.by_address[targets[0].address], targets[0].port

    def member(self, text: str) -> tuple[str, Address | None]:
        """The lab's member behind an end of a probe, and the address where the end is one."""
        end = _endpoint(text, self.step)
        if end.address is not None:
            return self.by_address[end.address], end.address
        pod = self.pods.get(end.member) if end.kind == "pod" else None
        if pod is not None and pod.spec.host_network:
            return f"node/{pod.spec.node_name or self.plan.nodes[0].name}", None
        if pod is not None and not _is_member(pod):
            raise TrialError(
                f"{self.step}: {text} cannot be probed",
                why=f"the pod has {'ended' if pod.has_ended else 'no address yet'}",
                remedy="probe its address instead" if pod.addresses else "",
            )
        if self.plan.member(end.member) is None:
            there = ", ".join(sorted(member.endpoint for member in self.plan.members))
            raise TrialError(
                f"{self.step}: there is no {text}",
                why=f"the step has {there}",
                remedy="add it to the resources, or mend the name",
            )
        return end.member, None


class _Addressing:
    """Gives every member of every step its addresses."""

    def __init__(self, raw: Sequence[_RawStep]) -> None:
        self._raw = raw
        self._given = frozenset(
            address
            for step in raw
            for one in step.resources
            if _is_member(one)
            for address in _addresses(one)
        ) | frozenset(
            end.address
            for step in raw
            for probe in step.probes
            for end in (_endpoint(probe.source, step), _endpoint(probe.target, step))
            if end.address is not None
        )
        self._chosen: dict[tuple[Any, ...], tuple[Address, ...]] = {}
        self._networks: dict[str, Any] = {}

    def steps(self) -> Iterator[Step]:
        """The steps, ready to be tried."""
        for step in self._raw:
            try:
                yield self._step(step)
            except LabError as error:
                raise TrialError(
                    f"{step} cannot be tried: {error.what}", why=error.why, remedy=error.remedy
                ) from None

    def _step(self, step: _RawStep) -> Step:
        members = [self._known(one) for one in step.resources if _is_member(one)]
        services = _services(step.resources)
        made_up = self._made_up(step, members, {one.address for one in services})
        reserved = self._given.union(*self._chosen.values()) if self._chosen else self._given
        plan = lab.plan((*members, *made_up), _PLANNED, FAMILIES, reserved=reserved)
        self._note(step, plan)
        filled = {one.reference: one for one in plan.resources}
        for one in made_up:
            del filled[one.reference]
        nodes = {one.name: one for one in plan.resources if isinstance(one, Node)}
        for one in step.resources:
            if not _is_member(one):
                filled[one.reference] = _in_node(one, nodes) if isinstance(one, Pod) else one
        pods = {f"{one.namespace}/{one.name}": one for one in step.resources if isinstance(one, Pod)}
        ends = _Ends(step, pods, plan, services)
        asked = tuple(row for probe in step.probes for row in _asked(probe, ends))
        return Step(step.table.name, step.number, tuple(filled.values()), plan, asked)

    def _known(self, one: Resource) -> Resource:
        """The resource with the addresses that it was given in an earlier step."""
        addresses = self._chosen.get(_key(one))
        if addresses is not None:
            one = _with_addresses(one, addresses)
        if isinstance(one, Node) and not one.spec.pod_cidrs and one.name in self._networks:
            document = one.to_document()
            document.setdefault("spec", {})["podCIDRs"] = self._networks[one.name]
            one = parse(document, one.origin)
        return one

    def _note(self, step: _RawStep, plan: lab.Plan) -> None:
        filled = {one.reference: one for one in plan.resources}
        for one in step.resources:
            if _is_member(one) and isinstance(one, Node | Pod | ExternalHost):
                self._chosen.setdefault(_key(one), _addresses(filled[one.reference]))
        for one in plan.resources:
            if isinstance(one, Node):
                self._chosen.setdefault(("Node", one.name, "", ()), _addresses(one))
                self._networks.setdefault(one.name, list(one.spec.pod_cidrs))

    def _made_up(self, step: _RawStep, members: Sequence[Resource], services: Set[Address]) -> list[Resource]:
        """A machine outside for every address that probes name and no member or service has."""
        there = {address for one in members for address in _addresses(one)} | services
        found: dict[Address, Resource] = {}
        for probe in step.probes:
            for text in (probe.source, probe.target):
                address = _endpoint(text, step).address
                if address is not None and address not in there and address not in found:
                    found[address] = parse(
                        {
                            "apiVersion": "hookline.dev/v1alpha1",
                            "kind": "ExternalHost",
                            "metadata": {
                                "name": f"at-{address.exploded.replace('.', '-').replace(':', '-')}"
                            },
                            "spec": {"addresses": [str(address)]},
                        }
                    )
        return [self._known(one) for one in found.values()]


def _asked(probe: Probe, ends: _Ends) -> Iterator[Asked]:
    asking, one = ends.member(probe.source)
    via, listening = None, probe.port
    backend = ends.backend(probe)
    if backend is None:
        asked, other = ends.member(probe.target)
    else:
        asked, listening = backend
        other = Endpoint.parse(probe.target).address
        assert other is not None, "services are asked by address"
        via = (other, probe.port)
    versions = {address.version for address in (one, other) if address is not None}
    families = tuple(family for family in FAMILIES if not versions or versions == {family})
    if probe.family is not None:
        families = tuple(family for family in families if family == probe.family)
    if not families:
        raise TrialError(
            f"{ends.step}: no packet goes from {probe.source} to {probe.target}",
            why="they have no address family in common",
            remedy="give addresses of one family",
        )
    for family in families:
        yield Asked(
            probe.source,
            probe.target,
            asking,
            asked,
            probe.port,
            probe.protocol,
            family,
            probe.expect,
            via,
            listening,
        )


def _services(resources: Sequence[Resource]) -> dict[Frontend, Pool]:
    """What stands behind the addresses of services, by where it is asked for."""
    if not any(isinstance(one, Service | VirtualService) for one in resources):
        return {}
    pools = Catalogue.of(resources, Here()).pools.values()
    return {frontend: pool for mine in pools for pool in mine for frontend in pool.frontends}


def _is_member(one: Resource) -> bool:
    """Whether a resource is one that a lab is made of: not what has no network namespace of its own (any more, or yet)."""
    if isinstance(one, Pod):
        return not (
            one.spec.host_network or one.has_ended or (one.status.phase == "Pending" and not one.addresses)
        )
    return isinstance(one, lab.LAB_KINDS)


def _in_node(pod: Pod, nodes: Mapping[str, Node]) -> Pod:
    """A pod of its node's own network, with the node's addresses; any other pod as it is."""
    if not pod.spec.host_network or pod.has_ended or pod.addresses:
        return pod
    node = nodes.get(pod.spec.node_name) or next(iter(nodes.values()))
    document = _with_addresses(pod, node.addresses).to_document()
    document["spec"]["nodeName"] = node.name
    return cast(Pod, parse(document, pod.origin))


def _addresses(one: Resource) -> tuple[Address, ...]:
    return tuple(one.addresses) if isinstance(one, Node | Pod | ExternalHost) else ()


def _key(one: Resource) -> tuple[Any, ...]:
    node = one.spec.node_name if isinstance(one, Pod) else ""
    return (one.kind, f"{one.namespace}/{one.name}" if one.namespace else one.name, node, _addresses(one))


def _with_addresses(one: Resource, addresses: Iterable[Address]) -> Resource:
    document = one.to_document()
    texts = [str(address) for address in addresses]
    if isinstance(one, ExternalHost):
        document["spec"].pop("address", None)
        document["spec"]["addresses"] = texts
    elif isinstance(one, Node):
        status = document.setdefault("status", {})
        others = [entry for entry in status.get("addresses", []) if entry.get("type") != "InternalIP"]
        status["addresses"] = [{"type": "InternalIP", "address": text} for text in texts] + others
    else:
        status = document.setdefault("status", {})
        status["podIP"] = texts[0]
        status["podIPs"] = [{"ip": text} for text in texts]
    return parse(document, one.origin)


def _endpoint(text: str, step: _RawStep) -> Endpoint:
    try:
        end = Endpoint.parse(text)
    except InvalidName as error:
        raise TrialError(f"{step}: {error.what}", why=error.why, remedy=error.remedy) from None
    if end.port is not None:
        raise TrialError(
            f"{step}: {text} has a port",
            why="a probe's port stands beside it",
            remedy=f"to: {end.member}, port: {end.port}",
        )
    return end
