"""Policies' part of a node's change: from documents to the firewall's rows, and from these to the kernel.

It is one of the two parts of `Node`'s transaction, beside that of services; either may have nothing to do. `Policies.draft`
works out the rows and refuses what cannot be; `carry_out` shows them to the programs in one step and attaches these where they
are missing; `undo` goes back to the rows before, should the rest of the change fail. Once the change is committed `cut` ends the
sockets of connections that are not allowed any more; their packets are dropped from the step on.

- The firewall is on a node only while a policy is: a NetworkPolicy puts it on the interface of every pod of the node, also of
  those that no policy selects; a HostPolicy that selects the node on the uplinks, and on the pods' interfaces, too: a pod that
  sends with another's address could else be answered in the node's name.
- An interface is a pod's by the node's own route to the pod's address. Rows name interfaces by their index, so an interface that
  was made anew is another one.
- A process that is killed leaves rows and programs of the change before or of this one, never of both, as rows are shown by one
  store. The next process that comes works out the same rows from the documents and commits them; sockets that were not ended are
  found by the connections that the firewall remembers as cut.
"""

from __future__ import annotations

import os
import socket
import zlib
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from contextlib import ExitStack, contextmanager, suppress
from dataclasses import dataclass, field
from functools import partial
from ipaddress import IPv4Address, IPv6Address
from pathlib import Path
from typing import Any

import numpy as np

from hookline import bpf, net
from hookline.control._errors import ControlError, DoesNotFit
from hookline.control.drift import Repair, link_drift, link_state, pinned_names
from hookline.control.judging import cut_by, no_longer_allowed
from hookline.control.placement import packed
from hookline.control.plan import Plan, PolicyChange, PolicyDraft, Usage
from hookline.control.state import State
from hookline.control.statuses import Counted
from hookline.control.verdicts import Connection, Names, RuleCount, Verdicts, connections, lock_verdicts
from hookline.datapath import pinning
from hookline.datapath.firewall import firewall as driver
from hookline.datapath.firewall.firewall import (
    FOLDER,
    NODE_ITSELF,
    OF_ROLE,
    Firewall,
    Older,
    Role,
    Rows,
    Totals,
    Tracked,
    Tunables,
)
from hookline.datapath.pinning import Attachment
from hookline.errors import HooklineError
from hookline.model import NodeConfig, Pod, Resource
from hookline.model.names import NodeName, pod_netns
from hookline.policy import Compiled, Compiler, PolicyRow, RuleNumbers, RuleSource, TooManyRows, World

Address = IPv4Address | IPv6Address
BANKED = ("endpoints", "identities", "rules", "own_addresses")
SETTINGS = {
    "endpoints": "endpoints",
    "identities": "identities",
    "rules": "rules",
    "own_addresses": "ownAddresses",
}
STAYS = (
    "the firewall stays as it is: it enforces policies that no object describes since the state was lost; "
    "hookline state repair --drop-unclaimed goes by the objects alone"
)
LOOKS = 256
"""Attachments that one look for drift reads."""
LEFT = "sockets of connections that are cut are not ended"


@dataclass(slots=True)
class _Held:
    """What this process holds of the kernel's side, in step with it as long as nobody else changes it."""

    firewall: Firewall
    rows: Rows | None = None
    generation: int = 0
    interfaces: Mapping[str, Role] = field(default_factory=dict)
    indexes: Mapping[str, int] = field(default_factory=dict)
    links: dict[str, tuple[int, int, str]] = field(default_factory=dict)
    pinned: frozenset[str] = frozenset()
    settled: bool = False
    looked_for_cut: bool = False
    next_look: int = 0
    sums: tuple[int, ...] = ()  # of the rows when they were last found well


