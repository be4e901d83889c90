"""One node: its wanted state, and the kernel that is brought to it.

`Node.apply` is the one way to change anything: the plan is made and checked first, then the wanted state is written, the kernel
follows, and the transaction is committed. What cannot fit, cannot be attached or belongs to somebody else is refused before
anything is touched. A process that finds a node prepared by another one adopts it and changes only what differs; within one
process the tables are remembered, so a small change costs what that change costs.
"""

from __future__ import annotations

import os
import socket
import time
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence, Set
from contextlib import ExitStack, contextmanager, suppress
from dataclasses import dataclass, field, replace
from functools import partial
from ipaddress import IPv4Address, IPv6Address
from pathlib import Path
from types import TracebackType
from typing import TYPE_CHECKING, Any, Self

from hookline import bpf, model, net
from hookline.control._errors import Conflict, ControlError, NotThere, StateDamaged
from hookline.control.catalogue import Catalogue
from hookline.control.drift import Repair, Repaired, link_drift, link_state, pinned_names
from hookline.control.health import Health, HealthKey
from hookline.control.inventory import Here
from hookline.control.lives import Lives, boottime
from hookline.control.loading import Covered, cause_of_apply, load, source_of
from hookline.control.moves import FLOW_KEY_BYTES, Moves, Reckoning
from hookline.control.placement import (
    Placements,
    forwarding_off,
    refuse_nat_ports,
    require_forwarding,
)
from hookline.control.plan import Action, Draft, Plan, PoolSummary, ResourceChange, Usage
from hookline.control.pods import PodRows, PodTable, cookies, pod_rows, treatment
from hookline.control.policies import Policies
from hookline.control.pools import Pool, Target
from hookline.control.recovery import Recovery, Unclaimed, unclaimed
from hookline.control.rows import ServiceRow
from hookline.control.serving import (
    NOT_ENDED,
    Serving,
    count_connected,
    end_every_socket,
    end_sockets,
    every_row,
    indexes_of,
    inode_of,
    not_ended,
    usage_of,
)
from hookline.control.state import STATE_FILE, Generation, State, Stored, locked, salvage
from hookline.control.statuses import Counted, PoolStatus, statuses_of
from hookline.control.strays import strays
from hookline.control.tables import PoolChange, TableChange, Tables, frontend_key, still_wanted
from hookline.control.verdicts import Connection, RuleCount, Verdicts
from hookline.datapath import hooks
from hookline.datapath.firewall.firewall import Rows as FirewallRows
from hookline.datapath.firewall.firewall import Totals as FirewallTotals
from hookline.datapath.loadbalancer.balancer import (
    Attachment,
    LoadBalancer,
    Totals,
    Tunables,
    attached,
    attached_cgroup,
    attached_mode,
    attachments,
    not_attached,
    refuse_occupied,
    totals,
)
from hookline.datapath.loadbalancer.sockets import Row as BackendRow
from hookline.datapath.loadbalancer.sockets import count_sockets
from hookline.errors import HooklineError
from hookline.model import NodeConfig, Resource
from hookline.model.names import Endpoint, NodeName
from hookline.policy import World

if TYPE_CHECKING:
    from hookline.control.explain import Explanation

Address = IPv4Address | IPv6Address
PathLike = str | os.PathLike[str]
OWNERS = frozenset({"lab"})
"""Sources that alone may change their objects; every other source is a file's path."""

# Addresses of nobody (RFC 5737, RFC 3849), to ask for the way to the world.
FAR_AWAY: tuple[Address, ...] = (IPv4Address("198.51.100.1"), IPv6Address("2001:db8:ffff::1"))

NO_CONNECT_TIME = "pods of this node and the node itself do not reach services"

# The kernel drops neighbours beyond gc_thresh3 (1,024 by default); the rest of the node needs some too.
RESOLVED_NEIGHBOURS_MAX = 512
STRAYS_AFTER_S = 0.5
"""From a program of a connecting socket to the connection it is microseconds, unless the machine is very busy."""
STATE_GONE = "there was no state file, or an empty one, and the kernel has {}"


@dataclass(slots=True)
class Applied:
    """What a change did: its plan as carried out, and the attachments."""

    plan: Plan
    attachments: list[Attachment] = field(default_factory=list)


