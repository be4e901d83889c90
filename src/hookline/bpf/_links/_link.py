"""Links: what holds a program on its hook.

A link lives while anything refers to it: a descriptor (a `Link` object) or a pin. From that follow the rules:

- ``with program.attach_xdp("eth0"):`` detaches when the block ends, unless the link was pinned inside it.
- `Link.pin` makes the link outlive the process; `Link.from_pin` adopts it, in whichever process.
- `Link.close` gives this process's descriptor back. An unpinned link detaches with its last descriptor.
- `Link.detach` takes the program off the hook at once, whoever else holds the link, and removes the pin.
- In a forked child the block's end gives the child's descriptor back only: the hook is its parent's.
- A `Link` that is collected while it alone keeps a program attached warns with `ResourceWarning`.
- `Link.update` replaces the program with no packet in between unhandled.
"""

from __future__ import annotations

import errno as errnos
import os
import warnings
from collections.abc import Mapping
from pathlib import Path
from types import TracebackType
from typing import TYPE_CHECKING, Literal, Self

from hookline.bpf import _syscall, pin
from hookline.bpf._errors import ENOTSUPP, BpfError, LinkChanged, failure
from hookline.bpf._links._link_info import LinkInfo, describe
from hookline.bpf._owner import Owner
from hookline.bpf._syscall import Command, Flag

if TYPE_CHECKING:
    from hookline.bpf._links._clsact import ClsactFilter
    from hookline.bpf._links._group import LinkGroup
    from hookline.bpf._programs._handle import ProgramHandle

__all__ = ["Link", "XdpMode", "create", "expect_type", "made", "refuse_second_pin"]

XdpMode = Literal["native", "generic", "offload"]
XDP_MODES: dict[int, XdpMode] = {1: "native", 2: "generic", 3: "offload"}
_TYPES = {"xdp": "xdp", "tcx": "sched_cls", "netkit": "sched_cls"}
_UPDATABLE = {"xdp", "tcx", "netkit", "cgroup", "netns", "iter", "sockmap", "struct_ops"}


