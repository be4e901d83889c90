"""Onto an interface's traffic control hooks: tcx and netkit links, and clsact where there is no tcx."""

from __future__ import annotations

import errno as errnos
import os
from pathlib import Path
from typing import TYPE_CHECKING, Literal

from hookline.bpf import _syscall, features
from hookline.bpf._arguments import number, one_of
from hookline.bpf._errors import BpfError, FeatureMissing, LinkChanged, failure
from hookline.bpf._links._link import Link, create, expect_type
from hookline.bpf._programs._handle import ProgramHandle
from hookline.bpf._syscall import AttachType, Flag

if TYPE_CHECKING:
    from hookline.bpf._links._clsact import ClsactFilter

__all__ = ["Place", "attach_netkit", "attach_tc", "link_at_interface"]

Place = Link | ProgramHandle | Literal["all"] | None
"""A neighbour in the order of a hook: a link, a program, or all of them."""

_DIRECTIONS = {"ingress": AttachType.TCX_INGRESS, "egress": AttachType.TCX_EGRESS}
_ENDS = {"primary": AttachType.NETKIT_PRIMARY, "peer": AttachType.NETKIT_PEER}
_HOOKS = {"auto": 0, "tcx": 1, "clsact": 2}


def attach_tc(
    program: ProgramHandle,
    interface: str | int,
    direction: Literal["ingress", "egress"],
    *,
    hook: Literal["auto", "tcx", "clsact"],
    before: Place,
    after: Place,
    expected_revision: int,
    priority: int,
    pin: str | os.PathLike[str] | None,
) -> Link | ClsactFilter:
    """Attach by tcx, or by clsact; see `Program.attach_tc`."""
    attach_type = one_of(_DIRECTIONS, direction, "direction")
    one_of(_HOOKS, hook, "hook of traffic control")
    number(priority, "priority of a clsact filter", 1, 0xFFFF)
    index = _syscall.interface_index(interface)
    expect_type(program, f"{_syscall.interface_name(index)}'s {direction}", "sched_cls")
    ordered = before is not None or after is not None or bool(expected_revision)
    if hook == "clsact":
        if ordered:
            raise BpfError("clsact has no order relative to a program", remedy="use priority, or hook tcx")
        return _attach_clsact(program, index, direction, priority, pin)
    made = link_at_interface(
        program, index, attach_type, before=before, after=after, expected_revision=expected_revision
    )
    if isinstance(made, Link):
        return _pinned(made, pin)
    if made == -errnos.EINVAL:
        answer = features.tcx().answer
        if hook == "tcx" or ordered:
            if answer is features.Answer.NO:
                raise FeatureMissing("tcx", minimum_kernel="6.6", remedy="use hook clsact")
        elif answer is not features.Answer.YES:
            return _attach_clsact(program, index, direction, priority, pin)
    what = f"cannot attach program {program.name!r} to {_syscall.interface_name(index)}'s {direction}"
    raise _refusal(-made, what, expected_revision, before if before is not None else after)


def attach_netkit(
    program: ProgramHandle,
    interface: str | int,
    end: Literal["primary", "peer"],
    *,
    before: Place,
    after: Place,
    expected_revision: int,
) -> Link:
    """Attach to one end of a netkit pair; see `Program.attach_netkit`."""
    attach_type = one_of(_ENDS, end, "end of a netkit pair")
    index = _syscall.interface_index(interface)
    name = _syscall.interface_name(index)
    expect_type(program, f"netkit {name}", "sched_cls")
    made = link_at_interface(
        program, index, attach_type, before=before, after=after, expected_revision=expected_revision
    )
    if isinstance(made, Link):
        return made
    what = f"cannot attach program {program.name!r} to the {end} end of netkit {name}"
    found = features.attach("netkit")
    if found.answer is features.Answer.NO:
        raise found.error()
    if made in (-errnos.ENXIO, -errnos.EINVAL):
        raise BpfError(
            what,
            errno=-made,
            why=f"{name} is no netkit device",
            remedy="for other interfaces use attach_tc",
        )
    if made == -errnos.EACCES:
        raise BpfError(
            what,
            errno=-made,
            why=f"{name} is the pair's peer, and both ends are managed at the primary",
            remedy='name the primary device; end="peer" says which direction',
        )
    raise _refusal(-made, what, expected_revision, before if before is not None else after)


def link_at_interface(
    program: ProgramHandle,
    index: int,
    attach_type: AttachType,
    *,
    before: Place,
    after: Place,
    expected_revision: int,
) -> Link | int:
    """Make a link with an order (tcx, netkit), or return the negative errno."""
    number(expected_revision, "revision", 0, (1 << 64) - 1)
    _check_places(before, after)
    flags, relative = 0, 0
    for place, flag in ((before, Flag.BEFORE), (after, Flag.AFTER)):
        if place is None:
            continue
        flags |= flag
        if place != "all":
            relative = place.fd
            flags |= Flag.LINK if isinstance(place, Link) else 0
    result = create(program, index, attach_type, flags, "I4xQ", relative, expected_revision)
    return Link(result) if result >= 0 else result


def _check_places(before: Place, after: Place) -> None:
    if before is not None and after is not None:
        raise BpfError(
            "a program cannot be placed before one and after another",
            errno=errnos.EINVAL,
            why="the kernel takes one neighbour",
            remedy="give before or after; expected_revision tells whether the order changed meanwhile",
        )
    for place in (before, after):
        if not (place is None or place == "all" or isinstance(place, Link | ProgramHandle)):
            raise BpfError(f"{place!r} is no place in an order", remedy='give a link, a program or "all"')


def _attach_clsact(
    program: ProgramHandle,
    index: int,
    direction: Literal["ingress", "egress"],
    priority: int,
    place: str | os.PathLike[str] | None,
) -> ClsactFilter:
    from hookline.bpf._links._clsact import ClsactFilter

    return ClsactFilter.attach(program, index, direction, priority, Path(place).absolute() if place else None)


def _pinned(link: Link, place: str | os.PathLike[str] | None) -> Link:
    if place is not None:
        try:
            link.pin(place)
        except BaseException:
            link.close()
            raise
    return link


def _refusal(errno: int, what: str, expected_revision: int, neighbour: Place) -> BpfError:
    if errno == errnos.ESTALE:
        return LinkChanged(
            what,
            errno=errno,
            why=f"the hook is not at revision {expected_revision} any more; nothing was changed",
            remedy="read the hook again and decide anew",
        )
    if errno == errnos.EEXIST:
        return BpfError(
            what,
            errno=errno,
            why="the program is on this hook already; nothing was changed",
            remedy="detach it first, or leave it as it is",
        )
    if neighbour is not None and neighbour != "all" and errno in (errnos.ENOENT, errnos.EINVAL):
        return BpfError(
            what,
            errno=errno,
            why=f"{neighbour!r}, which it is to run before or after, is not on this hook; nothing was changed",
            remedy="name a program or link that is on it",
        )
    return failure(errno, what, capability="CAP_NET_ADMIN CAP_BPF")
