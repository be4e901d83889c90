"""Where programs are attached in the whole system, by links or without: in every network namespace and cgroup.

Links say most. What has no link is asked for at the hooks: XDP and clsact by netlink, tcx by BPF_PROG_QUERY in every network
namespace that can be entered, cgroups by walking their tree, socket maps, and perf events through the processes that hold them.
"""

from __future__ import annotations

import contextlib
import ctypes
import errno as errnos
import functools
import os
import struct
import threading
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from hookline.bpf import _syscall, _system, _types
from hookline.bpf._errors import BpfError
from hookline.bpf._syscall import Command

__all__ = ["Placement", "attach_name", "placements"]

# ``enum bpf_attach_type``: the kernel's names, the position is the number.
ATTACH_TYPES = [
    "cgroup_inet_ingress",
    "cgroup_inet_egress",
    "cgroup_inet_sock_create",
    "cgroup_sock_ops",
    "sk_skb_stream_parser",
    "sk_skb_stream_verdict",
    "cgroup_device",
    "sk_msg_verdict",
    "cgroup_inet4_bind",
    "cgroup_inet6_bind",
    "cgroup_inet4_connect",
    "cgroup_inet6_connect",
    "cgroup_inet4_post_bind",
    "cgroup_inet6_post_bind",
    "cgroup_udp4_sendmsg",
    "cgroup_udp6_sendmsg",
    "lirc_mode2",
    "flow_dissector",
    "cgroup_sysctl",
    "cgroup_udp4_recvmsg",
    "cgroup_udp6_recvmsg",
    "cgroup_getsockopt",
    "cgroup_setsockopt",
    "trace_raw_tp",
    "trace_fentry",
    "trace_fexit",
    "modify_return",
    "lsm_mac",
    "trace_iter",
    "cgroup_inet4_getpeername",
    "cgroup_inet6_getpeername",
    "cgroup_inet4_getsockname",
    "cgroup_inet6_getsockname",
    "xdp_devmap",
    "cgroup_inet_sock_release",
    "xdp_cpumap",
    "sk_lookup",
    "xdp",
    "sk_skb_verdict",
    "sk_reuseport_select",
    "sk_reuseport_select_or_migrate",
    "perf_event",
    "trace_kprobe_multi",
    "lsm_cgroup",
    "struct_ops",
    "netfilter",
    "tcx_ingress",
    "tcx_egress",
    "trace_uprobe_multi",
    "cgroup_unix_connect",
    "cgroup_unix_sendmsg",
    "cgroup_unix_recvmsg",
    "cgroup_unix_getpeername",
    "cgroup_unix_getsockname",
    "netkit_primary",
    "netkit_peer",
    "trace_kprobe_session",
    "trace_uprobe_session",
]
_CGROUP_TYPES = [
    n for n, name in enumerate(ATTACH_TYPES) if name.startswith("cgroup_") or name == "lsm_cgroup"
]
_SOCKMAP_TYPES = [
    ATTACH_TYPES.index(name)
    for name in ("sk_msg_verdict", "sk_skb_stream_parser", "sk_skb_stream_verdict", "sk_skb_verdict")
]
_NETFILTER_FAMILIES = {2: "ip", 10: "ip6"}
_NETFILTER_HOOKS = ("prerouting", "input", "forward", "output", "postrouting")
_PERF_KINDS = ("", "uprobe", "uretprobe", "kprobe", "kretprobe", "tracepoint", "perf_event")
_TASK_KINDS = ("raw_tracepoint", "tracepoint", "kprobe", "kretprobe", "uprobe", "uretprobe")
_XDP_MODES = (("DRV", "native"), ("SKB", "generic"), ("HW", "offload"))
_CLSACT = {0xFFFFFFF2: "ingress", 0xFFFFFFF3: "egress"}
_QDISC_PARENT = 0xFFFFFFF1
_CLONE_NEWNET = 0x40000000
_SPACE = 256


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
    found += _perf_events(found)
    return found


def attach_name(number: int) -> str:
    """The kernel's name of an attach type."""
    return _syscall.name_of(ATTACH_TYPES, number)


# Links


@dataclass
class _Link:
    """A link, and the part of its description that is different for every type."""

    id: int
    type: str
    program_id: int
    detail: bytes
    name: str

    def number(self, place: int) -> int:
        return int(struct.unpack_from("=I", self.detail, place)[0])

    def wide(self, place: int) -> int:
        return int(struct.unpack_from("=Q", self.detail, place)[0])


class _Links:
    """All links, of which those on interfaces are taken out where the interface is found."""

    def __init__(self) -> None:
        self._all = {
            link.id: link
            for link in _system.every(
                Command.LINK_GET_NEXT_ID, Command.LINK_GET_FD_BY_ID, "a link", _describe
            )
        }

    def on_interface(self, kind: str, index: int, program_id: int) -> int | None:
        """A link of this kind, for this program and an interface of this number; each is given once."""
        for link in self._all.values():
            if (link.type, link.program_id) == (kind, program_id) and link.number(0) == index:
                del self._all[link.id]
                return link.id
        return None

    def take(self, link_id: int) -> None:
        self._all.pop(link_id, None)

    def left(self) -> Iterator[_Link]:
        return iter(self._all.values())