class Node:
    """A node: this machine (``host``) or one of a lab (``lab/LAB/NODE``). Close it, or use it as a context manager.

    Args:
        name: The node's name.
        before_change: Called before anything is touched, with the addresses of every service that the change touches; may
            refuse by raising.
        on_change: Called after the first change, and every one that may concern `service_addresses`. Both are called in
            the node's own network namespace.

    Attributes:
        watched: Set it where somebody checks this node's backends and reports to `observe`: from then on backends that begin to
            take connections wait for their first check, or start slowly.

    Raises:
        model.names.InvalidName: The name is none.
    """

    def __init__(
        self,
        name: str | NodeName = "host",
        *,
        before_change: Callable[[Node, frozenset[Address]], None] | None = None,
        on_change: Callable[[Node], None] | None = None,
    ) -> None:
        self.name = name if isinstance(name, NodeName) else NodeName.parse(name)
        self._before_change = before_change
        self._on_change = on_change
        self._state: State | None = None
        self._stored: dict[str, Stored] = {}
        self.watched = False
        # What the documents say, what is known of backends beyond them, and what comes of both: the tables' pools.
        self._catalogue = Catalogue()
        self._lives = Lives()
        self._pools: dict[str, tuple[Pool, ...]] = {}
        self._hops: dict[int, frozenset[tuple[str, str]]] = {}
        self._neighbours: set[tuple[str, str]] = set()
        self._forwarded: set[int] = set()
        self._repairing = False
        # Why the state was lost, as long as the kernel serves what no object wants; see recovery.
        self._lost = ""
        self._told = False
        # Whose pools were that went while sockets still name them; and what nobody was told yet.
        self._left: dict[int, str] = {}
        self._untold: list[str] = []
        self._kernel: Serving | None = None
        self._policies = Policies(self.name)

    def close(self) -> None:
        """Lets go of files and descriptors; the kernel goes on."""
        self._forget_kernel()
        self._close_state()

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.close()

    # -- changing

    def apply(
        self,
        what: PathLike | Resource | Iterable[PathLike | Resource],
        *,
        prune: bool | Covered = False,
        owner: str | None = None,
    ) -> Applied:
        """Adds and changes objects, and brings the kernel to it.

        Args:
            what: Files, folders or resources.
            prune: Also remove what the same files once set and no longer hold, in a folder also what files that are gone
                set; or the sources that the change speaks for.
            owner: Apply as this owner: its objects become exactly these.

        Raises:
            model.InvalidResource: A document is wrong.
            ControlError: The change is refused; nothing was changed.
            bpf.BpfError: The kernel refuses; what was is still there.
        """
        loaded = load(what)
        covered = prune if isinstance(prune, Covered) else Covered.of(what, loaded) if prune else None
        with self._writing():
            return self._carry_out(
                self._draft(loaded, prune=covered, owner=owner, cause=cause_of_apply(what, loaded))
            )

    def plan(
        self,
        what: PathLike | Resource | Iterable[PathLike | Resource] = (),
        *,
        prune: bool | Covered = False,
        delete: Sequence[str] = (),
    ) -> Plan:
        """What `apply` or `delete` would do, with the connections that would move; changes nothing."""
        loaded = load(what)
        covered = prune if isinstance(prune, Covered) else Covered.of(what, loaded) if prune else None
        with self._writing():
            draft = self._draft(loaded, prune=covered, delete=delete)
            self._work_out_moves(draft)
            if draft.plan.loads:
                self._forget_serving()
            self._policies.forget_fresh()
            return draft.plan

    def delete(self, references: Sequence[str]) -> Applied:
        """Removes objects by reference, ``VirtualService/default/orders``.

        Raises:
            NotThere: One of them does not exist; nothing was changed.
            Conflict: One of them belongs to an owner.
        """
        with self._writing():
            cause = f"delete {', '.join(references)}"
            return self._carry_out(self._draft([], delete=references, cause=cause))

    def rollback(self, to: int | None = None) -> Applied:
        """Goes back to what was wanted after an earlier generation; this is a generation, too.

        Objects that an owner has now stay as they are, and the plan's warnings name them.

        Args:
            to: The generation's number; None: the one before the last, so that twice changes nothing.

        Raises:
            NotThere: It is not among those that are kept.
            ControlError: The change is refused; nothing was changed.
        """
        with self._writing():
            return self._carry_out(self._draft_rollback(to))

    def plan_rollback(self, to: int | None = None) -> Plan:
        """What `rollback` would do; changes nothing."""
        with self._writing():
            draft = self._draft_rollback(to)
            self._work_out_moves(draft)
            if draft.plan.loads:
                self._forget_serving()
            self._policies.forget_fresh()
            return draft.plan

    def check_state(self) -> Recovery:
        """Reads all of the wanted state, and what the kernel serves beyond it; changes nothing.

        Raises:
            StateError: The file cannot be read, though it may be in order.
        """
        self._namespace()
        with locked(self.name.state_dir), self._inside():
            damage = self._damage()
            if damage:
                return Recovery(damage, damage, unclaimed=self._unclaimed(frozenset()))
            if self._state is None and not (self.name.state_dir / STATE_FILE).exists():
                return Recovery(lost=self._why_lost(), unclaimed=self._unclaimed(frozenset()))
            self._opened_state()
            self._refresh()
            return Recovery(lost=self._lost, unclaimed=self._unclaimed())

    def recover(self, *, drop_unclaimed: bool = False) -> Recovery:
        """Has a state that can be worked with, whatever became of its file, and the kernel go on serving.

        A damaged file is moved away, and the objects in it that are what was written are taken over. The services of the
        kernel that no object wants then stay until they are claimed; see `recovery`. Nothing happens where all is well.

        Args:
            drop_unclaimed: Remove them: what is wanted is all there is.

        Raises:
            StateError: The file cannot be moved or written.
        """
        with self._locked():
            damage = self._damage()
            saved = None
            if damage:
                self._close_state()
                saved = salvage(self.name.state_dir)
                state = self._opened_state()
                with state.change():
                    state.put(saved.stored)
                    state.mark_lost(damage)
            self._opened_state()
            self._refresh()
            lost = self._lost
            if lost and drop_unclaimed:
                with self._opened_state().change():
                    self._opened_state().mark_lost("")
                self._lost = ""
                self._forget_kernel()  # all of it is to be compared with what is wanted
            if lost:
                self._repairing = True
                try:
                    self._carry_out(self._draft([]))
                finally:
                    self._repairing = False
            return Recovery(
                damage,
                lost,
                saved.path if saved else None,
                tuple(item.resource.reference for item in saved.stored) if saved else (),
                saved.unreadable if saved else (),
                self._unclaimed() if self._lost else (),
            )

    def repair(self, *, full: bool = False) -> Repaired:
        """Reads the kernel again, and mends what is not as it was left.

        Attachments and the programs in them, pins, the rows of services and backends, tables' slots and neighbours are
        looked at. What the documents and the routes ask for is worked out again only where this process has not seen the
        node before, or with ``full``: it costs as much as applying everything.

        Raises:
            ControlError: It cannot be mended, for example since an interface is not there.
        """
        with self._writing():
            self._repairing = True
            try:
                return self._repaired(full)
            finally:
                self._repairing = False

    # -- backends' lives

    def observe(self, changes: Mapping[HealthKey, Health]) -> None:
        """Takes over what health checks found: the tables follow, and it is remembered until it is found otherwise.

        Backends that are no longer there are passed over. Costs what the services concerned cost, however many others there are.

        Raises:
            bpf.BpfError: The kernel refuses; what was is still there.
        """
        with self._writing():
            known = {
                key: health for key, health in changes.items() if any(self._pools_of(key))
            }  # others went meanwhile
            if known:
                self._follow_lives(self._lives.observed(known), {key.service for key in known}, known)

    def expire(self) -> float | None:
        """Ends the drains that are over: backends that were removed go, those that are still named are down.

        Returns:
            Seconds until the next one is over; None where none is under way.
        """
        if self._state is None and not (self.name.state_dir / STATE_FILE).exists():
            return None
        self._refresh()
        if self._lives.leaving:
            now = boottime()
            services = {
                name for name in self._lives.past(now) if self._living(name, now) != self._pools.get(name, ())
            }
            if services:
                with self._writing():
                    self._follow_lives(self._lives.expired(now), services)
        return self._lives.next_deadline(boottime())

    @property
    def documents(self) -> Mapping[str, tuple[Pool, ...]]:
        """The pools of every service as the documents have them; the same objects as long as they stay as they are."""
        self._refresh()
        return self._catalogue.pools

    @property
    def health(self) -> dict[HealthKey, Health]:
        """What was observed; backends that are active and well are left out."""
        self._refresh()
        return {key: health for mine in self._lives.health.values() for key, health in mine.items()}

    def _pools_of(self, key: HealthKey) -> Iterator[Pool]:
        for pool in self._catalogue.pools.get(key.service, ()):
            if (pool.port, pool.protocol, pool.version) == (
                key.port,
                key.protocol,
                key.address.version,
            ) and any((target.address, target.port) == (key.address, key.number) for target in pool.targets):
                yield pool

    def _living(self, service: str, now: float) -> tuple[Pool, ...]:
        return self._lives.living(service, self._catalogue.pools.get(service, ()), now)

    def _follow_lives(
        self, lives: Lives, services: set[str], health: Mapping[HealthKey, Health] | None = None
    ) -> None:
        """Brings the tables of some services to other lives of their backends.

        Args:
            health: Given where nothing but this changes of them.
        """
        before = self._lives
        kernel, state, now = self._kernel, self._opened_state(), boottime()
        self._lives = lives
        try:
            pools = dict(self._pools)
            pools.update({name: self._living(name, now) for name in services})
            if kernel is None or not kernel.is_in_step(kernel.config):
                self._tell_later(self._carry_out(self._draft([], lived=services)).plan)
                return
            old = {pool.key: pool for name in services for pool in self._pools.get(name, ())}
            wanted = [pool for name in services for pool in pools[name] if old.get(pool.key) != pool]
            change = TableChange()
            if wanted:
                placements = Placements(frozenset(name for name, _ in kernel.uplinks))
                change = kernel.tables.diff(wanted, placements, only=frozenset(pool.key for pool in wanted))
                kernel.tables.check_fits(change)
            wanted_still = still_wanted(change, {name: self._pools.get(name, ()) for name in services}, pools)
            retired = kernel.tables.retired(change, lives.drained(now), wanted_still)
            with state.change():
                if health is None:
                    state.put_lives(lives, services)
                else:
                    state.put_health(health)
                kernel.tables.carry_out(change)
        except BaseException:
            self._lives = before
            self._forget_kernel()
            raise
        state.changed_elsewhere()
        kernel.watch.forget(pool.key for pool in change.pools)
        self._remember_left(change)
        self._pools = pools
        kernel.doomed.update(retired)
        plan = Plan()
        self._end_sockets(plan, kernel, change)
        self._tell_later(plan)

    def _tell_later(self, plan: Plan) -> None:
        """Keeps for the next `repair` which sockets were not ended: nobody sees this plan."""
        self._untold += [warning for warning in not_ended(plan) if warning not in self._untold]

    # -- reading

    def resources(self, kind: type[Resource] | None = None) -> list[Resource]:
        """The wanted objects, of one kind or all."""
        self._refresh()
        found = (item.resource for item in self._stored.values())
        return [resource for resource in found if kind is None or isinstance(resource, kind)]

    def source_of(self, reference: str) -> str:
        """What set an object: a file's path or an owner.

        Raises:
            NotThere: There is no such object.
        """
        self._refresh()
        if reference not in self._stored:
            raise self._not_there(reference)
        return self._stored[reference].source

    def watched_folders(self) -> dict[str, str]:
        """On which file system each folder was, by its path, whose files set an object that is wanted."""
        self._refresh()
        if self._state is None:
            return {}
        used = {os.path.dirname(item.source) for item in self._stored.values()}
        return {folder: where for folder, where in self._state.watched_folders().items() if folder in used}

    def note_watched_folders(self, folders: Mapping[str, str]) -> None:
        """Keeps on which file system each folder is, for an agent that starts and finds another."""
        with self._writing(), self._opened_state().change() as state:
            state.put_watched_folders(folders)

    def generations(self) -> list[Generation]:
        """The changes that are kept, the newest first."""
        self._refresh()
        return self._state.generations() if self._state is not None else []

    def served(self) -> list[str]:
        """References of the services that have pools."""
        self._refresh()
        return list(self._pools)

    def services(self, names: Iterable[str] | None = None) -> list[PoolStatus]:
        """Every service's pools with their backends and counters, as the kernel has them.

        Args:
            names: Only these services'; None: all.

        Raises:
            bpf.NotPermitted: Reading maps is not allowed.
        """
        with self._inside():
            self._refresh()
            wanted = self._pools if names is None else names
            pools = [pool for name in wanted for pool in self._pools.get(name, ())]
            if not pools or not LoadBalancer.exists(self.name.pins):
                return []
            with self._opened() as kernel:
                return statuses_of(pools, self._reading_placements(), kernel)

    def map_usage(self, counted: Counted | None = None, tracked: Counted | None = None) -> dict[str, Usage]:
        """How full the node's maps are, those that can fill up; empty where nothing is loaded.

        Args:
            counted: Where connections are counted from time to time only; the kernel keeps no such number.
            tracked: The same for those that the firewall knows.
        """
        with self._inside():
            self._refresh()
            policies = self._policies.usage(tracked)
            if not LoadBalancer.exists(self.name.pins):
                return policies
            with self._opened() as kernel:
                usage = policies | usage_of(kernel, TableChange())
                connections = kernel.balancer.maps["connections"]
                used = connections.used or 0 if counted is None else counted.of(connections)
                usage["connections"] = Usage(used, connections.max_entries)
                return usage

    def explain(
        self, source: str | Endpoint, target: str | Endpoint, *, family: int | None = None
    ) -> Explanation:
        """What decides about a new connection, and what would stop it; see `explain`. Changes nothing.

        Args:
            source: A pod, ``node/NAME``, ``external/NAME`` or an address, with its port or without.
            target: A service (``NAMESPACE/NAME`` or ``NAME``), a pod or an address, with a port.
            family: 4 or 6; by default the first that both have.

        Raises:
            NotThere: The node knows none of that name, or not in that family.
            ControlError: No port was given.
            model.names.InvalidName: It is no endpoint.
        """
        from hookline.control.asking import asked_for, who_asks  # neither is needed for anything else
        from hookline.control.explain import Surroundings, explain
        from hookline.control.permitting import permissions

        asking = Endpoint.parse(source) if isinstance(source, str) else source
        wanted = Endpoint.parse(target) if isinstance(target, str) else target
        with self._inside():
            self._refresh()
            resources = [item.resource for item in self._stored.values()]
            pools = [pool for group in self._pools.values() for pool in group]
            config = self._config()
            cgroup, _ = self._cgroup(config)
            mount = net.cgroups.mount()
            group = str(cgroup.relative_to(mount)) if cgroup is not None and mount is not None else None
            group = "" if group == "." else group
            origin = who_asks(asking, self.name, self._names(), resources, group or "")
            destination = asked_for(wanted, pools, resources, origin, family, self.name)
            loaded = LoadBalancer.exists(self.name.pins)
            around = Surroundings(
                self.name,
                tuple(name for name, _ in self._uplinks(config)),
                tuple(attachments(self.name.pins)) if loaded else (),
                group,
                inode_of(cgroup) if cgroup is not None else None,
                attached_cgroup(self.name.pins) if loaded else None,
            )
            if loaded:
                with self._opened() as kernel:
                    answer = explain(
                        origin,
                        destination,
                        balancer=kernel.balancer,
                        tables=kernel.tables,
                        pools=pools,
                        around=around,
                    )
            else:
                answer = explain(origin, destination, balancer=None, tables=None, pools=pools, around=around)
            version = destination.address.version
            own = next((str(one) for one in origin.addresses if one.version == version), None)
            known = self._policies.world, self._policies.rows()
            answer.permissions += permissions(answer, known, self._ask_other, own)
            return answer

    def _ask_other(self, node: str) -> tuple[World, FirewallRows | None] | None:
        """What another node of the lab knows of policies; None where there is none that can be read. Changes nothing there."""
        if self.name.lab is None:
            return None
        other = NodeName(self.name.lab, node)
        if not (other.state_dir / STATE_FILE).exists():
            return None
        with suppress(HooklineError), Node(other) as opened:
            return opened.world(), opened._policies.rows()
        return None

    def totals(self) -> Totals | None:
        """The node's counters; None where nothing is loaded."""
        pins = self.name.pins / "maps"
        names = ("metrics", "exceptions", "socket_metrics")
        if not all((pins / name).exists() for name in names):
            return None
        with ExitStack() as opened:
            return totals({name: opened.enter_context(bpf.Map.from_pin(pins / name)) for name in names})

    def attachments(self) -> list[Attachment]:
        """Where the node's programs are attached now."""
        with self._inside():
            return attachments(self.name.pins) + self._policies.attachments()

    # -- policies

    def policy_totals(self) -> FirewallTotals | None:
        """The firewall's counters by reason and direction; None where no policy is for this node."""
        return self._policies.totals()

    def rule_counts(self) -> list[RuleCount]:
        """What each rule of the policies let through, by policy, direction and place."""
        self._refresh_inside()
        return self._policies.rule_counts()

    def tracked(self) -> list[Connection]:
        """The connections that the firewall knows, with names; one between two pods of this node is there twice."""
        self._refresh_inside()
        return self._policies.connections()

    def verdicts(self) -> Verdicts:
        """Reads the firewall's verdicts as they come; close it.

        Raises:
            ControlError: No policy is for this node.
            bpf.BpfError: Somebody else reads them.
        """
        self._refresh_inside()
        return self._policies.verdicts(self._refresh_inside)

    def sample_verdicts(self, one_in: int) -> None:
        """Has one in so many new connections that are allowed be told among the verdicts; 0: none."""
        self._policies.sample(one_in)

    def world(self) -> World:
        """The documents that decide about connections, as this node sees them."""
        self._refresh_inside()
        return self._policies.world

    def _refresh_inside(self) -> None:
        with self._inside():
            self._refresh()

    def service_addresses(self) -> dict[Address, frozenset[Address]]:
        """Every address that is balanced, with the backends that must have it on their loopback (``dsr``)."""
        with self._inside():
            self._refresh()
            found: dict[Address, set[Address]] = {}
            placements = self._reading_placements()
            for pool in (pool for group in self._pools.values() for pool in group):
                direct = {
                    target.address
                    for target in (pool.targets if pool.forwarding == "dsr" else ())
                    if placements.place(target.address, "dsr").how == "dsr"
                }
                for frontend in pool.frontends:
                    if frontend.scope == "any":
                        found.setdefault(frontend.address, set()).update(direct)
            if self._lost:
                for one in self._unclaimed():
                    for address in one.addresses:
                        found.setdefault(address, set()).update(one.direct)
            return {address: frozenset(backends) for address, backends in found.items()}

    def sockets(self) -> dict[BackendRow, int]:
        """How many sockets of this node are connected to each backend that they were given, by row and generation.

        Raises:
            bpf.BpfError: The kernel does not let this user walk over sockets.
        """
        path = self.name.pins / "maps" / "sockets"
        if not path.exists():
            return {}
        with bpf.Map.from_pin(path) as sockets:
            return count_sockets(sockets)

    # -- drafting

    def _draft(
        self,
        loaded: Sequence[Resource],
        *,
        prune: Covered | None = None,
        delete: Sequence[str] = (),
        owner: str | None = None,
        sources: Mapping[str, str] | None = None,
        cause: str = "",
        lived: Set[str] = frozenset(),
    ) -> Draft:
        plan = Plan()
        put: dict[str, tuple[Resource, str]] = {}
        for resource in loaded:
            source = owner or (sources or {}).get(resource.reference) or source_of(resource)
            known = self._stored.get(resource.reference)
            if known is not None and known.source in OWNERS and known.source != owner:
                raise Conflict(
                    f"{resource.reference} belongs to the {known.source}",
                    why="its owner would change it back",
                    remedy=f"change the {known.source} itself",
                )
            action: Action = "create" if known is None else "keep" if known.resource == resource else "change"
            plan.resources.append(ResourceChange(action, resource.reference))
            if known is None or known.resource != resource or known.source != source:
                put[resource.reference] = (resource, source)
        drop = self._dropped(loaded, prune=prune, delete=delete, owner=owner)
        plan.resources.extend(ResourceChange("remove", reference) for reference in drop)

        come = [resource for resource, _ in put.values() if self._differs(resource)]
        gone = [*(resource.reference for resource in come), *drop]
        former = [self._stored[name].resource for name in gone if name in self._stored]
        catalogue = self._catalogue.changed(former, come, self._here_after(former, come))
        plan.warnings.extend(catalogue.unheeded(come))
        pools, lives, lived = self._lived(catalogue.pools, lived)
        if self._before_change is not None and pools is not self._pools:
            self._before_change(self, frozenset(_addresses(pools.get(name, ()) for name in lived)))
        config = self._config(put, drop)
        draft = Draft(plan, put, drop, TableChange(), config, cause, catalogue=catalogue)
        self._draft_kernel(draft, pools, lived)
        draft.policies = self._policies.draft(
            plan,
            former,
            come,
            config,
            partial(self._uplink_names, config),
            full=self._repairing,
            lost=bool(self._lost),
        )
        draft.pools, draft.lives, draft.lived = pools, lives, lived
        return draft

    def _draft_rollback(self, to: int | None) -> Draft:
        state = self._opened_state()
        kept = state.generations()
        if not kept:
            raise NotThere(
                f"node {self.name} has no generation to go back to",
                why="nothing was changed yet",
                remedy="hookline apply makes the first",
            )
        last, first = kept[0].number, kept[-1].number
        target = last - 1 if to is None else to
        if not first - 1 <= target < last:
            raise NotThere(
                f"cannot go back to generation {target} of node {self.name}",
                why=f"it is at {last}"
                if target == last
                else f"those from {first - 1} to {last - 1} can be gone back to",
                remedy=f"hookline get generations --node {self.name}",
            )
        wanted: list[Resource] = []
        sources: dict[str, str] = {}
        delete: list[str] = []
        owned: list[str] = []
        for reference, before in state.before_generation(target + 1).items():
            now = self._stored.get(reference)
            if now is not None and now.source in OWNERS:
                if before != now:
                    owned.append(f"{reference} belongs to the {now.source} now and stays as it is")
            elif before is None:
                if now is not None:
                    delete.append(reference)
            elif before != now:
                wanted.append(before.resource)
                sources[reference] = before.source
        draft = self._draft(wanted, delete=delete, sources=sources, cause=f"rollback to {target}")
        draft.plan.warnings[:0] = owned
        return draft

    def _lived(
        self, documents: dict[str, tuple[Pool, ...]], again: Set[str]
    ) -> tuple[dict[str, tuple[Pool, ...]], Lives, set[str]]:
        """The pools that backends' lives make of the documents', the lives, and the services whose lives or documents changed."""
        now = boottime()
        known = self._catalogue.pools
        touched = {name for name, pools in documents.items() if known.get(name) is not pools}
        touched |= known.keys() - documents.keys()
        lives, concerned = self._lives.followed(
            {name: known[name] for name in touched if name in known},
            {name: documents[name] for name in touched if name in documents},
            now,
            watched=self.watched,
        )
        if over := lives.past(now):
            lives = lives.expired(now)
        concerned |= over | again
        if not concerned and documents is self._catalogue.pools:
            return self._pools, lives, concerned
        pools = dict(self._pools)
        for name in concerned - documents.keys():
            pools.pop(name, None)
        # New ones come in the order of their documents.
        for name in (name for name in documents if name in concerned):
            pools[name] = lives.living(name, documents[name], now)
        return pools, lives, concerned

    def _dropped(
        self,
        loaded: Sequence[Resource],
        *,
        prune: Covered | None,
        delete: Sequence[str],
        owner: str | None,
    ) -> list[str]:
        held = {resource.reference for resource in loaded}
        drop = []
        for reference in delete:
            known = self._stored.get(reference)
            if known is None:
                raise self._not_there(reference)
            if known.source in OWNERS:
                raise Conflict(
                    f"{reference} belongs to the {known.source}",
                    why="its owner would make it again",
                    remedy=f"change the {known.source} itself",
                )
            drop.append(reference)
        if owner is not None:
            drop += [name for name, item in self._stored.items() if item.source == owner and name not in held]
        elif prune is not None:
            drop += [
                name
                for name, item in self._stored.items()
                if item.source not in OWNERS and name not in held and item.source in prune
            ]
        return list(dict.fromkeys(drop))

    def _not_there(self, reference: str) -> NotThere:
        return NotThere.of(reference, self._stored, self.name)

    def _differs(self, resource: Resource) -> bool:
        known = self._stored.get(resource.reference)
        return known is None or known.resource != resource

    def _names(self) -> frozenset[str]:
        """What documents call this node: a lab's by its name, the host ``host`` or as the machine is called."""
        return frozenset((self.name.node, *((socket.gethostname(),) if self.name.lab is None else ())))

    def _here_after(self, gone: Iterable[Resource], come: Iterable[Resource]) -> Here | None:
        """This node after a change; None where nothing that it goes by is changed, nor looked at again."""
        lost = {one.reference for one in gone if isinstance(one, model.Node)}
        new = {one.reference for one in come if isinstance(one, model.Node)}
        if not (lost or new or self._repairing):
            return None
        nodes = {name for name, item in self._stored.items() if isinstance(item.resource, model.Node)}
        return self._here((nodes - lost) | new)

    def _here(self, nodes: Set[str]) -> Here:
        """This node as services see it. Without a ``v1/Node`` its addresses are those that it uses towards the world. Those that
        it used before and still has stay while there is no way there.

        Args:
            nodes: References of all ``v1/Node`` objects.
        """
        names = self._names()
        known = any(f"Node/{name}" in nodes for name in names)
        addresses: list[Address] = []
        for far in () if known else FAR_AWAY:
            with suppress(net.NetworkError):
                route = net.route_to(far)
                if route.kind == "unicast" and route.source is not None:
                    addresses.append(route.source)
                    continue
            # A way to the world that is gone takes no address with it.
            before = (one for one in self._catalogue.inventory.here.addresses if one.version == far.version)
            addresses.extend(one for one in before if net.has_address(one))
        return Here(names, tuple(addresses), has_loopback=self.name.lab is None)

    def _config(
        self, put: Mapping[str, tuple[Resource, str]] | None = None, drop: Sequence[str] = ()
    ) -> NodeConfig | None:
        """The node's own NodeConfig, as it is or as a change leaves it; the host's is called ``host`` or as the machine is."""
        for name in sorted(self._names()):
            reference = f"{NodeConfig.kind}/{name}"
            if put is not None and reference in put:
                found: Resource | None = put[reference][0]
            elif reference in drop or reference not in self._stored:
                found = None
            else:
                found = self._stored[reference].resource
            if isinstance(found, NodeConfig):
                return found
        return None

    def _uplinks(self, config: NodeConfig | None) -> tuple[tuple[str, Any], ...]:
        chosen = [
            (interface.name, interface.xdp_mode)
            for interface in (config.spec.interfaces if config else ())
            if interface.role == "uplink"
        ]
        if not chosen:
            chosen = [(net.default_interface(), "auto")]
        for name, _ in chosen:
            net.interface_index(name)
        return tuple(chosen)

    def _uplink_names(self, config: NodeConfig | None) -> tuple[str, ...]:
        """The uplinks, by their names alone."""
        return tuple(name for name, _ in self._uplinks(config))

    def _cgroup(self, config: NodeConfig | None) -> tuple[Path | None, str]:
        """Whose sockets the programs of sockets serve, or None and why nobody's: empty where that is wanted."""
        if config is not None and config.spec.features.connect_time == "off":
            return None, ""
        choice = hooks.choose(next(one for one in hooks.FUNCTIONS if one.name == hooks.CONNECT_TIME))
        if not choice.hook:
            return None, choice.passed_over[0][1].why
        try:
            place = net.cgroups.path(self._cgroup_of(config))
        except net.NetworkError as error:
            return None, error.why
        return (place, "") if place.is_dir() else (None, f"there is no cgroup {place}")

    def _cgroup_of(self, config: NodeConfig | None) -> str:
        """The cgroup of this node's processes, below the mount."""
        return (config.spec.cgroup if config is not None else None) or self.name.cgroup

    def _tunables(self, config: NodeConfig | None, uplinks: Sequence[tuple[str, Any]]) -> Tunables:
        """What the programs must be loaded with on these uplinks, as they are attached or will be."""
        kinds = {interface.name: interface.kind for interface in net.interfaces()}
        modes = {name: self._attached_mode(name) if mode == "auto" else mode for name, mode in uplinks}
        tunables = Tunables(
            check_mtu="generic" not in modes.values(),
            tx_by_redirect=any(
                mode != "generic" and kinds.get(name) == "veth" for name, mode in modes.items()
            ),
            connect_time=self._cgroup(config)[0] is not None,
        )
        if config is None:
            # Maps of other sizes are made anew: not as long as a configuration may be missing that asked for these.
            if not self._lost or LoadBalancer.pinned_digest(self.name.pins) == tunables.digest:
                return tunables
            sizes: dict[str, Any] = LoadBalancer.pinned_sizes(self.name.pins)
            return replace(tunables, **sizes)
        maps, ports = config.spec.maps, config.spec.nat
        return replace(
            tunables,
            nat_port_min=ports.port_min,
            nat_port_max=ports.port_max,
            connections=maps.connections,
            affinity=maps.affinity,
            services=maps.services,
            backends=maps.backends,
            maglev_pages=maps.maglev_pages,
        )

    def _attached_mode(self, interface: str) -> str:
        """The mode that ``auto`` came to on an interface; ``auto`` where nothing is attached yet."""
        return attached_mode(self.name.pins, interface) or "auto"

    def _draft_kernel(self, draft: Draft, pools: Mapping[str, tuple[Pool, ...]], concerned: Set[str]) -> None:
        """What the kernel's tables and attachments need; loads the programs, unattached, where they are not.

        Args:
            draft: The draft; its change and its plan are filled in.
            pools: The wanted pools, by service.
            concerned: The services whose pools may be others than before.
        """
        plan = draft.plan
        if (
            not any(pools.values())
            and not draft.catalogue.inventory.captures
            and not (self._lost and self._pools)
        ):
            plan.detaches = LoadBalancer.exists(self.name.pins) and not self._lost
            return
        kernel = self._kernel
        in_step = kernel is not None and kernel.is_in_step(draft.config)
        if kernel is None or not in_step:
            uplinks = self._uplinks(draft.config)
            tunables = self._tunables(draft.config, uplinks)
            if kernel is None or kernel.balancer.tunables != tunables:
                self._forget_serving()
                balancer = LoadBalancer.open(self.name.pins, tunables)
                kernel = self._kernel = Serving(balancer, Tables(balancer))
            plan.uplinks = tuple((name, str(mode)) for name, mode in uplinks)
        else:
            plan.uplinks = kernel.uplinks
        placements = Placements(frozenset(name for name, _ in plan.uplinks))
        plan.loads = kernel.balancer.fresh
        if kernel.balancer.fresh and "connections" in kernel.balancer.replaced:
            plan.warnings.append("the connection table changes its size: what fits is copied")

        only = None
        if in_step:
            before = {pool.key: pool for name in concerned for pool in self._pools.get(name, ())}
            after = {pool.key: pool for name in concerned for pool in pools.get(name, ())}
            only = frozenset(key for key in before.keys() | after.keys() if before.get(key) != after.get(key))
            # In the documents' order: tables that are looked at together lie together.
            considered = [pool for key, pool in after.items() if key in only]
        else:
            considered = [pool for group in pools.values() for pool in group]
        if self._lost:
            every = [pool for group in pools.values() for pool in group]
            only, considered = self._claimed(plan, kernel.tables, every, considered, only)
        if not self._repairing:
            refuse_nat_ports(considered, placements, kernel.balancer.tunables)
        if not in_step:
            names = [name for name, _ in plan.uplinks]
            cgroup, why = self._cgroup(draft.config)
            if why:
                plan.warnings.append(f"{NO_CONNECT_TIME}: {why}")
            refuse_occupied(self.name.pins, names)
            plan.attaches = [
                f"{program} to {interface}" if interface else program
                for program, interface in not_attached(self.name.pins, names, cgroup)
            ]
        draft.change = kernel.tables.diff(considered, placements, only=only)
        kernel.tables.check_fits(draft.change)
        self._note_placements(draft, considered, placements, full=not in_step)
        plan.pools = [self._summary(change) for change in draft.change.pools]
        plan.usage = usage_of(kernel, draft.change)

    def _claimed(
        self,
        plan: Plan,
        tables: Tables,
        every: Sequence[Pool],
        considered: Sequence[Pool],
        only: frozenset[int] | None,
    ) -> tuple[frozenset[int], list[Pool]]:
        """While the state is lost: which pools a change may touch, and those of them that it brings about."""
        wanted = {pool.key for pool in every}
        before = {pool.key for group in self._pools.values() for pool in group}
        kept = {pool.key for pool in considered if not pool.targets and len(tables.rows_of(pool.key))}
        for pool in considered:
            if pool.key in kept:
                plan.warnings.append(
                    f"{pool.service} port {pool.port}: no object describes a backend of it since the state was lost; "
                    "those that the kernel has stay"
                )
        for one in unclaimed(tables, wanted | before):
            plan.warnings.append(f"{one}: no object wants it since the state was lost; it stays as it is")
        may = (frozenset(wanted | before) if only is None else only) - kept
        return may, [pool for pool in considered if pool.key not in kept]

    def _note_placements(
        self, draft: Draft, pools: Sequence[Pool], placements: Placements, *, full: bool
    ) -> None:
        hops = {} if full else dict(self._hops)
        forwarded: set[int] = set()
        for pool in pools:
            mine = set()
            for target in pool.targets:
                placement = placements.place(target.address, pool.forwarding)
                if placement.note:
                    draft.plan.warnings.append(
                        f"{pool.service} port {pool.port}: {target.name} ({target.address}): {placement.note}"
                    )
                if placement.next_hop:
                    mine.add(placement.next_hop)
                if placement.forwarded:
                    forwarded.add(pool.version)
            hops[pool.key] = frozenset(mine)
            if not pool.active:
                draft.plan.warnings.append(
                    f"{pool.service} port {pool.port}: no IPv{pool.version} backend takes connections; "
                    "its packets are refused and counted as no_backend"
                )
        draft.hops = hops
        self._forwarded = forwarded if full else self._forwarded | forwarded
        if not self._repairing:
            require_forwarding(forwarded)

    def _work_out_moves(self, draft: Draft) -> None:
        """Fills in, for a dry run, what moves: slots of tables, and connections that are open."""
        self._policies.work_out_cut(draft.policies, draft.plan)
        if draft.plan.detaches:
            self._work_out_end(draft)
            return
        if self._kernel is None:
            return
        balancer, tables = self._kernel.balancer, self._kernel.tables
        retired = tables.retired(
            draft.change,
            draft.lives.drained(boottime()),
            still_wanted(draft.change, self._pools, draft.pools),
        )
        kernel = self._kernel
        draft.plan.sockets_ended = count_connected(
            balancer.maps["sockets"],
            lambda found: retired | self._strays(found, kernel, draft.pools, draft.lives),
        )
        reckoning = Reckoning(draft.change, tables, balancer.open_connections())
        changes = [*draft.change.pools, *_shrinking(draft, tables)]
        draft.plan.pools = [self._summary(change, reckoning.moves(change)) for change in changes]

    def _work_out_end(self, draft: Draft) -> None:
        """The same where everything goes: no tables are left to compare."""
        balancer = LoadBalancer.pinned(self.name.pins)
        if balancer is None:
            return
        with balancer:
            counts = balancer.open_connections()
        with self._remaining_sockets() as sockets:
            draft.plan.sockets_ended = count_connected(sockets, every_row)
        for pool in (pool for group in self._pools.values() for pool in group):
            keys = {frontend_key(frontend)[:FLOW_KEY_BYTES] for frontend in pool.frontends}
            ended = sum(number for (flow, _), number in counts.items() if flow in keys)
            summary = self._summary(PoolChange(pool.key, None), Moves(end=ended))
            draft.plan.pools.append(replace(summary, removed=len(pool.targets)))

    def _summary(self, change: PoolChange, moves: Moves | None = None) -> PoolSummary:
        if change.pool is not None:
            return _summary(change, change.pool, moves)
        before = (pool for group in self._pools.values() for pool in group if pool.key == change.key)
        gone = next(before, None)
        return PoolSummary(
            "remove",
            gone.service if gone else "",  # rows that a process left which was killed have no name any more
            gone.port if gone else "",
            f"IPv{gone.version}" if gone else "",
            tuple(map(str, gone.frontends)) if gone else (),
            (),
            len(change.gone_rows),
            0,
            moves,
        )

    # -- carrying out

    def _carry_out(self, draft: Draft) -> Applied:
        state = self._opened_state()
        applied = Applied(draft.plan)
        try:
            with state.change(), state.generation(draft.cause, self._unowned(draft)) as generation:
                state.put(Stored(resource, source) for resource, source in draft.put.values())
                state.remove(draft.drop)
                state.put_lives(draft.lives, draft.lived)
                applied.attachments = self._policies.carry_out(draft.policies, state)
                applied.attachments += self._carry_out_kernel(draft)
                applied.attachments += self._policies.carry_out_end(draft.policies)
                state.put_neighbours(self._neighbours)
                if self._lost and not draft.policies.stays and self._is_whole(draft):
                    state.mark_lost("")
                    self._lost = ""
        except BaseException:
            # What is in the kernel now is to be read again, not remembered.
            self._policies.undo()
            self._forget_kernel()
            raise
        draft.plan.generation = generation
        state.changed_elsewhere()
        if self._kernel is not None:
            self._kernel.watch.forget(pool.key for pool in draft.change.pools)
        for reference, (resource, source) in draft.put.items():
            self._stored[reference] = Stored(resource, source)
        for reference in draft.drop:
            del self._stored[reference]
        self._remember_left(draft.change)
        self._catalogue, self._lives, self._pools = draft.catalogue, draft.lives, draft.pools
        self._hops = draft.hops
        self._policies.settle(draft.policies)
        if self._kernel is not None:
            self._end_sockets(draft.plan, self._kernel, draft.change)
        self._policies.cut(draft.policies, draft.plan)
        if self._on_change is not None and (not self._told or _changes_addresses(draft)):
            self._on_change(self)
            self._told = True
        return applied

    def _is_whole(self, draft: Draft) -> bool:
        """Whether all that the kernel serves is wanted again, with backends that objects describe."""
        pools = [pool for group in draft.pools.values() for pool in group]
        if self._unclaimed(frozenset(pool.key for pool in pools)):
            return False
        tables = self._kernel.tables if self._kernel is not None else None
        return tables is None or all(pool.targets or not len(tables.rows_of(pool.key)) for pool in pools)

    def _unclaimed(self, wanted: frozenset[int] | None = None) -> tuple[Unclaimed, ...]:
        """Services of the kernel that no object wants."""
        if wanted is None:
            wanted = frozenset(pool.key for group in self._pools.values() for pool in group)
        if self._kernel is None and LoadBalancer.pinned_services(self.name.pins) == 0:
            return ()
        with self._opened() as kernel:
            return unclaimed(kernel.tables, wanted)

    def _damage(self) -> str:
        """What is wrong with the state's file, as far as reading all of it shows; empty: nothing, or there is none."""
        if not (self.name.state_dir / STATE_FILE).exists():
            return ""
        try:
            self._opened_state().check()
        except StateDamaged as error:
            return error.why
        return ""

    def _unowned(self, draft: Draft) -> list[str]:
        """References of the objects that change and that no owner has, before or after."""
        sources = {name: source for name, (_, source) in draft.put.items()}
        return [
            name
            for name in dict.fromkeys((*draft.put, *draft.drop))
            if sources.get(name) not in OWNERS
            and ((known := self._stored.get(name)) is None or known.source not in OWNERS)
        ]

    def _carry_out_kernel(self, draft: Draft) -> list[Attachment]:
        if draft.plan.detaches:
            with self._remaining_sockets() as sockets:
                detached = self._remove_kernel()
                if sockets is not None:
                    try:
                        end_every_socket(draft.plan, sockets)
                    except bpf.BpfError as error:
                        draft.plan.warnings.append(f"{NOT_ENDED}: {error}")
            return detached
        kernel = self._kernel
        if kernel is None:
            return []
        in_step = kernel.is_in_step(draft.config)
        if not in_step:
            # The kernel forgets neighbours with their interface.
            self._neighbours &= {(str(n.address), n.interface) for n in net.neighbours() if n.managed}
        self._resolve_neighbours(draft)
        attachments: list[Attachment] = []
        retired = kernel.tables.retired(
            draft.change,
            draft.lives.drained(boottime()),
            still_wanted(draft.change, self._pools, draft.pools),
        )
        # A redirect's own pods are known before its rows are there, and forgotten after these are gone.
        pods, unknown = self._pod_rows(draft)
        draft.plan.warnings.extend(unknown)
        PodTable(kernel.balancer.maps["pods"]).put(pods)
        # Programs that take over meet whole tables; where they are running already, an interface that
        # refuses them must stop the change before the tables are touched.
        fresh = kernel.balancer.fresh
        if fresh:
            kernel.tables.carry_out(draft.change)
        if not in_step:
            attachments, kernel = self._activate(draft, kernel)
        if not fresh:
            kernel.tables.carry_out(draft.change)
        if not self._lost:  # else rows of documents that were lost would go
            PodTable(kernel.balancer.maps["pods"]).keep_only(pods)
        kernel.doomed.update(retired)
        return attachments

    def _pod_rows(self, draft: Draft) -> tuple[PodRows, list[str]]:
        """The rows that `pods` must have, and what cannot be as it is wanted."""
        inventory = draft.catalogue.inventory
        if not inventory.captures and not inventory.redirects:
            return {}, []
        wanted = treatment(inventory, (pool for group in draft.pools.values() for pool in group))
        group = self._cgroup_of(draft.config)
        addresses = {
            f"{pod.metadata.namespace}/{pod.metadata.name}": pod.addresses
            for pods in inventory.pods.values()
            for pod in pods
        }
        hidden: list[str] = []
        known = cookies(self.name, group, {pod: addresses.get(pod, ()) for pod in wanted.pods}, hidden)
        warnings = (
            wanted.warnings
            + hidden
            + [
                f"pod {pod}: no process of it is found on this node; its DNS queries are not captured"
                for pod in wanted.captured
                if pod not in known
            ]
        )
        return pod_rows(wanted, known), warnings

    def _end_sockets(self, plan: Plan, kernel: Serving, change: TableChange) -> None:
        """Ends the sockets that are connected to backends which are gone. Tables no longer hold these.

        After the change is committed: what a process that is killed here leaves is found by the next that comes.
        """
        looks = kernel.stray_look is not None and time.monotonic() >= kernel.stray_look
        doomed, kernel.doomed = kernel.doomed, {}
        if doomed or looks:
            kernel.stray_look = None
            sockets = kernel.balancer.maps["sockets"]
            try:
                found = kernel.records.read()
                rows = doomed | self._strays(found, kernel, self._pools, self._lives)
                there = set(zip(found["backend"].tolist(), found["generation"].tolist(), strict=True))
                ends = {row: place for row, place in rows.items() if row in there}
                end_sockets(plan, sockets, ends)
            except bpf.BpfError as error:
                plan.warnings.append(f"{NOT_ENDED}: {error}")
                kernel.doomed = doomed  # with the next look
                kernel.stray_look = time.monotonic() + STRAYS_AFTER_S
                return
            if looks:  # else a program may still connect by the old tables
                self._left = {key: self._left[key] for key in self._left.keys() & set(found["pool"].tolist())}
        if doomed or any(pool.gone_rows for pool in change.pools):
            # A program may have read the old table and not have connected yet.
            kernel.stray_look = time.monotonic() + STRAYS_AFTER_S

    def _strays(
        self, found: Any, kernel: Serving, pools: Mapping[str, Sequence[Pool]], lives: Lives
    ) -> dict[BackendRow, tuple[Address, int]]:
        if self._lost:
            return {}  # it is not known who is wanted
        every = (pool for group in pools.values() for pool in group)

        def services() -> dict[int, str]:
            return self._left | {pool.key: name for name, group in self._pools.items() for pool in group}

        return strays(found, kernel.tables.backends, every, lives.drained(boottime()), services)

    def _remember_left(self, change: TableChange) -> None:
        """Notes whose pools were that go; before the pools are exchanged."""
        gone = {difference.key for difference in change.pools if difference.pool is None}
        if gone:
            self._left |= {
                pool.key: name for name, group in self._pools.items() for pool in group if pool.key in gone
            }

    def _activate(self, draft: Draft, kernel: Serving) -> tuple[list[Attachment], Serving]:
        """Attaches the programs; again, with other tunables, where a driver turns out to have no native XDP."""
        uplinks: Any = draft.plan.uplinks
        cgroup, _ = self._cgroup(draft.config)
        refused: list[bpf.BpfError] = []
        attachments = kernel.balancer.activate(uplinks, cgroup, refused=refused)
        tunables = self._tunables(draft.config, uplinks)
        if tunables != kernel.balancer.tunables:
            self._forget_serving()
            balancer = LoadBalancer.open(self.name.pins, tunables)
            kernel = self._kernel = Serving(balancer, Tables(balancer))
            refused.clear()
            attachments = balancer.activate(uplinks, cgroup, refused=refused)
        draft.plan.warnings.extend(f"{NO_CONNECT_TIME}: {error.why or error.what}" for error in refused)
        kernel.settle(draft.config, draft.plan.uplinks, cgroup)
        return attachments, kernel

    def _resolve_neighbours(self, draft: Draft) -> None:
        """Has the kernel keep every next hop's layer-2 address, and forget those that only Hookline wanted."""
        wanted = set().union(*draft.hops.values()) if draft.hops else set()
        if len(wanted) > RESOLVED_NEIGHBOURS_MAX:
            draft.plan.warnings.append(
                f"{len(wanted)} next hops: {RESOLVED_NEIGHBOURS_MAX} are kept resolved, the first packets to the "
                "others take the stack's way"
            )
            wanted = set(sorted(wanted)[:RESOLVED_NEIGHBOURS_MAX])
        for address, interface in wanted - self._neighbours:
            net.keep_resolved(_address(address), interface)
        if self._lost:
            wanted |= self._neighbours  # those of services that nobody claimed yet are among them
        self._forget_neighbours(self._neighbours - wanted)
        self._neighbours = wanted

    def _forget_neighbours(self, pairs: Iterable[tuple[str, str]]) -> None:
        for address, interface in pairs:
            try:
                net.forget(_address(address), interface)
            except net.NetworkError:
                continue  # the interface is gone, and its neighbours with it

    @contextmanager
    def _remaining_sockets(self) -> Iterator[bpf.Map | None]:
        """The records of sockets, to be used after their pin is gone; None where they cannot be read."""
        try:
            sockets = bpf.Map.from_pin(self.name.pins / "maps" / "sockets")
        except bpf.BpfError:
            yield None
            return
        with sockets:
            yield sockets

    def _remove_kernel(self) -> list[Attachment]:
        """Detaches and unpins everything, also what another version left."""
        from hookline.datapath.loadbalancer.balancer import remove

        self._forget_serving()
        self._forget_neighbours(self._neighbours)
        self._neighbours = set()
        return remove(self.name.pins)

    # -- repairing

    def _repaired(self, full: bool) -> Repaired:
        untold, self._untold = self._untold, []
        result = Repaired(problems=untold)
        known = self._kernel
        damaged = (known is None and not self._policies.is_settled) or self._policies.needs_look
        if known is not None:
            drift = known.watch.compare(pool for group in self._pools.values() for pool in group)
            result.repairs += known.watch.restore(drift)
            known.watch.distrust(drift)
            attachments = self._changed_attachments(known)
            result.repairs += attachments
            damaged = bool(drift.tables or attachments)
        lost = self._lost_neighbours()
        found = self._policies.drift()
        result.repairs += lost + found
        damaged = damaged or bool(lost or found)
        if known is not None and self._lost_pods(known):
            result.repairs.append(Repair("pod", "pods of this node are not those of the table"))
            damaged = True
        if not (damaged or full):
            if known is not None:
                self._late_strays(known, result)
            result.problems += [*forwarding_off(self._forwarded), *self._policies.problems]
            return result
        if known is not None:
            known.unsettle()
        self._policies.unsettle()
        draft = self._draft([])
        kernel = self._kernel
        if known is None and kernel is not None and not kernel.balancer.fresh:
            # Tables that another process built: those whose slots are not what they should be are built again.
            drift = kernel.watch.compare(pool for group in draft.pools.values() for pool in group)
            if drift.tables:
                kernel.watch.distrust(drift)
                draft = self._draft([])
        result.problems += [*forwarding_off(self._forwarded), *draft.policies.problems]
        result.repairs += [
            Repair("table", f"{pool.service} port {pool.port} {pool.family}: not what is wanted")
            for pool in draft.plan.pools
        ]
        if kernel is None and not draft.plan.detaches and draft.plan.policies is None:
            return result  # nothing is balanced, and nothing judged
        applied = self._carry_out(draft)
        result.problems += not_ended(applied.plan)
        if not any(one.kind == "link" for one in result.repairs):
            result.repairs += [
                Repair("link", f"{one.program}{' on ' * bool(one.interface)}{one.interface}: {one.change}")
                for one in applied.attachments
                if one.change != "kept"
            ]
        return result

    def _late_strays(self, kernel: Serving, result: Repaired) -> None:
        """Ends what connected by the old tables while the last change was made."""
        plan = Plan()
        self._end_sockets(plan, kernel, TableChange())
        result.problems += plan.warnings
        if plan.sockets_ended:
            what = f"{plan.sockets_ended} connected while their backend was taken out"
            result.repairs.append(Repair("socket", what))

    def _changed_attachments(self, kernel: Serving) -> list[Repair]:
        """What is not attached or pinned as it was left."""
        pins = self.name.pins
        repairs = link_drift(kernel.links, link_state(pins))
        repairs += [
            Repair("pin", f"{name}: it was unpinned") for name in sorted(kernel.pinned - pinned_names(pins))
        ]
        if not repairs and kernel.uplinks and kernel.indexes != indexes_of(kernel.uplinks):
            names = ", ".join(name for name, _ in kernel.uplinks)
            repairs.append(Repair("link", f"{names}: an interface was made anew"))
        if not repairs and kernel.uplinks:
            missing = not_attached(pins, [name for name, _ in kernel.uplinks])
            repairs += [
                Repair("link", f"{program}{' on ' * bool(interface)}{interface}: it was detached")
                for program, interface in missing
            ]
        return repairs

    def _lost_pods(self, kernel: Serving) -> bool:
        """Whether a pod that has a row came, went or began anew."""
        draft = Draft(
            Plan(), {}, [], TableChange(), kernel.config, catalogue=self._catalogue, pools=self._pools
        )
        pods, _ = self._pod_rows(draft)
        return not self._lost and not PodTable(kernel.balancer.maps["pods"]).holds(pods)

    def _lost_neighbours(self) -> list[Repair]:
        """Next hops that the kernel no longer keeps resolved."""
        if not self._neighbours:
            return []
        there = {(str(one.address), one.interface) for one in net.neighbours() if one.managed}
        lost = self._neighbours - there
        self._neighbours &= there
        return [
            Repair("neighbour", f"{address} on {interface}: it was removed")
            for address, interface in sorted(lost)
        ]

    # -- staying in step

    @contextmanager
    def _inside(self) -> Iterator[None]:
        with net.inside(self._namespace()):
            yield

    def _namespace(self) -> Path | None:
        path = self.name.netns
        if path is not None and not path.exists():
            raise NotThere(
                f"node {self.name} does not exist",
                why=f"there is no network namespace {path.name}",
                remedy="hookline lab list",
            )
        return path

    @contextmanager
    def _writing(self) -> Iterator[None]:
        """The node's lock, its network namespace, and a fresh view of its state."""
        with self._locked():
            self._opened_state()
            self._refresh()
            yield

    @contextmanager
    def _locked(self) -> Iterator[None]:
        self._namespace()
        with locked(self.name.state_dir), self._inside():
            bpf.pin.check_lasting()
            bpf.ensure_bpffs()
            yield

    def _opened_state(self) -> State:
        if self._state is None:
            self._state = State(self.name.state_dir, self._why_lost)
        return self._state

    def _why_lost(self) -> str:
        """What is said of a state that begins anew; empty where there is nothing in the kernel that it would be the state of."""
        there = ["services"] if LoadBalancer.pinned_services(self.name.pins) else []
        there += ["policies"] if self._policies.exists else []
        return STATE_GONE.format(" and ".join(there)) if there else ""

    def _close_state(self) -> None:
        if self._state is not None:
            self._state.close()
            self._state = None

    def _refresh(self) -> None:
        """Reads the wanted state again if another process changed it, and forgets what was known of the kernel."""
        if self._state is None and not (self.name.state_dir / STATE_FILE).exists():
            return  # nothing was ever applied, and reading makes no files
        state = self._opened_state()
        if not state.changed_elsewhere():
            return
        self._forget_kernel()
        try:
            self._stored = state.resources()
            self._neighbours = state.neighbours()
            self._lives = state.lives()
            self._lost = state.lost()
            numbers = state.rule_numbers()
        except BaseException:
            # The next look must not take what was not read for known.
            self._close_state()
            raise
        self._catalogue, self._pools = Catalogue(), {}
        self._hops = {}
        resources = [item.resource for item in self._stored.values()]
        nodes = {one.reference for one in resources if isinstance(one, model.Node)}
        self._catalogue = Catalogue.of(resources, self._here(nodes))
        self._policies.start(resources, self._names(), numbers)
        now = boottime()
        self._pools = {name: self._living(name, now) for name in self._catalogue.pools}

    def _forget_kernel(self) -> None:
        """Has both parts of the kernel's side read again by the next change."""
        self._forget_serving()
        self._policies.forget()

    def _forget_serving(self) -> None:
        if self._kernel is not None:
            self._kernel.close()
            self._kernel = None

    @contextmanager
    def _opened(self) -> Iterator[Serving]:
        """The kernel side for reading: this process's own, or adopted for the moment."""
        if self._kernel is not None:
            yield self._kernel
            return
        balancer = LoadBalancer.pinned(self.name.pins)
        if balancer is None or balancer.maps["services"].value_dtype.names != ServiceRow._fields:
            raise ControlError(
                f"what is loaded on node {self.name} cannot be read",
                why="it is not whole, or another version of Hookline loaded it",
                remedy="apply any file once: hookline apply -f FILE",
            )
        with balancer:
            yield Serving(balancer, Tables(balancer))

    def _reading_placements(self) -> Placements:
        """Placements by the uplinks that are wanted, or else, where these are not there now, by those that are attached."""
        try:
            uplinks = {name for name, _ in self._uplinks(self._config())}
        except net.NetworkError:
            uplinks = {interface for _, interface in attached(self.name.pins) if interface}
        return Placements(frozenset(uplinks))