class Policies:
    """Policies' part of one node. What is called in the node's network namespace says so.

    Args:
        name: The node.
    """

    def __init__(self, name: NodeName) -> None:
        self._name = name
        self._pins = name.pins
        self.world = World()
        self._numbers = RuleNumbers()
        self._compiler = Compiler(self._numbers)
        self._sources: Mapping[int, RuleSource] = {}
        self._names: tuple[World, Names] | None = None
        self._held: _Held | None = None
        self._undo: Callable[[], object] = _nothing
        self.problems: tuple[str, ...] = ()
        # Network namespaces by the ids by which the node's knows them; of one change.
        self._namespaces: dict[int, Path] | None = None
        self._ports: dict[str, tuple[Pod, Mapping[Address, tuple[str, int]]]] = {}
        self._uplinks: tuple[NodeConfig | None, tuple[str, ...]] | None = None

    # -- staying in step

    def start(
        self, resources: Iterable[Resource], names: Iterable[str], numbers: Mapping[RuleSource, int]
    ) -> None:
        """Begins with what the state says."""
        self.forget()
        self.world = World.of(resources, node=self._name.node, names=names)
        place = self._name.netns
        if self._concerned(self.world) and (place is None or place.exists()):
            with suppress(net.NetworkError), net.inside(place):  # who may not look there may still read
                self.world = self.world.changed((), (), addresses=net.own_addresses())
        self._numbers = RuleNumbers(numbers)
        self._compiler = Compiler(self._numbers)
        self._sources = {number: source for source, number in numbers.items()}

    def forget(self) -> None:
        """Lets go of the kernel's side: it is to be read again."""
        if self._held is not None:
            self._held.firewall.close()
            self._held = None
        self._ports = {}
        self._uplinks = None

    def forget_fresh(self) -> None:
        """Lets go of programs that were loaded for a plan only."""
        if self._held is not None and self._held.firewall.fresh:
            self.forget()

    def unsettle(self) -> None:
        """Has the next change ask for all routes and addresses again."""
        self._ports = {}

    @property
    def is_settled(self) -> bool:
        """Whether the kernel has what this process brought about, as far as it knows."""
        return self._held is not None and self._held.settled

    @property
    def needs_look(self) -> bool:
        """Whether there is a policy, and this process has not seen what the kernel makes of it."""
        return self._concerned(self.world) and not self.is_settled

    @property
    def exists(self) -> bool:
        """Whether anything of a firewall is on the node."""
        return Firewall.exists(self._pins)

    @staticmethod
    def _concerned(world: World) -> bool:
        return bool(world.policies or world.host_policies)

    # -- drafting

    def draft(
        self,
        plan: Plan,
        gone: Sequence[Resource],
        come: Sequence[Resource],
        config: NodeConfig | None,
        ask_uplinks: Callable[[], tuple[str, ...]],
        *,
        full: bool,
        lost: bool,
    ) -> PolicyDraft:
        """Works out the rows and what is attached; loads the programs, unattached, where they are not. In the node's namespace.

        Args:
            plan: Filled in.
            gone: Objects that go, and former ones of those that change.
            come: Objects that come, or are others than before.
            config: The node's configuration after the change.
            ask_uplinks: Gives the node's uplinks.
            full: Look at all routes and addresses again; pods that cannot be served are passed over with a warning.
            lost: The state was lost, and the kernel may enforce policies that nobody knows any more.

        Raises:
            DoesNotFit: A map of the firewall cannot hold what is wanted.
            ControlError: An interface is two pods'.
            bpf.BpfError: The kernel refuses the programs.
        """
        self._namespaces = None
        world = self.world.changed(gone, come)
        if self._concerned(world) and (full or self._held is None or not world.addresses):
            is_needed = bool(world.host_policies)
            uplinks = self._known_uplinks(config, ask_uplinks, is_needed=is_needed, again=full)
            world = world.changed((), (), addresses=net.own_addresses(link_local_of=uplinks))
        draft = PolicyDraft(world)
        if not self._concerned(world):
            if self.exists:
                if lost:
                    draft.stays = True
                    plan.warnings.append(STAYS)
                else:
                    plan.policies = PolicyChange(detaches=True)
            return draft
        compiled = self._compile(world)
        draft.compiled = compiled
        is_host = "" in compiled.endpoints
        local = [pod for pod in compiled.endpoints if pod] if world.policies or is_host else []
        if full or self._held is None:
            self._ports = {}
        uplinks = self._known_uplinks(config, ask_uplinks, is_needed=is_host, again=False)
        draft.ports = self._find_ports(world, local, frozenset(uplinks), draft.problems, lenient=full)
        plan.warnings += draft.problems
        interfaces: dict[str, Role] = {
            name: "pod" for ports in draft.ports.values() for name, _ in ports.values()
        }
        interfaces.update(dict.fromkeys(uplinks if is_host else (), "uplink"))
        draft.interfaces = interfaces
        draft.wanted = bool(interfaces)
        if not draft.wanted:
            if self.exists:
                plan.policies = PolicyChange(detaches=True)
            return draft
        draft.rows = self._rows(world, compiled, draft.ports, is_host=is_host)
        self._draft_kernel(draft, plan, config, lost=lost)
        return draft

    def _known_uplinks(
        self,
        config: NodeConfig | None,
        ask: Callable[[], tuple[str, ...]],
        *,
        is_needed: bool,
        again: bool,
    ) -> tuple[str, ...]:
        """The node's uplinks, asked for where the configuration changed; none, unless needed, where there are none."""
        known = self._uplinks
        if known is None or known[0] != config or again or (is_needed and not known[1]):
            try:
                known = (config, ask())
            except net.NetworkError:
                if is_needed:
                    raise
                known = (config, ())
            self._uplinks = known
        return known[1]

    def _compile(self, world: World) -> Compiled:
        limit = self._held.firewall.capacity()["rules"] if self._held is not None else None
        try:
            return self._compiler.compile(world, limit=limit)
        except TooManyRows as error:
            raise DoesNotFit(
                error.what,
                why=error.why,
                remedy="have fewer different selectors, or raise spec.maps.rules of the NodeConfig",
            ) from None

    def _find_ports(
        self,
        world: World,
        local: Iterable[str],
        uplinks: frozenset[str],
        problems: list[str],
        *,
        lenient: bool,
    ) -> dict[str, Mapping[Address, tuple[str, int]]]:
        """Interface and index by pod and address; asked of the kernel for pods that are new, moved or made anew."""
        indexes = net.interface_indexes(
            {interface for _, ports in self._ports.values() for interface, _ in ports.values()}
        )
        known: dict[str, tuple[Pod, Mapping[Address, tuple[str, int]]]] = {}
        unknown: dict[str, Pod] = {}
        for name in local:
            resource, before = world.pods[name], self._ports.get(name)
            if (
                before is not None
                and (before[0] is resource or before[0].addresses == resource.addresses)
                and all(indexes[interface] == index for interface, index in before[1].values())
            ):
                known[name] = (resource, before[1])
            else:
                unknown[name] = resource
        routes = net.routes_to(address for pod in unknown.values() for address in pod.addresses)
        for name, pod in unknown.items():
            found = {
                address: route.interface
                for address, route in ((address, routes[address]) for address in pod.addresses)
                if route.kind == "unicast" and route.gateway is None and route.interface not in uplinks
            }
            if not found:
                problems.append(f"pod {name}: no policy is enforced: no interface of this node leads to it")
                continue
            # An address that no route leads to is where another one of the pod's is.
            first_one = next(iter(found.values()))
            numbers = net.interface_indexes(set(found.values()))
            if all(numbers.values()):
                places = {address: found.get(address, first_one) for address in pod.addresses}
                known[name] = (pod, {address: (place, numbers[place]) for address, place in places.items()})
        owners: dict[str, str] = {}
        for name, interface in [
            (name, interface)
            for name, (_, ports) in known.items()
            for interface in dict.fromkeys(interface for interface, _ in ports.values())
        ]:
            if (first := owners.setdefault(interface, name)) != name:
                what = f"pods {first} and {name} are both behind {interface}"
                if not lenient:
                    raise ControlError(
                        f"policies cannot be enforced: {what}",
                        why="the firewall is on pods' own interfaces, and one interface has one pod's policies",
                        remedy="route pods by interfaces of their own instead of a bridge",
                    )
                problems.append(f"{what}: only the first one's policies are enforced")
                known.pop(name, None)
        self._ports = known
        return {pod: ports for pod, (_, ports) in known.items()}

    @staticmethod
    def _rows(
        world: World,
        compiled: Compiled,
        ports: Mapping[str, Mapping[Address, tuple[str, int]]],
        *,
        is_host: bool,
    ) -> Rows:
        index_of = {
            (pod, packed(address)): index
            for pod, places in ports.items()
            for address, (_, index) in places.items()
        }
        endpoints = {
            index: row for pod, row in compiled.endpoints.items() for _, index in ports.get(pod, {}).values()
        }
        if is_host:
            endpoints[NODE_ITSELF] = compiled.endpoints[""]
        return Rows(
            endpoints,
            {
                key: (identity, index_of.get((pod, key[0]), 0) if pod else 0)
                for key, (identity, pod) in compiled.identities.items()
            },
            compiled.rules,
            frozenset(map(packed, world.own_addresses)) if is_host else frozenset(),
        )

    def _draft_kernel(self, draft: PolicyDraft, plan: Plan, config: NodeConfig | None, *, lost: bool) -> None:
        tunables = tunables_of(config)
        held = self._held
        if held is None or held.firewall.tunables != tunables:
            if held is not None:
                held.firewall.close()
            firewall = Firewall.open(self._pins, tunables)
            held = self._held = _Held(firewall)
        firewall = held.firewall
        draft.in_step = (
            held.settled
            and held.interfaces == draft.interfaces
            and held.indexes == net.interface_indexes(draft.interfaces)
            and held.generation == firewall.generation
        )
        if held.rows is None or held.generation != firewall.generation:
            held.rows = firewall.rows() if firewall.generation else Rows()
            held.generation = firewall.generation
        if lost and not _covers(draft.rows, held.rows):
            draft.stays = True
            plan.warnings.append(STAYS)
            return
        capacity = firewall.capacity()
        for name in BANKED:
            needed = len(getattr(draft.rows, name))
            plan.usage[f"firewall_{name}"] = Usage(needed, capacity[name])
            if needed > capacity[name]:
                raise DoesNotFit(
                    f"{needed:,} {name.replace('_', ' ')} of policies do not fit",
                    why=f"the firewall's map has room for {capacity[name]:,}",
                    remedy=f"raise spec.maps.{SETTINGS[name]} of the NodeConfig, or have fewer policies",
                )
        attached = set(() if draft.in_step else pinning.attached(self._pins / FOLDER))
        plan.attaches += [
            f"{program} to {interface}"
            for interface, role in draft.interfaces.items()
            for program in OF_ROLE[role]
            if not draft.in_step and (program, interface) not in attached
        ]
        before = held.rows
        plan.policies = PolicyChange(
            loads=firewall.fresh,
            rules_added=_count_differing(draft.rows.rules, before.rules),
            rules_removed=_count_differing(before.rules, draft.rows.rules),
            endpoints=_count_differing(draft.rows.endpoints, before.endpoints),
            identities=_count_differing(draft.rows.identities, before.identities),
        )

    def work_out_cut(self, draft: PolicyDraft, plan: Plan) -> None:
        """Fills in, for a dry run, how many open connections the change would cut."""
        held = self._held
        if held is None or plan.policies is None or plan.policies.detaches or draft.stays:
            return
        found = [one for one in held.firewall.tracked() if not one.cut] if not held.firewall.fresh else []
        assert held.rows is not None
        plan.policies.connections_cut = len(cut_by(held.rows, draft.rows, found))

    # -- carrying out

    def carry_out(self, draft: PolicyDraft, state: State) -> list[Attachment]:
        """Brings the kernel to the draft, unless the firewall goes. In the node's namespace, in the state's transaction.

        Raises:
            bpf.BpfError: The kernel refuses; what was is in force.
        """
        self._undo = _nothing
        if draft.stays:
            return []
        if not draft.wanted:
            state.put_rule_numbers(self._sources.values(), {})
            return []
        held = self._held
        assert held is not None
        assert draft.compiled is not None
        self._note_numbers(draft.compiled, state, held)
        if pinning.attached(self._pins / FOLDER):
            self._undo = partial(_go_back, held.firewall, held.rows, held.interfaces)
        else:
            self._undo = partial(driver.remove, self._pins)
        held.settled = False
        draft.before = held.rows or Rows()
        held.generation = held.firewall.commit(draft.rows)
        held.rows = draft.rows
        if draft.in_step:
            held.settled = True
            return []
        try:
            self._remember_older(held, draft)
            attachments = held.firewall.activate(draft.interfaces)
        except BaseException:
            self.undo()
            raise
        held.interfaces, held.indexes = draft.interfaces, net.interface_indexes(draft.interfaces)
        folder = self._pins / FOLDER
        held.links, held.pinned = link_state(folder), pinned_names(folder)
        held.settled = True
        return attachments

    def carry_out_end(self, draft: PolicyDraft) -> list[Attachment]:
        """Takes the firewall off a node that no policy is for any more: the last step, as there is no way back from it."""
        return self.remove() if self.exists and not (draft.wanted or draft.stays) else []

    def _note_numbers(self, compiled: Compiled, state: State, held: _Held) -> None:
        """Keeps the numbers of rules that there are; counters of numbers that are given out again begin at zero."""
        if compiled.sources is self._sources:
            return
        come = {
            source: number
            for number, source in compiled.sources.items()
            if self._sources.get(number) != source
        }
        gone = [source for number, source in self._sources.items() if compiled.sources.get(number) != source]
        if not come and not gone:
            return
        state.put_rule_numbers(gone, come)
        counts = held.firewall.maps["rule_counts"]
        keys = np.array(sorted(one for one in come.values() if one < counts.max_entries), counts.key_dtype)
        if len(keys) and not held.firewall.fresh:
            shape = (len(keys), bpf.possible_cpus())
            counts.write(keys, np.zeros(shape, counts.value_dtype))

    def _remember_older(self, held: _Held, draft: PolicyDraft) -> None:
        """Has connections that are older than the firewall be judged as what they are, though their beginning was not seen."""
        there = {interface for _, interface in pinning.attached(self._pins / FOLDER)}
        older = []
        for pod, ports in draft.ports.items():
            is_new = any(interface not in there for interface, _ in ports.values())
            place = self._namespace_of(pod, draft) if is_new else None
            if place is None:
                continue
            own = frozenset(draft.world.pods[pod].addresses)
            with suppress(net.NetworkError), net.inside(place):
                older += [
                    Older(
                        ports[one.local][1],
                        one.local,
                        one.remote,
                        one.local_port,
                        one.remote_port,
                        "egress" if one.opened else "ingress",
                    )
                    for one in net.connected_sockets((socket.IPPROTO_TCP,))
                    if one.local in own and one.remote not in own and ports[one.local][0] not in there
                ]
        held.firewall.remember(older)

    def settle(self, draft: PolicyDraft) -> None:
        """The change is committed."""
        self._undo = _nothing
        self.world = draft.world
        self.problems = tuple(draft.problems)
        if draft.stays:
            return
        if draft.compiled is not None and draft.wanted:
            self._sources = draft.compiled.sources
            self._numbers.forget(
                [one for one, number in self._numbers.known.items() if number not in self._sources]
            )
        else:
            self._sources = {}
            self._numbers = RuleNumbers()
            self._compiler = Compiler(self._numbers)

    def undo(self) -> None:
        """Goes back to the rows and attachments before, as far as the kernel lets that be; all is looked at again then."""
        undo, self._undo = self._undo, _nothing
        with suppress(HooklineError):  # the next change puts it right
            undo()
        self.forget()

    def remove(self) -> list[Attachment]:
        """Takes the firewall off the node."""
        self.forget()
        return driver.remove(self._pins)

    # -- connections that are not allowed any more

    def cut(self, draft: PolicyDraft, plan: Plan) -> None:
        """Ends the sockets in this node's pods whose connections are not allowed any more.

        Each time that rows changed, and at the first change of a process, which another may have been killed before.
        """
        held = self._held
        if held is None or not draft.wanted or draft.stays:
            return
        if plan.policies is not None and not plan.policies and held.looked_for_cut:
            return
        held.looked_for_cut = True
        tracked = list(held.firewall.tracked())
        doomed = no_longer_allowed(draft.rows, tracked)
        if plan.policies is not None:
            # A packet after the step may have cut its connection already; those cut by the generations before are not news.
            news = [one for one in tracked if not one.cut or one.generation == held.generation]
            plan.policies.connections_cut = len(cut_by(draft.before, draft.rows, news))
        self._destroy(doomed, draft, plan)

    def _destroy(self, doomed: Sequence[Tracked], draft: PolicyDraft, plan: Plan) -> None:
        """Ends the sockets of connections, at both ends if both are pods of this node."""
        if not doomed:
            return
        pods = {address: pod for pod in draft.ports for address in draft.world.pods[pod].addresses}
        wanted: dict[str, set[tuple[Any, ...]]] = {}
        for one in doomed:
            if one.protocol not in (socket.IPPROTO_TCP, socket.IPPROTO_UDP):
                continue
            here = (one.protocol, one.local, one.local_port, one.remote, one.remote_port)
            there = (one.protocol, one.remote, one.remote_port, one.local, one.local_port)
            for ends in (here, there):
                if (pod := pods.get(ends[1])) is not None:
                    wanted.setdefault(pod, set()).add(ends)
            if one.interface == NODE_ITSELF:
                wanted.setdefault("", set()).add(here)
        for pod, doomed_here in wanted.items():
            try:
                place = self._namespace_of(pod, draft)
                if pod and place is None:
                    plan.warnings.append(f"pod {pod}: its network namespace was not found; {LEFT}")
                    continue
                with net.inside(place):
                    mine = [
                        one.name
                        for one in net.connected_sockets()
                        if (one.protocol, one.local, one.local_port, one.remote, one.remote_port)
                        in doomed_here
                    ]
                    ended, left = net.destroy_sockets(mine)
            except net.NetworkError as error:
                plan.warnings.append(f"{pod or 'the node'}: {LEFT}: {error.why or error.what}")
                continue
            plan.sockets_ended += ended
            plan.warnings += [f"{pod or 'the node'}: {count} {LEFT}: {why}" for why, count in left.items()]

    def _namespace_of(self, pod: str, draft: PolicyDraft) -> Path | None:
        """A pod's network namespace; None for the node's own, and where it is not found."""
        if not pod:
            return None
        namespace, _, name = pod.partition("/")
        if self._name.lab is not None:
            return pod_netns(self._name.lab, namespace, name)
        if self._namespaces is None:
            self._namespaces = net.namespaces_by_id()
        return self._namespaces.get(
            net.link_numbers(next(iter(draft.ports[pod].values()))[0]).get("netns", -1)
        )

    # -- repairing

    def drift(self) -> list[Repair]:
        """What is not as this process left it: attachments, pins, interfaces made anew, rows. In the node's namespace.

        Of a node with many pods some of the attachments are looked at each time, in turn; which of them are pinned, always.
        """
        held = self._held
        if held is None or not held.settled:
            return []
        folder = self._pins / FOLDER
        names = sorted(held.links)
        some = [
            names[at % len(names)] for at in range(held.next_look, held.next_look + min(LOOKS, len(names)))
        ]
        held.next_look += LOOKS
        pinned = {path.name for path in pinning.entries(folder / "links")}
        now = link_state(folder, only=pinned & (set(some) | (pinned - held.links.keys())))
        repairs = link_drift(
            {name: held.links[name] for name in names if name in some or name not in pinned}, now
        )
        repairs += [
            Repair("pin", f"{FOLDER}/{name}: it was unpinned")
            for name in sorted(held.pinned - pinned_names(folder))
        ]
        indexes = net.interface_indexes(held.interfaces)
        repairs += [
            Repair(
                "link",
                f"{name}: the interface {'was made anew' if indexes[name] else 'is gone'}",
            )
            for name, index in held.indexes.items()
            if indexes[name] != index
        ]
        if repairs:
            held.settled = False
        if held.generation != held.firewall.generation:
            repairs.append(Repair("rule", "the firewall's rows are of another generation"))
        elif held.rows is not None and (sums := _checksums(held.firewall)) != held.sums:
            found = held.firewall.rows()
            held.sums = sums if found == held.rows else ()
            for name in BANKED:
                mine, theirs = getattr(held.rows, name), getattr(found, name)
                if mine != theirs:
                    lost, foreign = _count_differing(mine, theirs), _count_differing(theirs, mine)
                    repairs.append(Repair("rule", f"{name}: {lost} rows are missing, {foreign} are nobody's"))
            held.rows = found
        return repairs

    # -- reading

    def names(self) -> Names:
        """Who has an address."""
        if self._names is None or self._names[0] is not self.world:
            self._names = (self.world, Names(self.world, self._name.node))
        return self._names[1]

    @property
    def sources(self) -> Mapping[int, RuleSource]:
        """Where the rule of each number is written."""
        return self._sources

    def attachments(self) -> list[Attachment]:
        """Where the programs are attached now. In the node's namespace."""
        return self._attached()

    def _attached(self) -> list[Attachment]:
        return driver.attachments(self._pins) if self.exists else []

    def rows(self) -> Rows | None:
        """What the kernel has in force; None where there is no firewall that can be read."""
        with _reading(self._pins) as firewall:
            return firewall.rows() if firewall is not None else None

    def totals(self) -> Totals | None:
        """The firewall's counters; None where there is none."""
        with _reading(self._pins) as firewall:
            return firewall.totals() if firewall is not None else None

    def rule_counts(self) -> list[RuleCount]:
        """What each rule let through, those that let nothing too."""
        totals = self.totals()
        counts = totals.rules if totals is not None else {}
        return [
            RuleCount(source.policy, source.direction, source.index, *counts.get(number, (0, 0)))
            for number, source in sorted(self._sources.items(), key=lambda item: str(item[1]))
        ]

    def connections(self) -> list[Connection]:
        """The connections that the firewall knows."""
        with _reading(self._pins) as firewall:
            return list(connections(firewall, self.names(), self._sources)) if firewall is not None else []

    def sample(self, one_in: int) -> None:
        """Has one in so many new connections that are allowed be told; 0: none.

        Raises:
            ControlError: There is no firewall on the node.
        """
        with self._read() as firewall:
            firewall.sample(one_in)

    def verdicts(self, refresh: Callable[[], None]) -> Verdicts:
        """Reads verdicts as they come.

        Args:
            refresh: Called before names are given: others may have changed the node meanwhile.

        Raises:
            ControlError: There is no firewall on the node, or another process reads its verdicts.
        """

        def names() -> tuple[Names, Mapping[int, RuleSource]]:
            refresh()
            return self.names(), self._sources

        with ExitStack() as undo:
            firewall = self._read()
            undo.callback(firewall.close)
            lock = lock_verdicts(self._name)
            undo.callback(os.close, lock)
            reader = Verdicts(firewall, names, lock)
            undo.pop_all()
            return reader

    def _read(self) -> Firewall:
        firewall = Firewall.pinned(self._pins)
        if firewall is None:
            raise ControlError(
                f"there is no firewall on node {self._name}",
                why="no policy is for this node",
                remedy="hookline apply -f POLICY",
            )
        return firewall

    def usage(self, counted: Counted | None = None) -> dict[str, Usage]:
        """How full the firewall's maps are; empty where there is none.

        Args:
            counted: Where connections are counted from time to time only.
        """
        with _reading(self._pins) as firewall:
            if firewall is None:
                return {}
            capacity = firewall.capacity()
            rows = self._held.rows if self._held is not None and self._held.rows else firewall.rows()
            found = {f"firewall_{name}": Usage(len(getattr(rows, name)), capacity[name]) for name in BANKED}
            table = firewall.maps["tracked"]
            used = table.used or 0 if counted is None else counted.of(table)
            return found | {"firewall_tracked": Usage(used, table.max_entries)}


