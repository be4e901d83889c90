"""Where programs are attached in the whole system, by links or without: in every network namespace and cgroup.

Links say most. What has no link is asked for at the hooks: XDP and clsact by netlink, tcx by BPF_PROG_QUERY in every network
namespace that can be entered, cgroups by walking their tree, socket maps, and perf events through the processes that hold them.
"""

from __future__ import annotations

import contextlib
import ctypes
import dataclasses
import errno as errnos
import functools
import os
import struct
import threading
from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from hookline.bpf import _syscall
from hookline.bpf._errors import BpfError, failure
from hookline.bpf._introspection import _system
from hookline.bpf._links._link_info import LinkInfo, attach_type_name
from hookline.bpf._programs import _info
from hookline.bpf._syscall import AttachType, Command

__all__ = ["Placement", "placements"]

_CGROUP_TYPES = [one for one in AttachType if one.name.startswith("CGROUP_")] + [AttachType.LSM_CGROUP]
_SOCKMAP_TYPES = [
    AttachType.SK_MSG_VERDICT,
    AttachType.SK_SKB_STREAM_PARSER,
    AttachType.SK_SKB_STREAM_VERDICT,
    AttachType.SK_SKB_VERDICT,
]
_TRAFFIC_CONTROL = [
    AttachType.TCX_INGRESS,
    AttachType.TCX_EGRESS,
    AttachType.NETKIT_PRIMARY,
    AttachType.NETKIT_PEER,
]
_TASK_KINDS = ("raw_tracepoint", "tracepoint", "kprobe", "kretprobe", "uprobe", "uretprobe")
_XDP_MODES = (("DRV", "native"), ("SKB", "generic"), ("HW", "offload"))
_CLSACT = {0xFFFFFFF2: "ingress", 0xFFFFFFF3: "egress"}
_QDISC_PARENT = 0xFFFFFFF1
_CLONE_NEWNET = 0x40000000
_SPACE = 256
# NLM_F_DUMP_INTR: something came or went while the kernel was listing.
_INTERRUPTED = 0x10
_ATTEMPTS = 10


@dataclass(frozen=True)
class Placement:
    """A program on a hook.

    Attributes:
        program_id: The program.
        hook: The kind of hook: ``"xdp"``, ``"tcx"``, ``"clsact"``, ``"cgroup"``, ``"raw_tracepoint"``, ``"kprobe"``, …
        target: What it is on: an interface, a cgroup's path, a function, a tracepoint, …; empty where the kernel does not say.
        detail: XDP's mode, a direction, a cgroup's attach type, …
        namespace: Of interfaces: the network namespace's name, ``"net:[4026532000]"`` where it has none, ``""`` for this
            thread's own, ``"?"`` where it could not be found.
        link_id: The link that holds it there, None where it is attached without one.
    """

    program_id: int
    hook: str
    target: str
    detail: str = ""
    namespace: str = ""
    link_id: int | None = None

    def __str__(self) -> str:
        """Such as ``xdp:eth0:native``; the namespace follows after ``@``."""
        words = ":".join(word for word in (self.hook, self.target, self.detail) if word)
        return f"{words} @{self.namespace}" if self.namespace else words


def placements() -> list[Placement]:
    """Every attached program that can be found, with its place. Needs CAP_SYS_ADMIN.

    Socket filters cannot be found: the kernel does not tell. Network namespaces that no process is in and that have no name
    in /run/netns are not looked into; their links are listed with the interface's number.

    Raises:
        NotPermitted: CAP_SYS_ADMIN is missing.
    """
    found: list[Placement] = []
    held = _Links()
    for label, path in _namespaces():
        found += _inside(path, functools.partial(_interfaces, label, held))
    cgroups = _cgroups()
    for link in held.left():
        found.append(_described(link, cgroups))
    found += _cgroups_without_links(cgroups, found)
    found += _socket_maps(found)
    for one in _perf_events(found):
        # Before Linux 6.6 a link does not say which event it is on.
        silent = next(
            (old for old in found if old == Placement(one.program_id, "perf_event", "", link_id=old.link_id)),
            None,
        )
        if silent is not None and silent.link_id is not None:
            found.remove(silent)
            one = dataclasses.replace(one, link_id=silent.link_id)
        found.append(one)
    return found


# Links


class _Links:
    """All links, of which those on interfaces are taken out where the interface is found."""

    def __init__(self) -> None:
        self._all = {link.id: link for link in _system.links()}

    def on_interface(self, kind: str, index: int, program_id: int) -> int | None:
        """A link of this kind, for this program and an interface of this number; each is given once."""
        for link in self._all.values():
            if (link.type, link.program_id) == (kind, program_id) and link.interface_index == index:
                del self._all[link.id]
                return link.id
        return None

    def take(self, link_id: int) -> None:
        self._all.pop(link_id, None)

    def left(self) -> Iterator[LinkInfo]:
        return iter(self._all.values())


