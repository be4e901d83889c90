"""Traffic control without tcx: a filter on the clsact qdisc, for kernels before 6.6.

Unlike a link, a filter belongs to its interface: it stays when the process ends, pinned or not. So `close`
removes an unpinned one, to keep the meaning that a link has. A pin holds the program, by which the filter is
found again, and by nothing else: a filter of the same name may be anybody's. A new program is pinned beside the old one,
as ``PIN~``, before the filter changes, so the filter's program is always at one of the two, whenever a process is killed.
The qdisc is made where it is absent, and goes with its last filter if Hookline made it; the filter's name records that. A
kill between the two leaves an empty qdisc, which does nothing.
"""

from __future__ import annotations

import errno as errnos
import os
import sys
import warnings
from contextlib import ExitStack
from pathlib import Path
from types import TracebackType
from typing import TYPE_CHECKING, Any, Literal, NoReturn, Self

from hookline.bpf import _syscall, pin
from hookline.bpf._arguments import one_of
from hookline.bpf._errors import BpfError, LinkChanged, failure
from hookline.bpf._links._link import expect_type, refuse_second_pin
from hookline.bpf._owner import Owner

if TYPE_CHECKING:
    from hookline.bpf._programs._handle import ProgramHandle

__all__ = ["ClsactFilter"]

Direction = Literal["ingress", "egress"]
_PARENT: dict[Direction, int] = {"ingress": 0xFFFFFFF2, "egress": 0xFFFFFFF3}
_QDISC_PARENT, _QDISC_HANDLE = 0xFFFFFFF1, 0xFFFF0000
_ALL_PROTOCOLS = 0x0300  # htons(ETH_P_ALL)
_PREFIX, _MADE_QDISC = "hookline/", "+qdisc"
_TCA_BPF_ID = 11


