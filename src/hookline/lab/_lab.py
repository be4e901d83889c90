"""Making, finding, changing and removing labs.

What holds whatever happens, also ``kill -9`` of whoever makes, changes or removes a lab:

- Everything of a lab carries its name: network namespaces ``hl.LAB.…``, cgroups ``hookline/LAB/…``, the folders of its
  files, state and pins, and its server, whose number is in ``lab.json`` before it may outlive its maker. Interfaces exist
  inside its namespaces only. So `down` finds all of it without knowing how far the making came.
- Removal takes pins first (a pinned XDP link outlives its namespace), then processes, namespaces, cgroups and state, and the
  lab's own folder last: while it is there, the lab can be found and removed again.
"""

from __future__ import annotations

import contextlib
import json
import os
import shutil
import socket
import subprocess
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal, TypeAlias, TypeVar

from hookline import net
from hookline.lab import _announce, _inside, _processes, _topology
from hookline.lab._announce import Announcement
from hookline.lab._client import Client, ServerCounts, start
from hookline.lab._errors import LabError
from hookline.lab._plan import LAB_KINDS, Family, Member, Plan, plan
from hookline.lab._probe import Probe, probe
from hookline.lab._processes import Process
from hookline.lab._record import Record, boot_id, is_locked, locked, recorded_labs, write_json
from hookline.model import Pod, Resource, parse
from hookline.model.names import (
    BPFFS,
    DEFAULT_LAB,
    NETNS,
    Address,
    Endpoint,
    NodeName,
    Protocol,
    check_lab_name,
    lab_cgroup,
    lab_netns_prefix,
    lab_pins,
    lab_run_dir,
    lab_state_dir,
    labs_run_dir,
)

Say: TypeAlias = Callable[[str], None]
Progress: TypeAlias = Callable[[int, int], None]
Status: TypeAlias = Literal["up", "changing", "incomplete"]

Result = TypeVar("Result")

_PATIENCE_S = 15.0


