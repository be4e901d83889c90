"""A program's descriptor: what the kernel says of it, pins, and its end."""

from __future__ import annotations

import errno as errnos
import os
from types import TracebackType
from typing import TYPE_CHECKING, Self

from hookline.bpf import _syscall, pin
from hookline.bpf._errors import BpfError
from hookline.bpf._owner import Owner
from hookline.bpf._programs._info import ProgramInfo, describe
from hookline.bpf._syscall import Command

if TYPE_CHECKING:
    from hookline.bpf._introspection._code import Jited, Xlated

__all__ = ["ProgramHandle"]


class ProgramHandle(Owner):
    """A program of an object, or one that is loaded already.

    A program from an object lives until the object is closed; `duplicate` makes a handle that lives on, and
    what is attached stays attached by its link. Programs from `from_pin` and `from_id` are the caller's.

    Attributes:
        name: The C function's name; for an adopted one without types the kernel's 15 characters.
        section: The section it was compiled into, ``""`` for an adopted one.
        type: The kernel's name of its type: ``"xdp"``, ``"sched_cls"``, …
        expected_attach_type: The ``BPF_*`` number of `AttachType` that it was loaded for, None for an adopted
            one: the kernel does not tell.
    """

    def __init__(
        self,
        fd: int | None,
        name: str,
        kind: str,
        section: str = "",
        *,
        expected_attach_type: int | None = None,
    ) -> None:
        self._fd = fd
        self._closed = False
        self._id = 0
        self.name = name
        self.type = kind
        self.section = section
        self.expected_attach_type = expected_attach_type

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

    def duplicate(self) -> Self:
        """Another handle of the same program with a life of its own."""
        return type(self)(
            os.dup(self.fd),
            self.name,
            self.type,
            self.section,
            expected_attach_type=self.expected_attach_type,
        )

    @property
    def fd(self) -> int:
        """The descriptor.

        Raises:
            BpfError: The program is closed, or its object is not loaded, or it was left out of the load.
        """
        if self._fd is None:
            raise BpfError(
                f"program {self.name!r} is {'closed' if self._closed else 'not loaded'}",
                errno=errnos.EBADF,
                remedy="load its object, and use it before close()",
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

    def xlated(self) -> Xlated:
        """The instructions as the verifier left them, with functions and source lines; ``str()`` is a listing.

        Raises:
            NotPermitted: CAP_BPF, CAP_PERFMON or CAP_SYSLOG is missing.
        """
        from hookline.bpf._introspection import _code

        return _code.xlated(self.fd, self.name)

    def jited(self) -> Jited:
        """The machine code, function by function; ``str()`` is a listing (needs the extra ``disassembly``).

        Raises:
            NotPermitted: CAP_BPF, CAP_PERFMON or CAP_SYSLOG is missing.
            BpfError: The program is interpreted: the just-in-time compiler is off.
        """
        from hookline.bpf._introspection import _code

        return _code.jited(self.fd, self.name)

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