def _checksums(firewall: Firewall) -> tuple[int, ...]:
    """Of all rows, in the order in which the kernel has them: much quicker than a look at each."""
    parts = (part for name in BANKED for part in firewall.maps[name].read())
    return tuple(zlib.crc32(np.ascontiguousarray(part).view(np.uint8).data) for part in parts)


def _nothing() -> None:
    pass


def _go_back(firewall: Firewall, rows: Rows | None, interfaces: Mapping[str, Role]) -> None:
    if rows is not None:
        firewall.commit(rows)
    if interfaces:
        firewall.activate(interfaces)


@contextmanager
def _reading(pins: Path) -> Iterator[Firewall | None]:
    """The firewall for reading; None where there is none that can be read."""
    firewall = Firewall.pinned(pins) if Firewall.exists(pins) else None
    if firewall is None:
        yield None
        return
    with firewall:
        yield firewall


def tunables_of(config: NodeConfig | None) -> Tunables:
    """What the programs are loaded with."""
    if config is None:
        return Tunables()
    maps = config.spec.maps
    return Tunables(
        maps.endpoints,
        maps.identities,
        maps.rules,
        maps.own_addresses,
        maps.tracked,
        maps.fragments,
        maps.rule_counts,
    )


def _count_differing(
    some: Mapping[Any, Any] | frozenset[bytes], others: Mapping[Any, Any] | frozenset[bytes]
) -> int:
    """How many there are that the others have not, or not the same."""
    if some is others:
        return 0
    if isinstance(some, frozenset) or isinstance(others, frozenset):
        return len(frozenset(some) - frozenset(others))
    return sum(others.get(key) != value for key, value in some.items())


def _covers(rows: Rows, before: Rows) -> bool:
    """Whether every endpoint that is isolated has the very rule sets that it had; their numbers tell what is in them."""
    return all(
        rows.endpoints.get(index) == row for index, row in before.endpoints.items() if row != PolicyRow()
    )
