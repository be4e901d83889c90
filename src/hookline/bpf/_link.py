"""Links: what holds a program on its hook.

A link lives while anything refers to it: a descriptor (a `Link` object) or a pin. From that follow the rules:

- ``with program.attach_xdp("eth0"):`` detaches when the block ends, unless the link was pinned inside it.
- `Link.pin` makes the link outlive the process; `Link.from_pin` adopts it, in whichever process.
- `Link.close` gives this process's descriptor back. An unpinned link detaches with its last descriptor.
- `Link.detach` takes the program off the hook at once, whoever else holds the link, and removes the pin.
- A `Link` that is collected while it alone keeps a program attached warns with `ResourceWarning`.
- `Link.update` replaces the program with no packet in between unhandled.
"""

from __future__ import annotations

import ctypes
import errno as errnos
import os
import warnings
from dataclasses import dataclass
from pathlib import Path
from types import TracebackType
from typing import TYPE_CHECKING, Literal, Self

from hookline.bpf import _syscall, pin
from hookline.bpf._errors import BpfError, LinkChanged, failure
from hookline.bpf._syscall import AttachType, Command, Flag

if TYPE_CHECKING:
    from hookline.bpf._program import Program

__all__ = ["Link", "LinkInfo", "XdpMode"]

XdpMode = Literal["native", "generic", "offload"]
_XDP_MODES: dict[int, XdpMode] = {1: "native", 2: "generic", 3: "offload"}


class _Info(ctypes.Structure):
    """``struct bpf_link_info``; its union is read by type."""

    _fields_ = [
        ("type", ctypes.c_uint32),
        ("id", ctypes.c_uint32),
        ("prog_id", ctypes.c_uint32),
        ("pad", ctypes.c_uint32),
        ("detail", ctypes.c_uint32 * 16),
    ]


@dataclass(frozen=True)
class LinkInfo:
    """What the kernel says of a link.

    Attributes:
        id: The kernel's number for it.
        type: The kernel's name: ``"xdp"``, ``"tcx"``, ``"raw_tracepoint"``, …
        program_id: The program on the hook.
        interface_index: Of XDP, tcx and netkit links, else 0; 0 too once the interface is gone or the link
            detached.
        attach_type: ``BPF_*`` number of tcx, netkit, cgroup and netns links, else None.
    """

    id: int
    type: str
    program_id: int
    interface_index: int
    attach_type: int | None