class Lab:
    """A lab that is up."""

    def __init__(self, record: Record, resources: Iterable[Resource]) -> None:
        self._record = record
        self._take(plan(resources, record.name, record.families))

    @classmethod
    def open(cls, name: str = DEFAULT_LAB) -> Lab:
        """The lab of a name.

        Raises:
            LabError: There is none, or it is not complete.
        """
        check_lab_name(name)
        record = Record.read(name)
        if record is not None and record.is_up:
            return cls(record, _read_resources(name))
        if record is None and not _remains(name):
            raise _no_lab(name)
        raise LabError(
            f"lab {name} is not complete",
            why="it is being made or removed" if is_locked(name) else "its making or removal was cut short",
            remedy=f"hookline lab down --name {name}",
        )

    @property
    def name(self) -> str:
        """The lab's name."""
        return self._record.name

    @property
    def families(self) -> tuple[Family, ...]:
        """The address families that its members have: 4, and 6 where the machine has it."""
        return self._plan.families

    @property
    def nodes(self) -> tuple[Member, ...]:
        """The nodes, in the order of the file."""
        return self._plan.nodes

    @property
    def pods(self) -> tuple[Member, ...]:
        """The pods, in the order of the file and of their addition."""
        return self._plan.pods

    @property
    def externals(self) -> tuple[Member, ...]:
        """The machines outside."""
        return self._plan.externals

    @property
    def members(self) -> tuple[Member, ...]:
        """Everyone: nodes, pods, machines outside."""
        return self._plan.members

    @property
    def first_node(self) -> NodeName:
        """The node that ``lab/LAB`` means."""
        return NodeName(self.name, self._plan.nodes[0].name)

    def resources(self) -> tuple[Resource, ...]:
        """The lab's Namespaces, Nodes, Pods and ExternalHosts, with addresses filled in."""
        return self._plan.resources

    def member(self, endpoint: str | Endpoint) -> Member:
        """The member that an endpoint names.

        Raises:
            LabError: There is none of that name; those that there are are named.
            InvalidName: It is not an endpoint.
        """
        wanted = Endpoint.parse(endpoint) if isinstance(endpoint, str) else endpoint
        if wanted.address is not None:
            for member in self._plan.members:
                if wanted.address in member.addresses:
                    return member
        elif (found := self._plan.member(wanted.member)) is not None:
            return found
        there = [member.endpoint for member in self._plan.members]
        shown = ", ".join(there[:12]) + (f" and {len(there) - 12} more" if len(there) > 12 else "")
        raise LabError(
            f"lab {self.name} has no {wanted.member}",
            why=f"its members are {shown}",
            remedy=f"hookline lab list --name {self.name} shows them all",
        )

    def refresh(self) -> None:
        """Take up what other processes changed since."""
        self._take(plan(_read_resources(self.name), self.name, self._record.families))

    def add_pod(
        self,
        pod: Resource | Mapping[str, Any],
        *,
        before_up: Callable[[tuple[Resource, ...]], None] = lambda resources: None,
    ) -> tuple[Resource, ...]:
        """Add a pod to the running lab, with its servers.

        Args:
            pod: Its document.
            before_up: Called with all of the lab's resources before the pod can send or be sent anything: its node has its
                end of the pod's link, with the routes to it. What it raises undoes all.

        Returns:
            All of the lab's resources, the new one with its addresses.

        Raises:
            LabError: The name or address is taken, or the node is not there; nothing was changed.
        """
        resource = pod if isinstance(pod, Resource) else parse(dict(pod))
        if not isinstance(resource, Pod):
            raise LabError(
                f"cannot add {resource.reference} to lab {self.name}", why="only pods can be added"
            )
        with self._changing() as folder:
            after = plan((*self._plan.resources, resource), self.name, self._record.families)
            member = after.pods[-1]
            try:
                if self._record.cgroups:
                    net.cgroups.make(member.cgroup)
                _topology.add_pod(after, member, lambda: before_up(after.resources))
                _announce.settle_pod(after, folder, member)
                self._serve([member])
            except BaseException:
                with contextlib.suppress(LabError):
                    self._client.remove([member.endpoint])
                _topology.remove_pod(after, member)
                _remove_cgroup(member.cgroup)
                raise
            self._save(after)
        return self.resources()

    def remove_pod(self, endpoint: str | Endpoint) -> tuple[Resource, ...]:
        """Remove a pod from the running lab; its server's counts stay.

        Returns:
            All resources that the lab has then.

        Raises:
            LabError: There is no such pod.
        """
        with self._changing():
            member = self.member(endpoint)
            if member.kind != "pod":
                raise LabError(f"cannot remove {member.endpoint} from lab {self.name}", why="it is not a pod")
            rest = [
                resource
                for resource in self._plan.resources
                if not (
                    isinstance(resource, Pod) and f"{resource.namespace}/{resource.name}" == member.endpoint
                )
            ]
            after = plan(rest, self.name, self._record.families)
            self._save(after)
            self._client.remove([member.endpoint])
            _end_processes([member.netns])
            _topology.remove_pod(after, member)
            _remove_cgroup(member.cgroup)
        return self.resources()

    def announce(self, node: str, services: Mapping[str | Address, Announcement]) -> None:
        """Have the lab's network bring service addresses to a node.

        Declarative: what the node announced before and does not now is withdrawn. An address that several
        nodes announce goes to the last; when that one withdraws it, to another that still announces it.

        Args:
            node: The node's name. services: By service address: the addresses of its ``backends``, and
            whether these have the service's
                address on their ``loopback`` (direct server return).

        Raises:
            LabError: The lab has no such node, or a member has a service's address.
        """
        with self._changing() as folder:
            _announce.announce(self._plan, folder, node, services)

    def probe(
        self,
        source: str | Endpoint,
        target: str | Endpoint,
        port: int | None = None,
        protocol: Protocol | None = None,
        family: Family | None = None,
        *,
        timeout: float = 3.0,
    ) -> Probe:
        """Ask from inside a member who answers at a target.

        Args:
            source: A pod, external host or node.
            target: A member or an address, with its port or without.
            port: The port, where the target has none.
            protocol: ``tcp`` or ``udp``; the target's by default.
            family: 4 or 6; by default the first that both have.
            timeout: Seconds to wait for the connection and the answer.

        Raises:
            ProbeFailed: No answer, and why.
            LabError: There is no such member, or no port was given.
        """
        origin = self.member(source)
        to = Endpoint.parse(target) if isinstance(target, str) else target
        number = to.port if port is None else port
        if number is None:
            raise LabError(f"which port of {to}?", why="the target has none", remedy=f"say {to}:PORT[/udp]")
        return probe(
            origin.netns,
            self._target_address(origin, to, family),
            number,
            protocol or to.protocol,
            source=origin.endpoint,
            target=to.member,
            timeout=timeout,
            group=self.cgroup(origin.endpoint),
        )

    def cgroup(self, endpoint: str | Endpoint) -> str:
        """The cgroup of a member's processes, relative to the cgroup2 mount; "" where it has none.

        Machines outside have none, and nobody has where cgroup v2 could not be written when the lab was made.

        Raises:
            LabError: There is no such member.
        """
        return self.member(endpoint).cgroup if self._record.cgroups else ""

    def move_into(self, endpoint: str | Endpoint) -> None:
        """Move this whole process into a member for good: its network namespace (the calling thread's) and its cgroup.

        Raises:
            LabError: There is no such member.
        """
        member = self.member(endpoint)
        _inside.move(member.netns, self.cgroup(member.endpoint))

    def call(self, endpoint: str | Endpoint, function: Callable[[], Result]) -> Result:
        """Run a function inside a member, in a fork of this process, and return what it returns (pickled on its way).

        Raises:
            LabError: There is no such member, or no result came back.
            BaseException: What the function raised.
        """
        member = self.member(endpoint)
        return _inside.call(member.netns, self.cgroup(member.endpoint), function)

    def sockets(
        self, endpoint: str | Endpoint, family: Family, protocol: Protocol = "tcp", number: int = 1
    ) -> list[socket.socket]:
        """New sockets that are a member's: of its network namespace and its cgroup, wherever they are used then.

        Args:
            endpoint: The member.
            family: 4 or 6.
            protocol: ``tcp`` or ``udp``.
            number: How many.

        Raises:
            LabError: There is no such member.
            OSError: The kernel gives no more sockets.
        """
        member = self.member(endpoint)
        kind = socket.SOCK_STREAM if protocol == "tcp" else socket.SOCK_DGRAM
        wanted = [(socket.AF_INET if family == 4 else socket.AF_INET6, kind)] * number
        return _inside.open_sockets(member.netns, self.cgroup(member.endpoint), wanted)

    def start(
        self, endpoint: str | Endpoint, command: Sequence[str], **options: Any
    ) -> subprocess.Popen[Any]:
        """Start a command in a member's network namespace and cgroup; ``options`` are those of `subprocess.Popen`.

        Raises:
            LabError: There is no such member, or the command cannot be run.
        """
        member = self.member(endpoint)
        if group := self.cgroup(member.endpoint):
            command = _inside.command_in(group, command, options.get("env"))
        with net.inside(member.netns):
            try:
                return subprocess.Popen(command, **options)
            except OSError as error:
                raise LabError(f"cannot run {command[0]}", why=error.strerror or str(error)) from None

    def run(
        self, endpoint: str | Endpoint, command: Sequence[str], *, timeout: float | None = None
    ) -> subprocess.CompletedProcess[str]:
        """Run a command in a member's network namespace and cgroup, and return its exit status and output as text.

        Raises:
            LabError: There is no such member, or the command cannot be run.
            subprocess.TimeoutExpired: It took longer.
        """
        with self.start(
            endpoint, command, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True
        ) as process:
            try:
                output, errors = process.communicate(timeout=timeout)
            except BaseException:
                process.kill()
                raise
        return subprocess.CompletedProcess(process.args, process.returncode, output, errors)

    def server_counts(self) -> ServerCounts:
        """What the lab's servers have seen, by member and port.

        Raises:
            LabError: The server does not answer.
        """
        return self._client.counts()

    def reset_server_counts(self) -> None:
        """Begin all of the servers' counts at zero."""
        self._client.reset()

    def _serve(self, members: Iterable[Member]) -> None:
        """Has the lab's server listen on these members' ports, where the lab has one that does."""
        if self._record.serves:
            self._client.add(members)

    def _take(self, new: Plan) -> None:
        self._plan = new
        self._client = Client(self.name, lab_run_dir(self.name))

    @contextlib.contextmanager
    def _changing(self) -> Any:
        """Hold the lab's lock, with this object up to date."""
        try:
            with locked(self.name, patience_s=_PATIENCE_S) as folder:
                record = Record.read(self.name)
                if record is None or record.made_at != self._record.made_at:
                    raise _no_lab(self.name, why="it was removed since it was opened")
                self.refresh()
                yield folder
        except FileNotFoundError:
            raise _no_lab(self.name) from None

    def _save(self, new: Plan) -> None:
        write_json(
            lab_run_dir(self.name) / "resources.json", [resource.to_document() for resource in new.resources]
        )
        self._take(new)

    def _target_address(self, origin: Member, to: Endpoint, family: Family | None) -> Address:
        if to.address is not None:
            if family not in (None, to.address.version):
                raise LabError(f"{to.address} is not an IPv{family} address", remedy="leave --family out")
            return to.address
        target = self.member(to)
        for candidate in (family,) if family else self.families:
            address = target.address(candidate)
            if address is not None and origin.address(candidate) is not None:
                return address
        raise LabError(f"{target.endpoint} and {origin.endpoint} have no IPv{family} address each")