# Where a description has a pointer for a name, and where that name's size: by type, or type and kind of perf event.
_NAMES = {"raw_tracepoint": (0, 8), "iter": (0, 8), "uprobe_multi": (0, 32), "perf_event": (8, 16)}


def _describe(fd: int) -> _Link:
    head, size = 16, 64
    buffer = ctypes.create_string_buffer(head + size)
    _read(fd, buffer)
    kind, number, program = struct.unpack_from("=III", buffer)
    link = _Link(number, _syscall.name_of(_syscall.LINK_TYPES, kind), program, buffer.raw[head:], "")
    if link.type in _NAMES and not (link.type == "perf_event" and link.number(0) in (0, 6)):
        pointer, length = _NAMES[link.type]
        text = ctypes.create_string_buffer(_SPACE * 16)
        again = ctypes.create_string_buffer(head + size)
        struct.pack_into("=Q", again, head + pointer, ctypes.addressof(text))
        struct.pack_into("=I", again, head + length, len(text))
        with contextlib.suppress(BpfError):
            _read(fd, again)
            link.detail, link.name = again.raw[head:], text.value.decode(errors="replace")
    return link


def _read(fd: int, buffer: ctypes.Array[ctypes.c_char]) -> None:
    attr = _syscall.attributes("IIQ", fd, len(buffer), _syscall.address(buffer))
    _syscall.checked(Command.OBJ_GET_INFO_BY_FD, attr, "cannot read the kernel's description of a link")


def _described(link: _Link, cgroups: dict[int, Path]) -> Placement:
    hook, target, detail, namespace = link.type, link.name, "", ""
    match link.type:
        case "xdp" | "tcx" | "netkit":
            index = link.number(0)
            # Number 0: the interface is gone, or the link was detached.
            target, namespace = (f"#{index}", "?") if index else ("", "")
            detail = attach_name(link.number(4)).rpartition("_")[2] if link.type != "xdp" else ""
        case "cgroup":
            number = link.wide(0)
            target, detail = str(cgroups.get(number, number)), attach_name(link.number(8))
        case "netns":
            target, detail = _namespace_label(link.number(0)), attach_name(link.number(4))
        case "tracing":
            target, detail = _target(link.number(4), link.number(8)), attach_name(link.number(0))
        case "perf_event":
            hook = _PERF_KINDS[link.number(0)] if link.number(0) < len(_PERF_KINDS) else hook
            hook = hook or link.type
            if hook in ("kprobe", "kretprobe", "uprobe", "uretprobe"):
                target += f"+{link.number(20):#x}" if link.number(20) else ""
        case "netfilter":
            family, hooked = link.number(0), link.number(4)
            target = _NETFILTER_FAMILIES.get(family, str(family))
            name = _NETFILTER_HOOKS[hooked] if hooked < len(_NETFILTER_HOOKS) else str(hooked)
            detail = f"{name}, priority {struct.unpack_from('=i', link.detail, 8)[0]}"
        case "kprobe_multi":
            target = f"{link.number(8)} functions"
        case "uprobe_multi":
            target += f", {link.number(36)} places"
        case "struct_ops":
            target = f"map {link.number(0)}"
        case "sockmap":
            target, detail = f"map {link.number(0)}", attach_name(link.number(4))
    return Placement(link.program_id, hook, target, detail, namespace, link.id)


def _target(object_id: int, type_id: int) -> str:
    """The name of what a tracing link is on: a function of the kernel, or of a program where the object is one."""
    with contextlib.suppress(BpfError):
        found = _types.names(0, [type_id]).get(type_id, "")
        if found:
            return found.removeprefix("btf_trace_")
    return f"object {object_id}, type {type_id}"


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
        for message in netlink.get_links():
            index, name = message["index"], message.get_attr("IFLA_IFNAME")
            for number, mode in _xdp(message):
                link = held.on_interface("xdp", index, number)
                found.append(Placement(number, "xdp", name, mode, label, link))
            found += _tcx(index, name, label, held)
        for name, direction, number in _filters(netlink):
            found.append(Placement(number, "clsact", name, direction, label))
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
    for attach_type in ("tcx_ingress", "tcx_egress", "netkit_primary", "netkit_peer"):
        hook, _, direction = attach_type.partition("_")
        for program, link in _query(index, ATTACH_TYPES.index(attach_type)):
            held.take(link)
            yield Placement(program, hook, name, direction, label, link or None)


def _filters(netlink: Any) -> Iterator[tuple[str, str, int]]:
    from hookline.bpf._clsact import filter_program

    for qdisc in netlink.get_qdiscs():
        if qdisc["parent"] != _QDISC_PARENT:
            continue
        index = qdisc["index"]
        for parent, direction in _CLSACT.items():
            for message in netlink.get_filters(index, parent=parent):
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
                        one = Placement(program, "cgroup", str(path), attach_name(attach_type))
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
                        one = Placement(program, "sockmap", f"map {found.id}", attach_name(attach_type))
                        if (program, one.target, one.detail) not in linked:
                            yield one
            finally:
                os.close(fd)


def _perf_events(known: list[Placement]) -> Iterator[Placement]:
    """Programs on perf events, which the processes hold (BPF_TASK_FD_QUERY): attached the old way, or by a link of Linux 6.1."""
    from hookline.bpf._holders import descriptors

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