class Link:
    """A program on a hook, held by a descriptor of this process.

    Attributes:
        pinned: Where it is pinned, as far as this object knows.
    """

    def __init__(self, fd: int, *, pinned: Path | None = None) -> None:
        self._fd: int | None = fd
        self._attached = True
        self.pinned = pinned

    @classmethod
    def from_pin(cls, path: str | os.PathLike[str]) -> Self:
        """Adopt a pinned link.

        Raises:
            BpfError: Nothing is pinned there, or it is no link.
        """
        return cls(pin.get(path, "link"), pinned=Path(path).absolute())

    @property
    def fd(self) -> int:
        """The descriptor; raises `BpfError` once the link is closed."""
        if self._fd is None:
            raise BpfError("the link is closed", errno=errnos.EBADF)
        return self._fd

    @property
    def info(self) -> LinkInfo:
        """What the kernel says of it now."""
        return describe(self.fd)

    @property
    def id(self) -> int:
        """The kernel's number for it."""
        return self.info.id

    @property
    def hook(self) -> str:
        """The kind of hook: ``"xdp"``, ``"tcx"``, ``"raw_tracepoint"``, …"""
        return self.info.type

    @property
    def mode(self) -> XdpMode | None:
        """How an XDP program is attached now, None for other links and detached ones.

        The interface is looked up in this thread's network namespace.
        """
        found = self.info
        if found.type != "xdp" or not found.interface_index:
            return None
        attached = xdp_program(found.interface_index)
        return _XDP_MODES.get(attached[1]) if attached and attached[0] == found.program_id else None

    def update(self, new: Program, *, expected: Program | None = None) -> None:
        """Replace the program; every packet meets either the old one or the new one.

        Args:
            new: The program to put in, of the same type.
            expected: The program that must be in now; another one is left alone.

        Raises:
            LinkChanged: Another program than the expected one is in.
            BpfError: The kernel refuses, for example for tracepoints (EINVAL).
        """
        flags, old = (Flag.REPLACE, expected.fd) if expected is not None else (0, 0)
        attr = _syscall.attributes("IIII", self.fd, new.fd, flags, old)
        result = _syscall.call(Command.LINK_UPDATE, attr)
        if result >= 0:
            return
        if expected is not None and result == -errnos.EPERM and self.info.program_id != expected.id:
            raise LinkChanged(
                f"the link does not hold program {expected.name!r} (id {expected.id})",
                errno=errnos.EPERM,
                why=f"it holds program id {self.info.program_id}; nothing was changed",
                remedy="read the link again and decide anew",
            )
        raise failure(
            -result, f"cannot put program {new.name!r} into the link", capability="CAP_BPF CAP_NET_ADMIN"
        )

    def pin(self, path: str | os.PathLike[str]) -> None:
        """Keep the program attached without this process.

        Raises:
            BpfError: The path is taken, or not in bpffs.
        """
        self.pinned = pin.put(self.fd, path, "the link")

    def unpin(self) -> None:
        """Remove the pin; the program stays attached while this object is open."""
        if self.pinned is not None:
            pin.remove(self.pinned)
            self.pinned = None

    def detach(self) -> None:
        """Take the program off the hook at once and remove the known pin; the object can still be closed.

        Hooks without forced detachment (tracepoints) are let go by closing: others who hold the link keep it.
        """
        if self._fd is None and not self._attached:
            return
        result = _syscall.call(Command.LINK_DETACH, _syscall.attributes("I", self.fd))
        unsupported = result in (-errnos.EOPNOTSUPP, -errnos.EINVAL)
        # ENOLINK: its interface is gone, or it was detached before.
        if result < 0 and not unsupported and result != -errnos.ENOLINK:
            raise failure(-result, "cannot detach the link", capability="CAP_NET_ADMIN")
        self.unpin()
        self._attached = False
        if unsupported:
            self.close()

    def close(self) -> None:
        """Give the descriptor back; an unpinned link goes with its last one. Closing twice is harmless."""
        if self._fd is not None:
            fd, self._fd = self._fd, None
            self._attached = False
            os.close(fd)

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        if self._fd is not None and self.pinned is None:
            self.detach()
        self.close()

    def __del__(self) -> None:
        fd = getattr(self, "_fd", None)
        if fd is None:
            return
        if self._attached and self.pinned is None:
            warnings.warn(
                f"{self!r} was neither closed nor pinned", ResourceWarning, source=self, stacklevel=2
            )
        self._fd = None
        _syscall.closed_quietly(fd)

    def __repr__(self) -> str:
        if self._fd is None:
            return "<Link, closed>"
        place = f", pinned at {self.pinned}" if self.pinned else ""
        try:
            found = self.info
        except BpfError:
            return f"<Link{place}>"
        return f"<Link {found.id}: {found.type}, program {found.program_id}{place}>"


def describe(fd: int) -> LinkInfo:
    """What the kernel says of a link's descriptor."""
    info = _Info()
    _syscall.info(fd, info, "a link")
    kind = _syscall.name_of(_syscall.LINK_TYPES, info.type)
    interface, attach_type = 0, None
    match kind:
        case "xdp":
            interface = info.detail[0]
        case "tcx" | "netkit":
            interface, attach_type = info.detail[0], info.detail[1]
        case "netns":
            attach_type = info.detail[1]
        case "cgroup":
            attach_type = info.detail[2]
        case "tracing":
            attach_type = info.detail[0]
    return LinkInfo(info.id, kind, info.prog_id, interface, attach_type)