def _address(text: str) -> Address:
    return IPv6Address(text) if ":" in text else IPv4Address(text)


def _shrinking(draft: Draft, tables: Tables) -> list[PoolChange]:
    """The pools that lose addresses or ports and nothing else: their tables and rows stay as they are."""
    changing = {change.key for change in draft.change.pools}
    losing = {tables.services[key].pool for key in draft.change.removed} - changing - {0}
    return [
        PoolChange(pool.key, pool) for group in draft.pools.values() for pool in group if pool.key in losing
    ]


def _changes_addresses(draft: Draft) -> bool:
    """Whether a change may be one of `Node.service_addresses`."""
    return (
        draft.plan.loads
        or draft.plan.detaches
        or bool(draft.plan.attaches or draft.change.addresses or draft.change.removed)
        or any(
            pool.pool is None or pool.new_frontends or pool.pool.forwarding == "dsr"
            for pool in draft.change.pools
        )
    )


def _summary(change: PoolChange, pool: Pool, moves: Moves | None) -> PoolSummary:
    fresh = len(change.new_frontends) == len(pool.frontends)
    return PoolSummary(
        "create" if fresh else "change",
        pool.service,
        pool.port,
        f"IPv{pool.version}",
        tuple(map(str, pool.frontends)),
        tuple(f"{_host(item.target)} ({item.placement.how})" for item in change.new),
        len(change.gone_rows),
        change.pages,
        moves,
    )


def _addresses(groups: Iterable[Sequence[Pool]]) -> Iterator[Address]:
    """The addresses that the network must bring to this node."""
    for group in groups:
        for pool in group:
            for frontend in pool.frontends:
                if frontend.scope == "any":
                    yield frontend.address


def _host(target: Target) -> str:
    host = f"[{target.address}]" if target.address.version == 6 else str(target.address)
    return f"{host}:{target.port}"
