"""Programs: what they are, trial runs, and the ways onto a hook."""

from __future__ import annotations

import ctypes
import errno as errnos
import os
import struct
from dataclasses import dataclass
from pathlib import Path
from types import TracebackType
from typing import TYPE_CHECKING, Literal, Self

from hookline.bpf import _link, _syscall, pin
from hookline.bpf._errors import BpfError, FeatureMissing, LinkChanged, failure
from hookline.bpf._info import ProgramInfo, describe
from hookline.bpf._link import Link
from hookline.bpf._syscall import AttachType, Command, Flag

if TYPE_CHECKING:
    from hookline.bpf._clsact import ClsactFilter
    from hookline.bpf._code import Jited, Xlated

__all__ = ["Program", "TestRun"]

_XDP_CONTEXT = struct.Struct("=6I")
_SKB_CONTEXT_SIZE = 192
_SKB_INGRESS_IFINDEX, _SKB_IFINDEX = 36, 40
# A program may grow a packet by this much before the answer has to be asked for again.
_GROWTH = 1024
# Trial runs without a packet: those that only return a value, and those that also give their context back.
_VALUE_ONLY = {"syscall", "raw_tracepoint", "raw_tracepoint_writable", "tracing"}
_CONTEXT_ONLY = {"sk_lookup"}
_SHORTEST = {"netfilter": 20}


@dataclass(frozen=True)
class TestRun:
    """The outcome of a trial run.

    Attributes:
        verdict: What the program returned.
        data: The packet afterwards.
        duration_ns: The mean time of one run, in nanoseconds, as the kernel measured it.
        context: The context afterwards, where one was given.
    """

    __test__ = False

    verdict: int
    data: bytes
    duration_ns: int
    context: bytes