@dataclass(frozen=True, slots=True)
class LabSummary:
    """A line of `list_labs`.

    ``status`` is ``up``; ``changing`` while a process is making or removing it; or ``incomplete``: its maker
    ended before it was done. ``server`` tells whether its server runs.
    """

    name: str
    status: Status
    server: bool
    nodes: tuple[str, ...] = ()
    pods: int = 0
    externals: int = 0

    def as_dict(self) -> dict[str, Any]:
        """The summary as plain values."""
        return {
            "name": self.name,
            "status": self.status,
            "server": self.server,
            "nodes": list(self.nodes),
            "pods": self.pods,
            "externals": self.externals,
        }


def up(
    resources: Iterable[Resource],
    name: str = DEFAULT_LAB,
    *,
    serve: bool = True,
    say: Say = lambda line: None,
    progress: Progress = lambda done, total: None,
) -> Lab:
    """Make a lab, and return it once every server listens.

    What an earlier process of the same lab left behind when it was killed is removed first.

    Args:
        resources: Namespaces, Nodes, Pods and ExternalHosts; other kinds are passed over.
        name: The lab's.
        serve: Whether the lab's server listens on the members' ports; a `Prober` opens what it needs itself.
        say: Told, a line at a time, what the user ought to know: what was cleaned up, what is left out.
        progress: Told after every network namespace how many of how many there are.

    Raises:
        LabError: The resources cannot be a lab; or there is a lab of that name. Nothing was made.
        NetworkError: The kernel refused something. What was made is gone again.
    """
    check_lab_name(name)
    families: tuple[Family, ...] = (4, 6) if net.ipv6_available() else (4,)
    resources = list(resources)
    wanted = plan(resources, name, families)
    if 6 not in families:
        say("IPv6 is switched off on this machine: the lab has IPv4 only")
    others = [resource.reference for resource in resources if not isinstance(resource, LAB_KINDS)]
    if others:
        say(f"passed over, as not of a lab: {', '.join(others)}")
    if serve and any(port.protocol == "sctp" for member in wanted.members for port in member.ports):
        say("ports of SCTP have no server: the lab's servers speak TCP and UDP")
    cgroups = net.cgroups.writable()
    if not cgroups:
        say("cgroup v2 is not there for writing: the lab's processes stay in the cgroup that starts them")
    with locked(name, create=True) as folder:
        _refuse_existing(name, say)
        record = Record.begin(name, families, wanted.nodes[0].name, cgroups=cgroups, serves=serve)
        try:
            record.write()
            if cgroups:
                for group in (member.cgroup for member in wanted.members if member.cgroup):
                    net.cgroups.make(group)
            with start(name, folder) as leash:
                record = record.with_server(leash.process)
                record.write()
                leash.let_go()
            _topology.build(wanted, progress)
            if serve:
                Client(name, folder).add(wanted.members)
            write_json(folder / "resources.json", [resource.to_document() for resource in wanted.resources])
            record = record.up()
            record.write()
        except BaseException:
            _remove(name, Record.read(name))
            raise
    return Lab(record, wanted.resources)


