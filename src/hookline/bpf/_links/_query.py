"""What is attached to a hook, in the order in which it runs (BPF_PROG_QUERY)."""

from __future__ import annotations

import ctypes
import errno as errnos
import os
import struct
from dataclasses import dataclass

from hookline.bpf import _syscall
from hookline.bpf._arguments import one_of
from hookline.bpf._errors import BpfError, FeatureMissing, failure
from hookline.bpf._links import _attach_cgroup
from hookline.bpf._syscall import AttachType, Command

__all__ = ["Hook", "HookEntry", "query"]

_ROOM = 256
_EFFECTIVE = 1
_INTERFACE_HOOKS = {
    ("tcx", "ingress"): AttachType.TCX_INGRESS,
    ("tcx", "egress"): AttachType.TCX_EGRESS,
    ("netkit", "primary"): AttachType.NETKIT_PRIMARY,
    ("netkit", "peer"): AttachType.NETKIT_PEER,
}
_FORMS = "tcx:IFACE:ingress|egress, netkit:IFACE:primary|peer, cgroup:PATH:HOOK, netns[:PATH]:sk_lookup|flow_dissector"


@dataclass(frozen=True)
class HookEntry:
    """A program on a hook.

    Attributes:
        program_id: The kernel's number for it.
        link_id: Its link's, 0 where it was attached without one or the kernel does not tell.
        flags: How it was attached, in the hook's own flags.
    """

    program_id: int
    link_id: int
    flags: int


@dataclass(frozen=True)
class Hook:
    """What a hook holds.

    Attributes:
        programs: In the order in which they run.
        revision: Counts the changes of tcx and netkit hooks, for ``expected_revision``; 0 for others.
    """

    programs: tuple[HookEntry, ...]
    revision: int


def query(hook: str, *, effective: bool = False) -> Hook:
    """What is attached to a hook, ours or not.

    Args:
        hook: ``tcx:IFACE:ingress``, ``netkit:IFACE:primary``, ``cgroup:PATH:connect4``, ``netns[:PATH]:sk_lookup``.
        effective: Of cgroups: what runs for its processes, with what is attached above it.

    Raises:
        BpfError: There is no such hook or target.
        FeatureMissing: The kernel has no such hook.
    """
    kind, _, where = hook.partition(":")
    place, _, name = where.rpartition(":")
    if kind in ("tcx", "netkit"):
        names = {end: number for (of, end), number in _INTERFACE_HOOKS.items() if of == kind}
        attach_type = one_of(names, name, f"hook of {kind}")
        return _ask(_syscall.interface_index(place), attach_type, hook)
    if kind == "cgroup":
        attach_type = one_of(_attach_cgroup.CGROUP_HOOKS, name, "hook of a cgroup")
        target = _attach_cgroup.open_cgroup(place)
        try:
            return _ask(target, attach_type, hook, _EFFECTIVE if effective else 0)
        finally:
            os.close(target)
    if kind == "netns":
        attach_type = one_of(_attach_cgroup.NETNS_HOOKS, name, "hook of a network namespace")
        target = _attach_cgroup.open_netns(place or None)
        try:
            return _ask(target, attach_type, hook)
        finally:
            os.close(target)
    raise BpfError(
        f"{hook!r} is no hook that can be asked",
        remedy=f"write {_FORMS}",
        why="only hooks that hold several programs can be asked",
    )


def _ask(target: int, attach_type: AttachType, hook: str, flags: int = 0) -> Hook:
    ordered = attach_type in _INTERFACE_HOOKS.values()
    room = _ROOM
    while True:
        programs, links, each = ((ctypes.c_uint32 * room)() for _ in range(3))
        attr = _syscall.attributes(
            "IIIIQI4xQQQQ",
            target,
            attach_type,
            flags,
            0,
            ctypes.addressof(programs),
            room,
            # Asked for what is effective, or of a namespace, the kernel refuses to tell flags.
            ctypes.addressof(each)
            if not flags and attach_type not in _attach_cgroup.NETNS_HOOKS.values()
            else 0,
            ctypes.addressof(links) if ordered else 0,
            0,
            0,
        )
        result = _syscall.call(Command.PROG_QUERY, attr)
        count = struct.unpack_from("=I", attr, 24)[0]
        if result == -errnos.ENOSPC and count > room:
            room = count
            continue
        break
    if result == -errnos.EBADF:
        raise BpfError(
            f"cannot ask what is attached to {hook}",
            errno=errnos.EBADF,
            why="it is no folder of cgroup v2",
            remedy=f"cgroup v2 is at {_attach_cgroup.cgroup_folder()}; a path without a slash in front begins there",
        )
    if result == -errnos.EINVAL:
        raise FeatureMissing(f"hook {attach_type.name.lower()}", errno=errnos.EINVAL)
    if result < 0:
        raise failure(-result, f"cannot ask what is attached to {hook}", capability="CAP_NET_ADMIN CAP_BPF")
    revision = struct.unpack_from("=Q", attr, 56)[0] if ordered else 0
    return Hook(tuple(HookEntry(programs[i], links[i], each[i]) for i in range(count)), revision)