class Program:
    """A program of an object, or one that is loaded already.

    A program from an object lives until the object is closed; `duplicate` makes a handle that lives on, and
    what is attached stays attached by its link. Programs from `from_pin` and `from_id` are the caller's.

    Attributes:
        name: The C function's name; for an adopted program the kernel's, at most 15 characters.
        section: The section it was compiled into, ``""`` for an adopted one.
        type: The kernel's name of its type: ``"xdp"``, ``"sched_cls"``, …
    """

    def __init__(self, fd: int | None, name: str, kind: str, section: str = "") -> None:
        self._fd = fd
        self._closed = False
        self._id = 0
        self.name = name
        self.type = kind
        self.section = section

    @classmethod
    def from_pin(cls, path: str | os.PathLike[str]) -> Self:
        """Open a pinned program.

        Raises:
            BpfError: Nothing is pinned there, or it is no program.
        """
        return cls._from_fd(pin.get(path, "program"))

    @classmethod
    def from_id(cls, program_id: int) -> Self:
        """Open a program by the kernel's number for it (needs CAP_SYS_ADMIN)."""
        return cls._from_fd(_syscall.fd_by_id(Command.PROG_GET_FD_BY_ID, program_id, "a program"))

    @classmethod
    def _from_fd(cls, fd: int) -> Self:
        """Take over a descriptor."""
        try:
            found = describe(fd)
        except BaseException:
            os.close(fd)
            raise
        return cls(fd, found.name, found.type)

    def duplicate(self) -> Program:
        """Another handle of the same program with a life of its own."""
        return Program(os.dup(self.fd), self.name, self.type, self.section)

    @property
    def fd(self) -> int:
        """The descriptor.

        Raises:
            BpfError: The program is closed, or its object is not loaded, or it was left out of the load.
        """
        if self._fd is None:
            raise BpfError(
                f"program {self.name!r} is {'closed' if self._closed else 'not loaded'}", errno=errnos.EBADF
            )
        return self._fd

    @property
    def loaded(self) -> bool:
        """Whether it is in the kernel and this handle open."""
        return self._fd is not None

    @property
    def id(self) -> int:
        """The kernel's number for it."""
        if not self._id:
            self._id = self.info.id
        return self._id

    @property
    def info(self) -> ProgramInfo:
        """What the kernel says of it now."""
        return describe(self.fd)

    # Its code

    def xlated(self) -> Xlated:
        """The instructions as the verifier left them, with functions and source lines; ``str()`` is a listing.

        Raises:
            NotPermitted: CAP_BPF, CAP_PERFMON or CAP_SYSLOG is missing.
        """
        from hookline.bpf import _code

        return _code.xlated(self.fd, self.name)

    def jited(self) -> Jited:
        """The machine code, function by function; ``str()`` is a listing (needs the extra ``disassembly``).

        Raises:
            NotPermitted: CAP_BPF, CAP_PERFMON or CAP_SYSLOG is missing.
            BpfError: The program is interpreted: the just-in-time compiler is off.
        """
        from hookline.bpf import _code

        return _code.jited(self.fd, self.name)

    # Onto a hook

    def attach_xdp(
        self, interface: str | int, mode: Literal["auto", "native", "generic", "offload"] = "auto"
    ) -> Link:
        """Attach to an interface's XDP hook.

        Args:
            interface: A name or an index in this thread's network namespace.
            mode: ``"native"`` in the driver, ``"generic"`` after the packet has become a socket buffer,
                ``"offload"`` in the device, ``"auto"`` native where the driver can, else generic; `Link.mode`
                says which.

        Raises:
            BpfError: There is no such interface, or it has an XDP program (named; nothing is changed).
            NotPermitted: CAP_NET_ADMIN or CAP_BPF is missing.
        """
        return _link.attach_xdp(self, interface, mode)

    def attach_tc(
        self,
        interface: str | int,
        direction: Literal["ingress", "egress"],
        *,
        hook: Literal["auto", "tcx", "clsact"] = "auto",
        before: Link | Program | Literal["all"] | None = None,
        after: Link | Program | Literal["all"] | None = None,
        expected_revision: int = 0,
        priority: int = 50,
        pin: str | os.PathLike[str] | None = None,
    ) -> Link | ClsactFilter:
        """Attach to an interface's traffic control hook.

        Args:
            interface: A name or an index in this thread's network namespace.
            direction: ``"ingress"`` or ``"egress"``, as the interface sees it.
            hook: ``"tcx"`` (Linux 6.6), ``"clsact"``, or ``"auto"``: tcx where the kernel has it.
            before: tcx only: run before this one, or before all.
            after: tcx only: run after this one, or after all (which is the default).
            expected_revision: tcx only: fail if the hook's programs changed since this revision (0: never).
            priority: clsact only: the filter's preference; lower runs first.
            pin: Where to pin it at once: a process that is killed leaves no clsact filter without its pin.

        Returns:
            A `Link`, or for clsact a filter with the same ways to detach, close and pin; ``hook`` says which.

        Raises:
            FeatureMissing: ``hook="tcx"`` or an order was asked for and the kernel has no tcx.
            LinkChanged: The revision is not the expected one.
            BpfError: There is no such interface, or the kernel refuses.
        """
        index = _syscall.interface_index(interface)
        ordered = before is not None or after is not None or bool(expected_revision)
        if hook == "clsact":
            if ordered:
                raise BpfError(
                    "clsact has no order relative to a program", remedy="use priority, or hook tcx"
                )
            return self._attach_clsact(index, direction, priority, pin)
        attach_type = AttachType.TCX_INGRESS if direction == "ingress" else AttachType.TCX_EGRESS
        made = _link.attach_tcx(
            self, index, attach_type, before=before, after=after, expected_revision=expected_revision
        )
        if isinstance(made, Link):
            if pin is not None:
                try:
                    made.pin(pin)
                except BaseException:
                    made.close()
                    raise
            return made
        what = f"cannot attach program {self.name!r} to {_syscall.interface_name(index)}'s {direction}"
        if made == -errnos.EINVAL:
            from hookline.bpf import features

            answer = features.tcx().answer
            if hook == "tcx" or ordered:
                if answer is features.Answer.NO:
                    raise FeatureMissing("tcx", minimum_kernel="6.6", remedy="use hook clsact")
            elif answer is not features.Answer.YES:
                return self._attach_clsact(index, direction, priority, pin)
        if made == -errnos.ESTALE:
            raise LinkChanged(
                what,
                errno=errnos.ESTALE,
                why=f"the hook is not at revision {expected_revision} any more; nothing was changed",
                remedy="read the hook again and decide anew",
            )
        raise failure(-made, what, capability="CAP_NET_ADMIN CAP_BPF")

    def _attach_clsact(
        self,
        index: int,
        direction: Literal["ingress", "egress"],
        priority: int,
        place: str | os.PathLike[str] | None,
    ) -> ClsactFilter:
        from hookline.bpf._clsact import ClsactFilter

        return ClsactFilter.attach(
            self, index, direction, priority, Path(place).absolute() if place else None
        )

    def attach_raw_tracepoint(self, name: str) -> Link:
        """Attach to a raw tracepoint, such as ``"xdp_exception"``.

        Raises:
            BpfError: There is none of that name, or the kernel refuses.
        """
        return _link.attach_raw_tracepoint(self, name)

    # Trial runs

    def test_run(
        self,
        data: bytes = b"",
        *,
        context: bytes | None = None,
        ingress: str | int | None = None,
        egress: str | int | None = None,
        repeat: int = 1,
        live_frames: bool = False,
        batch_size: int = 0,
        cpu: int | None = None,
    ) -> TestRun:
        """Run the program on a packet, or on a context alone (BPF_PROG_TEST_RUN).

        With `repeat` above 1 the program meets its own output again; `TestRun.duration_ns` is the mean.

        Args:
            data: The packet from layer 2 on, at least 14 bytes (a socket filter then sees it from layer 3); for
                netfilter programs from layer 3 on. None for syscall, raw tracepoint, tracing and sk_lookup programs.
            context: The raw context: ``struct xdp_md``, ``struct __sk_buff``, ``struct bpf_sk_lookup``, a syscall
                program's own, or a raw tracepoint's arguments, 8 bytes each.
            ingress: The interface that the packet comes in by; makes the context for XDP and TC programs.
            egress: The interface that the packet leaves by; makes the context for TC programs.
            repeat: How often to run it.
            live_frames: XDP only: carry the verdicts out, so that XDP_TX and XDP_REDIRECT really send.
            batch_size: Live frames only: how many packets per round, 0 for the kernel's choice.
            cpu: Raw tracepoints only: where to run it.

        Raises:
            BpfError: The kernel refuses the packet or the context, or the program type has no trial runs.
        """
        if context is None and (ingress is not None or egress is not None):
            context = self._context(len(data), ingress, egress)
        self._check_run(data, live_frames=live_frames, cpu=cpu)
        plain = self.type in _VALUE_ONLY
        flags = Flag.TEST_XDP_LIVE_FRAMES if live_frames else 0
        if cpu is not None:
            flags |= 1
        answer = not (plain or live_frames or self.type in _CONTEXT_ONLY)
        source = ctypes.create_string_buffer(data, len(data)) if data else None
        before = ctypes.create_string_buffer(context, len(context)) if context is not None else None
        after = (
            ctypes.create_string_buffer(len(context))
            if context is not None and not (plain or live_frames)
            else None
        )
        room = len(data) + _GROWTH
        while True:
            target = ctypes.create_string_buffer(room) if answer else None
            attr = _syscall.attributes(
                "IIIIQQIIIIQQIII4x",
                self.fd,
                0,
                len(data),
                room if target else 0,
                _syscall.address(source),
                _syscall.address(target),
                0 if plain else repeat,
                0,
                len(before) if before else 0,
                len(after) if after else 0,
                _syscall.address(before),
                _syscall.address(after),
                flags,
                cpu or 0,
                batch_size,
            )
            result = _syscall.call(Command.PROG_TEST_RUN, attr)
            verdict, size, duration = (
                struct.unpack_from("=I", attr, 4)[0],
                struct.unpack_from("=I", attr, 12)[0],
                struct.unpack_from("=I", attr, 36)[0],
            )
            if result == -errnos.ENOSPC and size > room:
                room = size
                continue
            break
        if result < 0:
            raise self._run_failure(-result, data)
        answered = target.raw[:size] if target is not None else b""
        # A syscall program's context is written back in place.
        changed = after if after is not None else before if self.type == "syscall" else None
        return TestRun(verdict, answered, duration, changed.raw if changed is not None else b"")

    def _context(self, length: int, ingress: str | int | None, egress: str | int | None) -> bytes:
        if self.type == "xdp" and ingress is not None and egress is None:
            return _XDP_CONTEXT.pack(0, length, 0, _syscall.interface_index(ingress), 0, 0)
        if self.type in ("sched_cls", "sched_act"):
            context = bytearray(_SKB_CONTEXT_SIZE)
            if ingress is not None:
                struct.pack_into("=I", context, _SKB_INGRESS_IFINDEX, _syscall.interface_index(ingress))
            device = egress if egress is not None else ingress
            assert device is not None
            struct.pack_into("=I", context, _SKB_IFINDEX, _syscall.interface_index(device))
            return bytes(context)
        raise BpfError(
            f"a trial run of program {self.name!r} takes no such interface",
            why=f"it is of type {self.type}",
            remedy="give ingress to XDP and TC programs, egress to TC programs, or context",
        )

    def _check_run(self, data: bytes, *, live_frames: bool, cpu: int | None) -> None:
        """Refuse what the kernel would refuse without a reason."""
        why = ""
        if data and self.type in _VALUE_ONLY | _CONTEXT_ONLY:
            why = f"{self.type} programs have no packet: give it a context"
        elif live_frames and self.type != "xdp":
            why = f"live frames are XDP's, and it is of type {self.type}"
        elif cpu is not None and self.type not in ("raw_tracepoint", "raw_tracepoint_writable"):
            why = f"only raw tracepoint programs run on a CPU of choice, and it is of type {self.type}"
        if why:
            raise BpfError(f"cannot run program {self.name!r} on trial", errno=errnos.EINVAL, why=why)

    def _run_failure(self, errno: int, data: bytes) -> BpfError:
        what = f"cannot run program {self.name!r} on trial"
        shortest = _SHORTEST.get(self.type, 0 if self.type in _VALUE_ONLY | _CONTEXT_ONLY else 14)
        if errno == errnos.EINVAL and len(data) < shortest:
            return BpfError(
                what, errno=errno, why=f"a packet has at least {shortest} bytes, {len(data)} were given"
            )
        if errno == errnos.EINVAL and self.type in _CONTEXT_ONLY:
            return BpfError(
                what, errno=errno, why="it needs its whole context, and the kernel refused this one"
            )
        if errno == errnos.ENXIO:
            return BpfError(what, errno=errno, why="there is no such CPU, or it is offline")
        if errno in (errnos.EOPNOTSUPP, 524):
            return BpfError(what, errno=errno, why=f"the kernel has no trial runs for {self.type} programs")
        return failure(errno, what, capability="CAP_BPF CAP_NET_ADMIN")

    # Life

    def pin(self, path: str | os.PathLike[str]) -> None:
        """Keep the program in bpffs; `from_pin` opens it again. That alone attaches it nowhere."""
        pin.put(self.fd, path, f"program {self.name!r}")

    def close(self) -> None:
        """Give the descriptor back; links keep their program. Closing twice is no error."""
        self._closed = True
        if self._fd is not None:
            fd, self._fd = self._fd, None
            os.close(fd)

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.close()

    def __del__(self) -> None:
        fd = getattr(self, "_fd", None)
        if fd is not None:
            self._fd = None
            _syscall.closed_quietly(fd)

    def __repr__(self) -> str:
        return f"<Program {self.name!r}: {self.type}{'' if self.loaded else ', not loaded'}>"
