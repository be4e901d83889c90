"""What the kernel says of a link: its program, and where that is attached."""

from __future__ import annotations

import ctypes
import struct
from dataclasses import dataclass
from typing import Any

from hookline.bpf import _syscall
from hookline.bpf._syscall import AttachType

__all__ = ["LinkInfo", "describe"]

_STRING_BYTES = 4096  # the longest is a path
_DETAIL = 16  # where the union begins
_EVENTS = ["", "uprobe", "uretprobe", "kprobe", "kretprobe", "tracepoint", "event"]
_FAMILIES = {2: "ipv4", 10: "ipv6", 1: "inet", 7: "bridge", 3: "arp"}
_NETFILTER_HOOKS = ["prerouting", "input", "forward", "output", "postrouting"]
# Where a string's address, and its length, are in the union; perf events decide by their kind.
_STRINGS = {"raw_tracepoint": (0, 8), "iter": (0, 8), "uprobe_multi": (0, 32), "perf_event": (8, 16)}


class _Info(ctypes.Structure):
    """``struct bpf_link_info``; its union is read by type."""

    _fields_ = [
        ("type", ctypes.c_uint32),
        ("id", ctypes.c_uint32),
        ("prog_id", ctypes.c_uint32),
        ("pad", ctypes.c_uint32),
        ("detail", ctypes.c_ubyte * 64),
    ]


@dataclass(frozen=True)
class LinkInfo:
    """What the kernel says of a link. What a type of link does not have is 0, empty or None.

    Attributes:
        id: The kernel's number for it.
        type: The kernel's name: ``"xdp"``, ``"tcx"``, ``"raw_tracepoint"``, …
        program_id: The program on the hook.
        interface_index: Of XDP, tcx and netkit links; 0 once the interface is gone or the link detached.
        attach_type: ``BPF_*`` number of tcx, netkit, cgroup, netns, sockmap and tracing links, else None.
        cgroup_id: Of cgroup links, and of iterators over one cgroup: the inode of its folder.
        netns_inode: Of netns links: the inode of the network namespace.
        name: The tracepoint, function, probed file or iterator's target. Linux 6.6 and newer tell it of perf
            events.
        event: Of perf event links: ``"tracepoint"``, ``"kprobe"``, ``"kretprobe"``, ``"uprobe"``,
            ``"uretprobe"`` or ``"event"``.
        offset: Of kprobes from the function's start, of uprobes from the file's, in bytes.
        count: How many places a multi link probes.
        missed: How often a kprobe was hit and could not run.
        map_id: Of sockmap links, and of iterators over one map.
        process_id: Of iterators over one process or thread.
        protocol_family: Of netfilter links: ``"ipv4"``, ``"ipv6"``.
        netfilter_hook: Of netfilter links: ``"input"``, ``"output"``, …
        priority: Of netfilter links.
        target_type_id: Of tracing links: the BTF id of what they trace.
    """

    id: int
    type: str
    program_id: int
    interface_index: int = 0
    attach_type: int | None = None
    cgroup_id: int = 0
    netns_inode: int = 0
    name: str = ""
    event: str = ""
    offset: int = 0
    count: int = 0
    missed: int = 0
    map_id: int = 0
    process_id: int = 0
    protocol_family: str = ""
    netfilter_hook: str = ""
    priority: int = 0
    target_type_id: int = 0

    @property
    def detached(self) -> bool:
        """Whether it holds its program on nothing any more: it was detached, or what it was on has gone."""
        match self.type:
            case "xdp" | "tcx" | "netkit":
                return not self.interface_index
            case "cgroup":
                return not self.cgroup_id
            case "netns":
                return not self.netns_inode
            case "sockmap":
                return not self.map_id
        return False

    @property
    def target(self) -> str:
        """Where the program is attached, in words; interfaces are named as this network namespace does."""
        hook = attach_type_name(self.attach_type)
        if self.detached:
            return "detached"
        match self.type:
            case "xdp":
                return _syscall.interface_name(self.interface_index)
            case "tcx" | "netkit":
                return f"{_syscall.interface_name(self.interface_index)} {hook.rpartition('_')[2]}"
            case "cgroup":
                return f"cgroup {self.cgroup_id} {hook.removeprefix('cgroup_')}"
            case "netns":
                return f"network namespace {self.netns_inode} {hook}"
            case "netfilter":
                return f"{self.protocol_family} {self.netfilter_hook} priority {self.priority}"
            case "sockmap":
                return f"map {self.map_id} {hook}"
            case "kprobe_multi":
                return f"{self.count} functions"
            case "uprobe_multi":
                return f"{self.name} {self.count} places"
            case "tracing":
                return hook.removeprefix("trace_")
        place = f"{self.name}+{self.offset:#x}" if self.offset else self.name
        return f"{self.event} {place}".strip()


