"""The kernel's names: its functions by their addresses, its helpers by their numbers, kfuncs by their types."""

from __future__ import annotations

import functools
from pathlib import Path

from hookline.bpf._errors import BpfError
from hookline.bpf._types import _kernel_types
from hookline.bpf._types._btf import Btf, Kind

__all__ = ["aliases", "at", "helper", "kernel_function", "kfunc"]

# The number of the one helper that the kernel shows by its number in a loaded program.
TAIL_CALL = 12
_ORIGIN = "__bpf_call_base"


def kernel_function(relative: int) -> str:
    """The kernel function at a distance from ``__bpf_call_base``, or its address in hexadecimal."""
    names, origin = _table()
    address = (origin + relative) & 0xFFFFFFFFFFFFFFFF
    return names[address][0] if address in names else f"{address:#x}"


def at(address: int) -> str:
    """The kernel function that begins at an address; empty where none does, or addresses are hidden."""
    names, _ = _table()
    return names[address][0] if address in names else ""


def aliases(name: str) -> set[str]:
    """All names that the kernel gives to the function of this name."""
    names, _ = _table()
    return {name}.union(*(found for found in names.values() if name in found))


def helper(number: int) -> str:
    """The name of a helper, such as ``bpf_map_lookup_elem`` for 1; ``unknown`` where this kernel has none."""
    if number == TAIL_CALL:
        return "bpf_tail_call"
    try:
        return _helpers().get(number, "unknown")
    except BpfError:
        return "unknown"


def kfunc(type_id: int) -> str:
    """The name of a kernel function that programs may call, by its type's number; ``unknown`` where it is none."""
    try:
        return _kernel_types.names(0, [type_id]).get(type_id) or "unknown"
    except BpfError:
        return "unknown"


@functools.cache
def _helpers() -> dict[int, str]:
    btf = Btf.vmlinux()
    found = btf.find("bpf_func_id", Kind.ENUM)
    values = btf[found].values if found is not None else ()
    return {number: name.replace("BPF_FUNC_", "bpf_", 1) for name, number in values}


@functools.cache
def _table() -> tuple[dict[int, list[str]], int]:
    """Names by address, without those of loaded programs, and where calls are counted from; 0 where it is hidden."""
    names: dict[int, list[str]] = {}
    origin = 0
    try:
        text = Path("/proc/kallsyms").read_text()
    except OSError:
        return {}, 0
    for line in text.splitlines():
        words = line.split(None, 3)
        if words[-1] == "[bpf]":
            continue
        address = int(words[0], 16)
        if not address:
            continue
        names.setdefault(address, []).append(words[2])
        if words[2] == _ORIGIN:
            origin = address
    return names, origin