def attach_xdp(program: Program, interface: str | int, mode: Literal["auto"] | XdpMode) -> Link:
    """Make an XDP link; see `Program.attach_xdp`."""
    index = _syscall.interface_index(interface)
    flags = {
        "auto": Flag.XDP_NATIVE,
        "native": Flag.XDP_NATIVE,
        "generic": Flag.XDP_GENERIC,
        "offload": Flag.XDP_OFFLOAD,
    }[mode]
    result = _create(program, index, AttachType.XDP, flags)
    # What drivers answer that cannot: no support, too few queues, an MTU too large, no memory for rings.
    if (
        mode == "auto"
        and result < 0
        and -result not in (errnos.EBUSY, errnos.EEXIST, errnos.EPERM, errnos.ENODEV)
    ):
        result = _create(program, index, AttachType.XDP, Flag.XDP_GENERIC)
    if result >= 0:
        return Link(result)
    name = _syscall.interface_name(index)
    what = f"cannot attach program {program.name!r} to {name}"
    if -result in (errnos.EBUSY, errnos.EEXIST):
        raise _occupied(-result, what, index, name)
    remedy = ""
    if mode in ("native", "offload") and result != -errnos.EPERM:
        remedy = "its driver may not support this mode: use mode auto or generic"
    raise failure(-result, what, capability="CAP_NET_ADMIN CAP_BPF", remedy=remedy)


def attach_tcx(
    program: Program,
    index: int,
    attach_type: AttachType,
    *,
    before: Link | Program | Literal["all"] | None,
    after: Link | Program | Literal["all"] | None,
    expected_revision: int,
) -> Link | int:
    """Make a tcx link, or return the negative errno; see `Program.attach_tc`."""
    flags, relative = 0, 0
    for place, flag in ((before, Flag.BEFORE), (after, Flag.AFTER)):
        if place is None:
            continue
        flags |= flag
        if place != "all":
            relative = place.fd
            flags |= Flag.LINK if isinstance(place, Link) else 0
    result = _create(program, index, attach_type, flags, "I4xQ", relative, expected_revision)
    return Link(result) if result >= 0 else result


def attach_raw_tracepoint(program: Program, name: str) -> Link:
    """Make a raw tracepoint link; see `Program.attach_raw_tracepoint`."""
    text = ctypes.create_string_buffer(name.encode())
    attr = _syscall.attributes("QI4x", _syscall.address(text), program.fd)
    result = _syscall.call(Command.RAW_TRACEPOINT_OPEN, attr)
    if result >= 0:
        return Link(result)
    what = f"cannot attach program {program.name!r} to the raw tracepoint {name!r}"
    if result == -errnos.ENOENT:
        raise BpfError(
            what,
            errno=errnos.ENOENT,
            why="there is none of that name",
            remedy="see /sys/kernel/tracing/events",
        )
    raise failure(-result, what, capability="CAP_BPF CAP_PERFMON")


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


def _create(program: Program, target: int, attach_type: int, flags: int, more: str = "", *values: int) -> int:
    attr = _syscall.attributes("IIII" + more, program.fd, target, attach_type, flags, *values)
    return _syscall.call(Command.LINK_CREATE, attr)


def _occupied(errno: int, what: str, index: int, name: str) -> BpfError:
    """The error for an interface that has an XDP program, which it names."""
    from hookline.bpf._system import links, program_name

    attached = xdp_program(index)
    if attached is None:
        return BpfError(what, errno=errno, why=f"{name} has an XDP program already; nothing was changed")
    number, mode = attached
    remedy = f"ip link set dev {name} {({2: 'xdpgeneric', 3: 'xdpoffload'}).get(mode, 'xdp')} off"
    for link in links():
        if link.type == "xdp" and link.program_id == number:
            remedy = f"stop its owner, or remove its pin: it is held by link {link.id}"
    return BpfError(
        what,
        errno=errno,
        why=f"{name} has an XDP program already: id {number} {program_name(number)!r}, "
        f"{_XDP_MODES.get(mode, 'mode unknown')}; nothing was changed",
        remedy=remedy,
    )