class ClsactFilter(Owner):
    """A program on an interface's clsact hook, used as a `Link` is.

    Attributes:
        pinned: Where its program is pinned, as far as this object knows.
    """

    hook = "clsact"
    mode = None

    def __init__(
        self,
        index: int,
        direction: Direction,
        priority: int,
        handle: int,
        *,
        namespace: int,
        pinned: Path | None = None,
    ) -> None:
        self._index = index
        self._direction: Direction = direction
        self._priority = priority
        self._handle = handle
        self._namespace = namespace
        self._attached = True
        self.pinned = pinned

    @classmethod
    def attach(
        cls, program: ProgramHandle, index: int, direction: Direction, priority: int, place: Path | None
    ) -> Self:
        """Add a filter; see `Program.attach_tc`. The pin comes first: no filter is ever without one."""
        from pyroute2 import IPRoute
        from pyroute2.netlink.exceptions import NetlinkError

        what = f"cannot attach program {program.name!r} to {_syscall.interface_name(index)}'s {direction}"
        if place is not None:
            program.pin(place)
        with ExitStack() as undo, IPRoute() as netlink:
            if place is not None:
                undo.callback(pin.remove, place)
            made = False
            try:
                made = _make_qdisc(netlink, index)
                # Only a qdisc of ours is ever removed, and it may be older than this filter.
                ours = made or any(_is_ours(f) for d in _PARENT for f in _filters(netlink, index, d))
                taken = {f["handle"] for f in _filters(netlink, index, direction)}
                handle = next(number for number in range(1, len(taken) + 2) if number not in taken)
                _put(netlink, "add-filter", index, direction, priority, handle, program, ours)
            except NetlinkError as error:
                if made:
                    _remove_qdisc(netlink, index)
                _refuse(error, what)
            undo.pop_all()
        return cls(index, direction, priority, handle, namespace=_namespace(), pinned=place)

    @classmethod
    def from_pin(cls, path: str | os.PathLike[str], interface: str | int, direction: Direction) -> Self:
        """Find the filter whose program is pinned at a path.

        Raises:
            BpfError: Nothing is pinned there, or its program is on no such filter.
        """
        from pyroute2 import IPRoute
        from pyroute2.netlink.exceptions import NetlinkError

        from hookline.bpf._programs._program import Program

        one_of({str(name): 0 for name in _PARENT}, direction, "direction")
        index = _syscall.interface_index(interface)
        place = Path(path).absolute()
        coming = _coming(place)
        with IPRoute() as netlink:
            try:
                filters = list(_filters(netlink, index, direction))
            except NetlinkError as error:
                _refuse(error, f"cannot list the filters of {_syscall.interface_name(index)}")
        for holder in (place, coming) if coming.exists() else (place,):
            with Program.from_pin(holder) as program:
                number = program.id
            for found in filters:
                if found["id"] == number:
                    if holder == coming:
                        os.replace(coming, place)
                    return cls(
                        index,
                        direction,
                        found["priority"],
                        found["handle"],
                        namespace=_namespace(),
                        pinned=place,
                    )
        raise BpfError(
            f"no {direction} filter of {_syscall.interface_name(index)} has the program pinned at {path}",
            errno=errnos.ENOENT,
        )

    @property
    def program_id(self) -> int:
        """The program on the filter now.

        Raises:
            BpfError: The filter is gone.
        """
        return int(self._found()["id"])

    def update(self, new: ProgramHandle, *, expected: ProgramHandle | None = None) -> None:
        """Replace the program; every packet meets either the old one or the new one.

        The check of `expected` and the change are two steps, unlike a link's. A pin moves to the new program.

        Raises:
            LinkChanged: Another program than the expected one is in.
        """
        from pyroute2 import IPRoute
        from pyroute2.netlink.exceptions import NetlinkError

        expect_type(new, "the filter", "sched_cls")
        found = self._found()
        if expected is not None and found["id"] != expected.id:
            raise LinkChanged(
                f"the filter does not hold program {expected.name!r} (id {expected.id})",
                errno=errnos.EPERM,
                why=f"it holds program id {found['id']}; nothing was changed",
                remedy="read the filter again and decide anew",
            )
        coming = None
        if self.pinned is not None:
            coming = _coming(self.pinned)
            pin.remove(coming)
            new.pin(coming)
        with IPRoute() as netlink:
            try:
                _put(
                    netlink,
                    "replace-filter",
                    self._index,
                    self._direction,
                    self._priority,
                    self._handle,
                    new,
                    _is_ours(found),
                )
            except NetlinkError as error:
                if coming is not None:
                    pin.remove(coming)
                _refuse(error, f"cannot put program {new.name!r} into the filter")
        if coming is not None and self.pinned is not None:
            os.replace(coming, self.pinned)

    def pin(self, path: str | os.PathLike[str]) -> None:
        """Let the filter outlive this object, and pin its program so that `from_pin` finds it."""
        from hookline.bpf._programs._program import Program

        refuse_second_pin(self)
        with Program.from_id(self.program_id) as program:
            program.pin(path)
        self.pinned = Path(path).absolute()

    def unpin(self) -> None:
        """Remove the pin; the filter stays while this object is open."""
        if self.pinned is not None:
            pin.remove(_coming(self.pinned))
            pin.remove(self.pinned)
            self.pinned = None

    def detach(self) -> None:
        """Remove this filter, and the qdisc if Hookline made it and this was its last filter."""
        from pyroute2 import IPRoute
        from pyroute2.netlink.exceptions import NetlinkError

        if not self._attached:
            return
        self._check_namespace()
        with IPRoute() as netlink:
            try:
                ours = any(
                    _is_ours(f) for f in _filters(netlink, self._index, self._direction) if self._is_this(f)
                )
                netlink.tc(
                    "del-filter",
                    "bpf",
                    self._index,
                    self._handle,
                    parent=_PARENT[self._direction],
                    info=self._priority << 16 | _ALL_PROTOCOLS,
                )
                if ours and not any(_filters(netlink, self._index, d) for d in _PARENT):
                    _remove_qdisc(netlink, self._index)
            except NetlinkError as error:
                # The filter went, or its interface did.
                if error.code not in (errnos.ENOENT, errnos.ENODEV, errnos.EINVAL):
                    _refuse(error, "cannot remove the filter")
        self._attached = False
        self.unpin()

    def close(self) -> None:
        """Remove the filter unless it is pinned, or this is a forked child. Closing twice is no error."""
        if self._attached and self.pinned is None and not self._forked:
            self.detach()
        self._attached = False

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.close()

    def __del__(self) -> None:
        if getattr(self, "_attached", False) and self.pinned is None and not self._forked:
            warnings.warn(
                f"{self!r} was neither closed nor pinned", ResourceWarning, source=self, stacklevel=2
            )

    def __repr__(self) -> str:
        place = f", pinned at {self.pinned}" if self.pinned else ""
        return f"<ClsactFilter: {self._direction} of interface {self._index}, handle {self._handle}{place}>"

    def _is_this(self, found: dict[str, Any]) -> bool:
        return bool(found["handle"] == self._handle and found["priority"] == self._priority)

    def _found(self) -> dict[str, Any]:
        from pyroute2 import IPRoute

        self._check_namespace()
        with IPRoute() as netlink:
            for found in _filters(netlink, self._index, self._direction):
                if self._is_this(found):
                    return found
        raise BpfError(f"{self!r} is gone", errno=errnos.ENOENT)

    def _check_namespace(self) -> None:
        """A filter is known by its interface's index, which means something else in another namespace."""
        if _namespace() != self._namespace:
            raise BpfError(
                f"{self!r} is in another network namespace", remedy="enter the one that it was attached in"
            )


