"""What the kernel says of a program."""

from __future__ import annotations

import ctypes
import functools
import re
import sys
import time
from dataclasses import dataclass
from pathlib import Path

from hookline.bpf import _syscall
from hookline.bpf._errors import BpfError

__all__ = ["Info", "ProgramInfo", "describe"]

_KEPT = 15


class Info(ctypes.Structure):
    """``struct bpf_prog_info``."""

    _fields_ = [
        ("type", ctypes.c_uint32),
        ("id", ctypes.c_uint32),
        ("tag", ctypes.c_ubyte * 8),
        ("jited_prog_len", ctypes.c_uint32),
        ("xlated_prog_len", ctypes.c_uint32),
        ("jited_prog_insns", ctypes.c_uint64),
        ("xlated_prog_insns", ctypes.c_uint64),
        ("load_time", ctypes.c_uint64),
        ("created_by_uid", ctypes.c_uint32),
        ("nr_map_ids", ctypes.c_uint32),
        ("map_ids", ctypes.c_uint64),
        ("name", ctypes.c_char * 16),
        ("ifindex", ctypes.c_uint32),
        ("gpl_compatible", ctypes.c_uint32),
        ("netns_dev", ctypes.c_uint64),
        ("netns_ino", ctypes.c_uint64),
        ("nr_jited_ksyms", ctypes.c_uint32),
        ("nr_jited_func_lens", ctypes.c_uint32),
        ("jited_ksyms", ctypes.c_uint64),
        ("jited_func_lens", ctypes.c_uint64),
        ("btf_id", ctypes.c_uint32),
        ("func_info_rec_size", ctypes.c_uint32),
        ("func_info", ctypes.c_uint64),
        ("nr_func_info", ctypes.c_uint32),
        ("nr_line_info", ctypes.c_uint32),
        ("line_info", ctypes.c_uint64),
        ("jited_line_info", ctypes.c_uint64),
        ("nr_jited_line_info", ctypes.c_uint32),
        ("line_info_rec_size", ctypes.c_uint32),
        ("jited_line_info_rec_size", ctypes.c_uint32),
        ("nr_prog_tags", ctypes.c_uint32),
        ("prog_tags", ctypes.c_uint64),
        ("run_time_ns", ctypes.c_uint64),
        ("run_cnt", ctypes.c_uint64),
        ("recursion_misses", ctypes.c_uint64),
        ("verified_insns", ctypes.c_uint32),
        ("attach_btf_obj_id", ctypes.c_uint32),
        ("attach_btf_id", ctypes.c_uint32),
        ("pad", ctypes.c_uint32),
    ]


@dataclass(frozen=True)
class ProgramInfo:
    """What the kernel says of a program.

    Attributes:
        id: The kernel's number for it.
        name: The C function's; cut off at 15 characters where it came without types, or these may not be read.
        type: The kernel's name: ``"xdp"``, ``"sched_cls"``, …
        tag: A hash of the instructions, 16 hexadecimal digits.
        instructions: How many it has after verification.
        jited_bytes: The size of its machine code, 0 where it is interpreted.
        verified_instructions: How many the verifier walked through.
        map_ids: The maps it uses.
        loaded_at: When it was loaded, in seconds since 1970.
        run_time_ns: Time spent in it while run-time statistics were on (`run_statistics`).
        run_count: Runs counted in that time.
        recursion_misses: Runs that were left out since the program ran on that CPU already.
        uid: The user that loaded it.
        gpl_compatible: Whether its licence opens the kernel's GPL-only helpers to it.
        btf_id: The kernel's number for its types, 0 where it came without.
        function_count: How many functions it has, its own among them.
        memory_bytes: The memory that the kernel accounts to it.
        attach_btf_object_id: Whose type its target is (`attach_target`), 0 for the kernel's own or none.
        attach_btf_id: The number of that type, 0 for programs without a target.
        bound_interface: The index of the device it was loaded for (offload), else 0.
    """

    id: int
    name: str
    type: str
    tag: str
    instructions: int
    jited_bytes: int
    verified_instructions: int
    map_ids: tuple[int, ...]
    loaded_at: float
    run_time_ns: int
    run_count: int
    recursion_misses: int
    uid: int
    gpl_compatible: bool
    btf_id: int
    function_count: int
    memory_bytes: int
    attach_btf_object_id: int
    attach_btf_id: int
    bound_interface: int

    @functools.cached_property
    def attach_target(self) -> str:
        """The kernel function or tracepoint that a tracing, LSM or extension program was loaded for, else empty.

        It is looked up in the kernel's types (about 0.1 s).
        """
        from hookline.bpf._types import _kernel_types

        if not self.attach_btf_id:
            return ""
        try:
            found = _kernel_types.names(self.attach_btf_object_id, [self.attach_btf_id])
        except BpfError:
            return ""
        return found.get(self.attach_btf_id, "").removeprefix("btf_trace_")


def describe(fd: int) -> ProgramInfo:
    """What the kernel says of a program's descriptor."""
    info = Info()
    _syscall.info(fd, info, "a program")
    maps: tuple[int, ...] = ()
    if info.nr_map_ids:
        numbers = (ctypes.c_uint32 * info.nr_map_ids)()
        again = Info(nr_map_ids=len(numbers), map_ids=ctypes.addressof(numbers))
        _syscall.info(fd, again, "a program")
        maps = tuple(numbers[: again.nr_map_ids])
    booted = time.time() - time.clock_gettime(time.CLOCK_BOOTTIME)
    return ProgramInfo(
        id=info.id,
        name=_name(fd, info),
        type=_syscall.name_of(_syscall.PROGRAM_TYPES, info.type),
        tag=bytes(info.tag).hex(),
        instructions=info.xlated_prog_len // 8,
        jited_bytes=info.jited_prog_len,
        verified_instructions=info.verified_insns,
        map_ids=maps,
        loaded_at=booted + info.load_time / 1e9,
        run_time_ns=info.run_time_ns,
        run_count=info.run_cnt,
        recursion_misses=info.recursion_misses,
        uid=info.created_by_uid,
        gpl_compatible=bool(info.gpl_compatible & 1),
        btf_id=info.btf_id,
        function_count=max(info.nr_func_info, info.nr_jited_ksyms, 1),
        memory_bytes=_memory(fd),
        attach_btf_object_id=info.attach_btf_obj_id,
        attach_btf_id=info.attach_btf_id,
        bound_interface=info.ifindex,
    )


def _name(fd: int, info: Info) -> str:
    """The kernel keeps 15 characters of a name; the types have all of it."""
    from hookline.bpf._types import _kernel_types

    kept: str = info.name.decode(errors="replace")
    if len(kept) < _KEPT or not info.btf_id or info.func_info_rec_size < 8:
        return kept
    record = ctypes.create_string_buffer(info.func_info_rec_size)
    again = Info(
        func_info=_syscall.address(record), nr_func_info=1, func_info_rec_size=info.func_info_rec_size
    )
    try:
        _syscall.info(fd, again, "a program")
        whole = _kernel_types.name(info.btf_id, int.from_bytes(record.raw[4:8], sys.byteorder))
    except BpfError:
        return kept
    return whole if whole.startswith(kept) else kept


def _memory(fd: int) -> int:
    found = re.search(r"^memlock:\s*(\d+)", Path(f"/proc/self/fdinfo/{fd}").read_text(), re.MULTILINE)
    return int(found[1]) if found else 0
