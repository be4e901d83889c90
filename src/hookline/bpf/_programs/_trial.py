"""Trial runs of a program, on a packet or a context (BPF_PROG_TEST_RUN)."""

from __future__ import annotations

import contextlib
import ctypes
import errno as errnos
import struct
from dataclasses import dataclass
from typing import TYPE_CHECKING

from hookline.bpf import _syscall
from hookline.bpf._errors import BpfError, failure
from hookline.bpf._programs._handle import ProgramHandle
from hookline.bpf._syscall import Command, Flag

if TYPE_CHECKING:
    from typing_extensions import Buffer

__all__ = ["TestRun", "TrialRuns"]

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


class TrialRuns(ProgramHandle):
    """The part of a program that runs it on trial."""

    def run(self, context: Buffer = b"") -> TestRun:
        """Run a ``syscall`` program, which exists to be run like this.

        Args:
            context: What the program gets a pointer to: bytes, or a writable buffer such as a NumPy array or a
                ctypes structure, which holds what the program made of it afterwards.

        Returns:
            Its return value as ``verdict``, and the context afterwards.

        Raises:
            BpfError: It is no syscall program, or the kernel refuses.
        """
        if self.type != "syscall":
            raise BpfError(
                f"program {self.name!r} cannot be run by itself",
                why=f"it is of type {self.type}",
                remedy="attach it, or try it by test_run",
            )
        with memoryview(context).cast("B") as view:
            outcome = self.test_run(context=bytes(view) if len(view) else None)
            if not view.readonly and len(view):
                view[:] = outcome.context
        return outcome

    def test_run(
        self,
        data: Buffer = b"",
        *,
        context: Buffer | None = None,
        ingress: str | int | None = None,
        egress: str | int | None = None,
        repeat: int = 1,
        live_frames: bool = False,
        batch_size: int = 0,
        cpu: int | None = None,
    ) -> TestRun:
        """Run the program on a packet, or on a context alone (BPF_PROG_TEST_RUN).

        With `repeat` above 1 the program meets its own output again; `TestRun.duration_ns` is the mean. Signals wait until
        the last run, other than those that ask the process to stop: SIGINT, SIGTERM, SIGHUP and SIGQUIT end it.

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
            BpfError: The kernel refuses the packet or the context, the program type has no trial runs, or a signal
                ended them.
        """
        data = self._bytes("packet", data)
        if context is not None:
            context = self._bytes("context", context)
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
            with self._undisturbed(repeat, live_frames=live_frames):
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

    def _bytes(self, what: str, given: Buffer) -> bytes:
        try:
            return bytes(memoryview(given))
        except TypeError as error:
            raise BpfError(
                f"cannot run program {self.name!r} on trial", why=f"its {what} is not bytes: {error}"
            ) from None

    def _undisturbed(self, repeat: int, *, live_frames: bool) -> contextlib.AbstractContextManager[None]:
        """Hold signals back where the kernel gives up for any of them: between two runs."""
        if repeat > 1 or live_frames:
            return _syscall.signals_held(stoppable=True)
        return contextlib.nullcontext()

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
        if errno == errnos.EINTR:
            return BpfError(what, errno=errno, why="a signal ended it; it ran in part")
        if errno == errnos.ENXIO:
            return BpfError(what, errno=errno, why="there is no such CPU, or it is offline")
        if errno in (errnos.EOPNOTSUPP, 524):
            return BpfError(what, errno=errno, why=f"the kernel has no trial runs for {self.type} programs")
        return failure(errno, what, capability="CAP_BPF CAP_NET_ADMIN")