def down(name: str = DEFAULT_LAB) -> None:
    """Remove a lab and all that belongs to it, also one that was half made or half removed.

    Raises:
        LabError: There is no such lab; or another process is making or changing it.
    """
    check_lab_name(name)
    try:
        with locked(name):
            _remove(name, Record.read(name))
            return
    except FileNotFoundError:
        if not _remains(name):
            raise _no_lab(name) from None
    with locked(name, create=True):  # its folder is gone, its namespaces are not
        _remove(name, None)


def list_labs() -> list[LabSummary]:
    """All labs of this machine, incomplete ones too, in alphabetical order."""
    names = {*recorded_labs(), *_names_of_namespaces()}
    return [_summary(name) for name in sorted(names)]


def first_node(name: str) -> str:
    """The node that ``lab/NAME`` means: the first of the lab's file; ``node-1`` where there is no lab."""
    record = Record.read(check_lab_name(name))
    return (record and record.first_node) or "node-1"


def resolve_node(text: str) -> NodeName:
    """Read a node's name, ``lab/LAB`` standing for the lab's first node.

    Raises:
        InvalidName: It is not a node's name.
    """
    match text.split("/"):
        case ["lab", name]:
            return NodeName.parse(text, first_node=first_node(name))
    return NodeName.parse(text)