def _namespace() -> int:
    return os.stat("/proc/thread-self/ns/net").st_ino


def _coming(place: Path) -> Path:
    """Where the program is pinned that is about to take the place of the one in a pin."""
    return place.with_name(place.name + "~")


def _make_qdisc(netlink: Any, index: int) -> bool:
    """Add the clsact qdisc; whether it was absent.

    Raises:
        BpfError: An ingress qdisc has its place.
    """
    for message in netlink.get_qdiscs(index):
        if message["parent"] == _QDISC_PARENT:
            kind = message.get_attr("TCA_KIND")
            if kind != "clsact":
                raise BpfError(
                    f"{_syscall.interface_name(index)} has no room for clsact",
                    why=f"it has a qdisc of kind {kind}; nothing was changed",
                    remedy=f"tc qdisc del dev {_syscall.interface_name(index)} ingress",
                )
            return False
    netlink.tc("add", "clsact", index, _QDISC_HANDLE, parent=_QDISC_PARENT)
    return True


def _remove_qdisc(netlink: Any, index: int) -> None:
    netlink.tc("del", "clsact", index, _QDISC_HANDLE, parent=_QDISC_PARENT)


def _put(
    netlink: Any,
    command: str,
    index: int,
    direction: Direction,
    priority: int,
    handle: int,
    program: ProgramHandle,
    ours: bool,
) -> None:
    netlink.tc(
        command,
        "bpf",
        index,
        handle,
        parent=_PARENT[direction],
        prio=priority,
        fd=program.fd,
        name=_PREFIX + program.name + (_MADE_QDISC if ours else ""),
        direct_action=True,
    )


def _filters(netlink: Any, index: int, direction: Direction) -> list[dict[str, Any]]:
    """The eBPF filters of one direction: handle, priority, program id and name."""
    found = []
    for message in netlink.get_filters(index, parent=_PARENT[direction]):
        number = filter_program(message)
        if number is None:
            continue
        found.append(
            {
                "handle": message["handle"],
                "priority": message["info"] >> 16,
                "id": number,
                "name": message.get_attr("TCA_OPTIONS").get_attr("TCA_BPF_NAME") or "",
            }
        )
    return found


def filter_program(message: Any) -> int | None:
    """The program of a filter that netlink listed; None where it is no eBPF filter."""
    options = message.get_attr("TCA_OPTIONS")
    if message.get_attr("TCA_KIND") != "bpf" or not message["handle"] or options is None:
        return None
    return _program_id(options)


def _program_id(options: Any) -> int:
    """TCA_BPF_ID, an attribute that pyroute2 has no name for, from the message's bytes."""
    for name, value in options["attrs"]:
        if name == "UNKNOWN" and value["header"]["type"] == _TCA_BPF_ID:
            return int.from_bytes(value.data[value.offset + 4 : value.offset + 8], sys.byteorder)
    return 0


def _is_ours(found: dict[str, Any]) -> bool:
    """Whether the qdisc under a filter was made by Hookline."""
    return str(found["name"]).startswith(_PREFIX) and str(found["name"]).endswith(_MADE_QDISC)


def _refuse(error: Any, what: str) -> NoReturn:
    raise failure(int(error.code), what, capability="CAP_NET_ADMIN") from None