def attach_type_name(attach_type: int | None) -> str:
    """The kernel's name of an attach type, in lower case and without its prefix; empty for None."""
    if attach_type is None:
        return ""
    try:
        return AttachType(attach_type).name.lower()
    except ValueError:
        return f"attach type {attach_type}"


def describe(fd: int) -> LinkInfo:
    """What the kernel says of a link's descriptor."""
    info = _Info()
    _syscall.info(fd, info, "a link")
    kind = _syscall.name_of(_syscall.LINK_TYPES, info.type)
    name = ""
    if kind in _STRINGS and (kind != "perf_event" or _word(info, 0)):
        info, name = _with_string(fd, kind, info)
    return LinkInfo(info.id, kind, info.prog_id, **_details(kind, info, name))


def _with_string(fd: int, kind: str, first: _Info) -> tuple[_Info, str]:
    """Ask again, with room for the link's string."""
    where, length = _STRINGS[kind]
    if kind == "perf_event" and _EVENTS[min(_word(first, 0), 6)] == "event":
        return first, ""
    buffer = ctypes.create_string_buffer(_STRING_BYTES)
    again = _Info()
    struct.pack_into("=Q", again, _DETAIL + where, ctypes.addressof(buffer))
    struct.pack_into("=I", again, _DETAIL + length, len(buffer))
    _syscall.info(fd, again, "a link")
    return again, buffer.value.decode(errors="replace")


def _details(kind: str, info: _Info, name: str) -> dict[str, Any]:
    match kind:
        case "xdp":
            return {"interface_index": _word(info, 0)}
        case "tcx" | "netkit":
            return {"interface_index": _word(info, 0), "attach_type": _word(info, 4)}
        case "netns":
            return {"netns_inode": _word(info, 0), "attach_type": _word(info, 4)}
        case "sockmap":
            return {"map_id": _word(info, 0), "attach_type": _word(info, 4)}
        case "cgroup":
            return {"cgroup_id": _long(info, 0), "attach_type": _word(info, 8)}
        case "tracing":
            return {"attach_type": _word(info, 0), "target_type_id": _word(info, 8)}
        case "raw_tracepoint":
            return {"name": name}
        case "iter":
            return {"name": name, **_iterator(info, name)}
        case "netfilter":
            hook = _word(info, 4)
            return {
                "protocol_family": _FAMILIES.get(_word(info, 0), str(_word(info, 0))),
                "netfilter_hook": _syscall.name_of(_NETFILTER_HOOKS, hook),
                "priority": struct.unpack_from("=i", info, _DETAIL + 8)[0],
            }
        case "kprobe_multi":
            return {"count": _word(info, 8), "missed": _long(info, 16)}
        case "uprobe_multi":
            return {"name": name, "count": _word(info, 36), "process_id": _word(info, 44)}
        case "perf_event":
            return {"name": name, **_perf_event(info)}
    return {}


def _iterator(info: _Info, target: str) -> dict[str, Any]:
    if target in ("bpf_map_elem", "bpf_sk_storage_map"):
        return {"map_id": _word(info, 12)}
    if target == "cgroup":
        return {"cgroup_id": _long(info, 16)}
    if target.startswith("task"):
        return {"process_id": _word(info, 16) or _word(info, 20)}
    return {}


def _perf_event(info: _Info) -> dict[str, Any]:
    event = _syscall.name_of(_EVENTS, _word(info, 0))
    found: dict[str, Any] = {"event": event}
    if event.endswith("probe"):
        found["offset"] = _word(info, 20)
    if event.startswith("k"):
        found["missed"] = _long(info, 32)
    return found


def _word(info: _Info, offset: int) -> int:
    return int(struct.unpack_from("=I", info, _DETAIL + offset)[0])


def _long(info: _Info, offset: int) -> int:
    return int(struct.unpack_from("=Q", info, _DETAIL + offset)[0])