def _read_resources(name: str) -> list[Resource]:
    try:
        documents = json.loads((lab_run_dir(name) / "resources.json").read_text())
    except FileNotFoundError:
        raise _no_lab(name) from None
    return [parse(document) for document in documents]


def _refuse_existing(name: str, say: Say) -> None:
    """Refuse a lab that is up; remove what is left of one that is not."""
    record = Record.read(name)
    if record is not None and record.is_up:
        raise LabError(
            f"lab {name} is up already",
            why=f"process {record.maker.pid} made it",
            remedy=f"hookline lab down --name {name}, or choose another --name",
        )
    if record is not None or _remains(name):
        booted = record is not None and record.boot != boot_id()
        say(
            f"removing what is left of lab {name}, {'from before the last boot' if booted else 'half made or half removed'}"
        )
        _remove_contents(name, record)


def _remains(name: str) -> bool:
    """Whether there is something of a lab beside its folder, as far as this user may look."""
    namespaces = net.list_names(lab_netns_prefix(name))
    mount = net.cgroups.mount()
    folders = [lab_pins(name), lab_state_dir(name), *([mount / lab_cgroup(name)] if mount else [])]
    return bool(namespaces) or any(os.path.exists(folder) for folder in folders)


def _remove(name: str, record: Record | None) -> None:
    """Remove everything; the lab's folder, whose lock is held, last."""
    _remove_contents(name, record)
    folder = lab_run_dir(name)
    shutil.rmtree(folder)
    _remove_if_empty(labs_run_dir(), labs_run_dir().parent)


def _remove_contents(name: str, record: Record | None) -> None:
    pins = lab_pins(name)
    if pins.exists():
        shutil.rmtree(pins)
        _remove_if_empty(pins.parent, BPFFS)
    if record is not None and record.server is not None and record.boot == boot_id():
        _processes.end(record.server, reap=True)
    namespaces = net.list_names(lab_netns_prefix(name))
    _end_processes(NETNS / namespace for namespace in namespaces)
    for namespace in namespaces:
        net.delete(namespace)
    _remove_cgroup(lab_cgroup(name))
    for state in {lab_state_dir(name), *([record.state] if record else [])}:
        if state.exists():
            shutil.rmtree(state)
            _remove_if_empty(state.parent, state.parent.parent)
    folder = lab_run_dir(name)
    for path in folder.iterdir() if folder.exists() else ():
        if path.is_dir():
            shutil.rmtree(path)
        elif path.name != "lab.json":
            path.unlink()


def _end_processes(namespaces: Iterable[Path]) -> None:
    """End what runs in these namespaces: commands that ``hookline lab exec`` started there."""
    inodes = set()
    for path in namespaces:
        with contextlib.suppress(FileNotFoundError):
            status = path.stat()
            inodes.add((status.st_dev, status.st_ino))
    for process in _processes.in_namespaces(inodes):
        _processes.end(process)


def _remove_cgroup(group: str) -> None:
    """End what runs in a cgroup of a lab, also what left the lab's namespaces, and remove it with those below."""
    mount = net.cgroups.mount()
    if mount is None or not group or not (mount / group).is_dir():
        return
    for number in net.cgroups.processes(group):
        process = Process.of(number)
        if process is not None and number != os.getpid():
            _processes.end(process)
    net.cgroups.remove(group)
    _remove_if_empty(mount / Path(group).parts[0])


def _remove_if_empty(*folders: Path) -> None:
    for folder in folders:
        with contextlib.suppress(OSError):
            folder.rmdir()


def _names_of_namespaces() -> set[str]:
    return {parts[1] for parts in (name.split(".") for name in net.list_names("hl.")) if len(parts) > 2}


def _summary(name: str) -> LabSummary:
    record = Record.read(name)
    server = record is not None and record.server is not None and record.server.alive
    if record is None or not record.is_up:
        return LabSummary(name, "changing" if is_locked(name) else "incomplete", server)
    lab = Lab(record, _read_resources(name))
    return LabSummary(
        name, "up", server, tuple(node.name for node in lab.nodes), len(lab.pods), len(lab.externals)
    )


def _no_lab(name: str, why: str = "") -> LabError:
    return LabError(
        f"there is no lab {name}",
        why=why or "no lab of this name is up on this machine",
        remedy="hookline lab list shows the labs there are; hookline lab up -f FILE makes one",
    )