class Link(Owner):
    """A program on a hook, held by a descriptor of this process.

    Attributes:
        pinned: Where it is pinned, as far as this object knows.
    """

    def __init__(self, fd: int, *, pinned: Path | None = None, ours: bool = True) -> None:
        self._fd: int | None = fd
        self._attached = ours
        self.pinned = pinned

    @classmethod
    def from_pin(cls, path: str | os.PathLike[str]) -> Self:
        """Adopt a pinned link.

        Raises:
            BpfError: Nothing is pinned there, or it is no link.
        """
        return cls(pin.get(path, "link"), pinned=Path(path).absolute())

    @classmethod
    def from_id(cls, link_id: int) -> Self:
        """Open a link by the kernel's number for it, whoever made it (needs CAP_SYS_ADMIN).

        It stays its owner's: ``with`` and `close` give the descriptor back, and only `detach` detaches.

        Raises:
            BpfError: There is no such link.
        """
        return cls(_syscall.fd_by_id(Command.LINK_GET_FD_BY_ID, link_id, "a link"), ours=False)

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
        from hookline.bpf._links._attach_xdp import xdp_program

        attached = xdp_program(found.interface_index)
        return XDP_MODES.get(attached[1]) if attached and attached[0] == found.program_id else None

    def update(self, new: ProgramHandle, *, expected: ProgramHandle | None = None) -> None:
        """Replace the program; every packet meets either the old one or the new one.

        Args:
            new: The program to put in, of the same type.
            expected: The program that must be in now; another one is left alone.

        Raises:
            LinkChanged: Another program than the expected one is in.
            BpfError: The kernel refuses, as it does for tracepoints, probes, fentry, LSM and netfilter links.
        """
        kind = self.info.type
        self._refuse_type(new, kind)
        flags, old = (Flag.REPLACE, expected.fd) if expected is not None else (0, 0)
        attr = _syscall.attributes("IIII", self.fd, new.fd, flags, old)
        result = _syscall.call(Command.LINK_UPDATE, attr)
        if result >= 0:
            return
        if kind not in _UPDATABLE and -result in (errnos.EINVAL, errnos.EOPNOTSUPP, ENOTSUPP):
            raise BpfError(
                f"cannot put program {new.name!r} into the link",
                errno=-result,
                why=f"the kernel has no update for links of type {kind}; nothing was changed",
                remedy="attach the new program beside the old one, then detach the old one",
            )
        if expected is not None and result == -errnos.EPERM and self.info.program_id != expected.id:
            raise LinkChanged(
                f"the link does not hold program {expected.name!r} (id {expected.id})",
                errno=errnos.EPERM,
                why=f"it holds program id {self.info.program_id}; nothing was changed",
                remedy="read the link again and decide anew",
            )
        raise failure(
            -result,
            f"cannot put program {new.name!r} into the link",
            capability="CAP_BPF CAP_NET_ADMIN",
            remedy=f"it must be of the type, and loaded for the hook, of the {kind} link's program {self.info.program_id}"
            if result == -errnos.EINVAL
            else "",
        )

    def _refuse_type(self, new: ProgramHandle, kind: str) -> None:
        wanted = _TYPES.get(kind, new.type)
        if new.type != wanted:
            raise BpfError(
                f"cannot put program {new.name!r} into the link",
                errno=errnos.EINVAL,
                why=f"it is of type {new.type}, and the {kind} link takes {wanted}; nothing was changed",
            )

    def pin(self, path: str | os.PathLike[str]) -> None:
        """Keep the program attached without this process.

        Raises:
            BpfError: The path is taken, or not in bpffs; or the link is pinned already: this object looks after one pin.
        """
        refuse_second_pin(self)
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
        if self._fd is None:
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
        if self._fd is not None and self._attached and self.pinned is None and not self._forked:
            self.detach()
        self.close()

    def __del__(self) -> None:
        fd = getattr(self, "_fd", None)
        if fd is None:
            return
        if self._attached and self.pinned is None and not self._forked:
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


def refuse_second_pin(*held: Link | ClsactFilter | LinkGroup) -> None:
    """Refuse to forget a pin: it would be left behind, holding a link that is off its hook."""
    for one in held:
        if one.pinned is not None:
            raise BpfError(
                f"cannot pin {one!r} again",
                errno=errnos.EEXIST,
                why="it has a pin",
                remedy="unpin() it first",
            )


def create(
    program: ProgramHandle, target: int, attach_type: int, flags: int = 0, more: str = "", *values: int
) -> int:
    """Make a link (BPF_LINK_CREATE): its descriptor, or the negative errno."""
    attr = _syscall.attributes("IIII" + more, program.fd, target, attach_type, flags, *values)
    return _syscall.call(Command.LINK_CREATE, attr)


def made(
    result: int,
    program: ProgramHandle,
    where: str,
    *,
    capability: str = "CAP_BPF CAP_PERFMON",
    remedies: Mapping[int, str] | None = None,
) -> int:
    """The descriptor that `create` made.

    Raises:
        NotPermitted: EPERM.
        BpfError: Any other refusal; `remedies` has what to do about some of them, by errno.
    """
    if result >= 0:
        return result
    raise failure(
        -result,
        f"cannot attach program {program.name!r} to {where}",
        capability=capability,
        remedy=(remedies or {}).get(-result, ""),
    )


def expect_type(program: ProgramHandle, where: str, *types: str) -> None:
    """Refuse a program of a type that the hook does not take."""
    if program.type not in types:
        raise BpfError(
            f"cannot attach program {program.name!r} to {where}",
            errno=errnos.EINVAL,
            why=f"it is of type {program.type}, and the hook takes {' or '.join(types)}",
            remedy="attach it to a hook of its type, or compile it with another SEC()",
        )
