"""Onto an interface's XDP hook."""

from __future__ import annotations

import errno as errnos
from typing import Literal

from hookline.bpf import _syscall
from hookline.bpf._arguments import one_of
from hookline.bpf._errors import BpfError, failure
from hookline.bpf._links._link import XDP_MODES, Link, XdpMode, create, expect_type
from hookline.bpf._programs._handle import ProgramHandle
from hookline.bpf._syscall import AttachType, Flag

__all__ = ["attach_xdp", "refuse_occupied", "xdp_program"]

_MODES = {
    "auto": Flag.XDP_NATIVE,
    "native": Flag.XDP_NATIVE,
    "generic": Flag.XDP_GENERIC,
    "offload": Flag.XDP_OFFLOAD,
}


def attach_xdp(program: ProgramHandle, interface: str | int, mode: Literal["auto"] | XdpMode) -> Link:
    """Make an XDP link; see `Program.attach_xdp`."""
    flags = one_of(_MODES, mode, "mode of XDP")
    index = _syscall.interface_index(interface)
    expect_type(program, _syscall.interface_name(index), "xdp")
    result = create(program, index, AttachType.XDP, flags)
    # What drivers answer that cannot: no support, too few queues, an MTU too large, no memory for rings.
    if (
        mode == "auto"
        and result < 0
        and -result not in (errnos.EBUSY, errnos.EEXIST, errnos.EPERM, errnos.ENODEV)
    ):
        result = create(program, index, AttachType.XDP, Flag.XDP_GENERIC)
    if result >= 0:
        return Link(result)
    name = _syscall.interface_name(index)
    what = f"cannot attach program {program.name!r} to {name}"
    if -result in (errnos.EBUSY, errnos.EEXIST):
        raise _occupied(-result, what, index, name)
    if program.expected_attach_type in (AttachType.XDP_DEVMAP, AttachType.XDP_CPUMAP):
        raise BpfError(
            what, errno=-result, why="it was loaded for the entries of a map", remedy="put it into the map"
        )
    if mode == "offload" and result in (-errnos.EINVAL, -errnos.EOPNOTSUPP):
        raise BpfError(
            f"{what} in mode offload",
            errno=-result,
            why=f"the network card of {name} has to run the program itself, and its driver does not offer that",
            remedy="use mode auto, native or generic",
        )
    remedy = "use mode auto or generic: its driver may not have this one" if mode == "native" else ""
    raise failure(-result, what, capability="CAP_NET_ADMIN CAP_BPF", remedy=remedy)


def xdp_program(index: int) -> tuple[int, int] | None:
    """The id and mode (1 native, 2 generic, 3 offload) of an interface's XDP program, by netlink."""
    from pyroute2 import IPRoute

    with IPRoute() as netlink:
        for message in netlink.get_links(index):
            xdp = message.get_attr("IFLA_XDP")
            number = xdp.get_attr("IFLA_XDP_PROG_ID") if xdp else None
            if number:
                return int(number), int(_number(xdp.get_attr("IFLA_XDP_ATTACHED")))
    return None


def refuse_occupied(program: str, interface: str | int) -> None:
    """Checks that an interface has no XDP program, as attaching one would find out.

    Raises:
        BpfError: It has one, which is named.
    """
    index = _syscall.interface_index(interface)
    if xdp_program(index) is not None:
        name = _syscall.interface_name(index)
        raise _occupied(errnos.EBUSY, f"cannot attach program {program!r} to {name}", index, name)


def _number(value: object) -> int:
    """pyroute2 names attachment modes; back to the kernel's numbers."""
    names = {"xdp": 1, "xdpgeneric": 2, "xdpoffload": 3}
    return names[value] if isinstance(value, str) else int(str(value))


def _occupied(errno: int, what: str, index: int, name: str) -> BpfError:
    """The error for an interface that has an XDP program, which it names."""
    from hookline.bpf._introspection._system import links, program_name

    attached = xdp_program(index)
    if attached is None:
        return BpfError(
            what,
            errno=errno,
            why=f"{name} has an XDP program already; nothing was changed",
            remedy=f"ip link show dev {name} names it",
        )
    number, mode = attached
    remedy = f"ip link set dev {name} {({2: 'xdpgeneric', 3: 'xdpoffload'}).get(mode, 'xdp')} off"
    for link in links():
        if link.type == "xdp" and link.program_id == number:
            remedy = f"stop its owner, or remove its pin: it is held by link {link.id}"
    return BpfError(
        what,
        errno=errno,
        why=f"{name} has an XDP program already: id {number} {program_name(number)!r}, "
        f"{XDP_MODES.get(mode, 'mode unknown')}; nothing was changed",
        remedy=remedy,
    )