def _described(link: LinkInfo, cgroups: dict[int, Path]) -> Placement:
    hook, target, detail, namespace = link.type, link.name, attach_type_name(link.attach_type), ""
    if link.detached:
        short = detail.rpartition("_")[2] if hook in ("tcx", "netkit") else detail
        return Placement(link.program_id, hook, "detached", short, link_id=link.id)
    match link.type:
        case "xdp" | "tcx" | "netkit":
            target, namespace = f"#{link.interface_index}", "?"
            detail = detail.rpartition("_")[2]
        case "cgroup":
            target = str(cgroups.get(link.cgroup_id, link.cgroup_id))
        case "netns":
            namespace = _namespace_label(link.netns_inode)
        case "tracing":
            target = _traced(link)
        case "perf_event":
            hook = {"": "perf_event", "event": "perf_event"}.get(link.event, link.event)
            target += f"+{link.offset:#x}" if link.offset else ""
        case "netfilter":
            target, detail = link.protocol_family, f"{link.netfilter_hook}, priority {link.priority}"
        case "kprobe_multi":
            target = f"{link.count} functions"
        case "uprobe_multi":
            target += f", {link.count} places"
        case "sockmap":
            target = f"map {link.map_id}"
    return Placement(link.program_id, hook, target, detail, namespace, link.id)


def _traced(link: LinkInfo) -> str:
    """What a tracing link is on: a function of the kernel by its type, or what its program was loaded for."""
    with contextlib.suppress(BpfError):
        fd = _syscall.fd_by_id(Command.PROG_GET_FD_BY_ID, link.program_id, "a program")
        try:
            return _info.describe(fd).attach_target
        finally:
            os.close(fd)
    return ""


# Network namespaces


def _namespaces() -> list[tuple[str, Path | None]]:
    """Every network namespace that has a name or a process in it: a label and a path; this thread's own first."""
    seen = {os.stat("/proc/thread-self/ns/net").st_ino}
    found: list[tuple[str, Path | None]] = [("", None)]
    candidates = [(path.name, path) for path in _listing("/run/netns")]
    candidates += [("", path / "ns/net") for path in _listing("/proc") if path.name.isdigit()]
    for name, path in candidates:
        with contextlib.suppress(OSError):
            number = path.stat().st_ino
            if number not in seen:
                seen.add(number)
                found.append((name or f"net:[{number}]", path))
    return found


def _namespace_label(number: int) -> str:
    for label, path in _namespaces():
        with contextlib.suppress(OSError):
            if os.stat(path or "/proc/thread-self/ns/net").st_ino == number:
                return label
    return f"net:[{number}]"


def _inside(path: Path | None, look: Callable[[], list[Placement]]) -> list[Placement]:
    """What a function finds inside a network namespace; nothing where that is gone meanwhile."""
    if path is None:
        return look()
    found: list[Placement] = []
    failed: list[BaseException] = []

    def run() -> None:
        try:
            with open(path, "rb") as file:
                entered = ctypes.CDLL(None, use_errno=True).setns(file.fileno(), _CLONE_NEWNET) == 0
            if entered:
                found.extend(look())
        except FileNotFoundError:
            return
        except BaseException as error:
            failed.append(error)

    # A thread of its own: nobody else is moved.
    thread = threading.Thread(target=run)
    thread.start()
    thread.join()
    if failed:
        raise failed[0]
    return found


def _listing(folder: str) -> list[Path]:
    try:
        return sorted(Path(folder).iterdir())
    except OSError:
        return []


# Interfaces


def _interfaces(label: str, held: _Links) -> list[Placement]:
    """What is attached to the interfaces of this thread's network namespace."""
    from pyroute2 import IPRoute

    found: list[Placement] = []
    with IPRoute() as netlink:
        for message in _listed(netlink.get_links):
            index, name = message["index"], message.get_attr("IFLA_IFNAME")
            for number, mode in _xdp(message):
                link = held.on_interface("xdp", index, number)
                found.append(Placement(number, "xdp", name, mode, label, link))
            found += _tcx(index, name, label, held)
        for name, direction, number in _filters(netlink):
            found.append(Placement(number, "clsact", name, direction, label))
    return found


def _listed(ask: Callable[[], Iterable[Any]]) -> list[Any]:
    """A listing by netlink, asked for again when it changed meanwhile; nothing where what it is of has gone."""
    from pyroute2.netlink.exceptions import NetlinkError

    found: list[Any] = []
    for _ in range(_ATTEMPTS):
        try:
            found = list(ask())
        except NetlinkError as error:
            if error.code in (errnos.ENODEV, errnos.EINVAL, errnos.ENOENT):
                return []
            raise failure(error.code, "cannot list interfaces", capability="CAP_NET_ADMIN") from None
        if not any(message["header"]["flags"] & _INTERRUPTED for message in found):
            break
    return found


def _xdp(message: Any) -> Iterator[tuple[int, str]]:
    xdp = message.get_attr("IFLA_XDP")
    if xdp is None:
        return
    for kind, mode in _XDP_MODES:
        number = xdp.get_attr(f"IFLA_XDP_{kind}_PROG_ID")
        if number:
            yield int(number), mode


def _tcx(index: int, name: str, label: str, held: _Links) -> Iterator[Placement]:
    for attach_type in _TRAFFIC_CONTROL:
        hook, _, direction = attach_type_name(attach_type).partition("_")
        for program, link in _query(index, attach_type):
            held.take(link)
            yield Placement(program, hook, name, direction, label, link or None)


def _filters(netlink: Any) -> Iterator[tuple[str, str, int]]:
    from hookline.bpf._links._clsact import filter_program

    for qdisc in _listed(netlink.get_qdiscs):
        if qdisc["parent"] != _QDISC_PARENT:
            continue
        index = qdisc["index"]
        for parent, direction in _CLSACT.items():
            for message in _listed(functools.partial(netlink.get_filters, index, parent=parent)):
                number = filter_program(message)
                if number:
                    yield _syscall.interface_name(index), direction, number


def _query(target: int, attach_type: int) -> list[tuple[int, int]]:
    """The programs on a hook (BPF_PROG_QUERY) and their links' numbers; none where the kernel has no such hook there."""
    room = 64
    while True:
        programs, links = (ctypes.c_uint32 * room)(), (ctypes.c_uint32 * room)()
        attr = _syscall.attributes(
            "IIIIQI4xQQQQ",
            target,
            attach_type,
            0,
            0,
            ctypes.addressof(programs),
            room,
            0,
            ctypes.addressof(links),
            0,
            0,
        )
        result = _syscall.call(Command.PROG_QUERY, attr)
        if result != -errnos.ENOSPC:
            break
        room *= 4
    if result == -errnos.EINVAL:
        # Kernels before 6.6 know neither links nor a revision here.
        attr = _syscall.attributes("IIIIQI4x", target, attach_type, 0, 0, ctypes.addressof(programs), room)
        result = _syscall.call(Command.PROG_QUERY, attr)
    if result < 0:
        return []
    count = struct.unpack_from("=I", attr, 24)[0]
    return list(zip(programs[:count], links[:count], strict=True))


# What else has no link


def _cgroups() -> dict[int, Path]:
    """The cgroups of the unified tree by their numbers."""
    found: dict[int, Path] = {}
    for line in Path("/proc/self/mountinfo").read_text().splitlines():
        words, _, kind = line.partition(" - ")
        if kind.startswith("cgroup2 "):
            for folder, _, _ in os.walk(words.split()[4]):
                with contextlib.suppress(OSError):
                    found[os.stat(folder).st_ino] = Path(folder)
    return found


def _cgroups_without_links(cgroups: dict[int, Path], known: list[Placement]) -> Iterator[Placement]:
    linked = {(one.program_id, one.target, one.detail) for one in known if one.hook == "cgroup"}
    for path in cgroups.values():
        with contextlib.suppress(OSError):
            fd = os.open(path, os.O_RDONLY | os.O_DIRECTORY)
            try:
                for attach_type in _CGROUP_TYPES:
                    for program, _ in _query(fd, attach_type):
                        one = Placement(program, "cgroup", str(path), attach_type_name(attach_type))
                        if (program, one.target, one.detail) not in linked:
                            yield one
            finally:
                os.close(fd)


def _socket_maps(known: list[Placement]) -> Iterator[Placement]:
    linked = {(one.program_id, one.target, one.detail) for one in known if one.hook == "sockmap"}
    for found in _system.maps():
        if found.type not in ("sockmap", "sockhash"):
            continue
        with contextlib.suppress(BpfError):
            fd = _syscall.fd_by_id(Command.MAP_GET_FD_BY_ID, found.id, "a map")
            try:
                for attach_type in _SOCKMAP_TYPES:
                    for program, _ in _query(fd, attach_type):
                        one = Placement(program, "sockmap", f"map {found.id}", attach_type_name(attach_type))
                        if (program, one.target, one.detail) not in linked:
                            yield one
            finally:
                os.close(fd)


def _perf_events(known: list[Placement]) -> Iterator[Placement]:
    """Programs on perf events, which the processes hold (BPF_TASK_FD_QUERY): attached the old way, or by a link of Linux 6.1."""
    from hookline.bpf._introspection._holders import descriptors

    linked = {one.program_id for one in known if one.hook in _TASK_KINDS and one.target}
    seen = set()
    for process, fd, _ in descriptors("perf_event"):
        name = ctypes.create_string_buffer(_SPACE)
        attr = _syscall.attributes("IIIIQIIQQ", process, fd, 0, len(name), _syscall.address(name), 0, 0, 0, 0)
        if _syscall.call(Command.TASK_FD_QUERY, attr) < 0:
            continue
        program, kind, offset = struct.unpack_from("=IIQ", attr, 24)
        one = Placement(program, _TASK_KINDS[kind], name.value.decode(errors="replace"))
        if offset and kind in (2, 3, 4, 5):
            one = Placement(program, one.hook, f"{one.target}+{offset:#x}")
        if program not in linked and one not in seen:
            seen.add(one)
            yield one
