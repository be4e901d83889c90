"""libbpf through ctypes, for what it does best: ELF, CO-RE relocation, loading and map reuse.

Everything after the load goes through bpf(2) directly. libbpf's messages are collected per thread and end in
the errors; it never prints.
"""

from __future__ import annotations

import ctypes
import errno as errnos
import functools
import threading
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any

from hookline.bpf._errors import BpfError

__all__ = ["OpenOptions", "library", "messages", "version"]

MINIMUM = (1, 1)

# Numbers above any errno, by which libbpf reports its own errors.
_OWN_ERRORS = {
    4000: "libelf failed",
    4001: "the format is not valid",
    4003: "the endianness is foreign",
    4005: "the relocation is not valid",
    4007: "the verifier refused the program",
    4008: "the program is too big",
    4009: "the kernel's version does not fit",
    4010: "the program type is unknown to the kernel",
}


class OpenOptions(ctypes.Structure):
    """``struct bpf_object_open_opts`` of libbpf 1.1."""

    _fields_ = [
        ("sz", ctypes.c_size_t),
        ("object_name", ctypes.c_char_p),
        ("relaxed_maps", ctypes.c_bool),
        ("pin_root_path", ctypes.c_char_p),
        ("stub", ctypes.c_uint32),
        ("kconfig", ctypes.c_char_p),
        ("btf_custom_path", ctypes.c_char_p),
        ("kernel_log_buf", ctypes.c_void_p),
        ("kernel_log_size", ctypes.c_size_t),
        ("kernel_log_level", ctypes.c_uint32),
    ]


_PRINT = ctypes.CFUNCTYPE(ctypes.c_int, ctypes.c_int, ctypes.c_char_p, ctypes.c_void_p)
_DEBUG = 2
_collected = threading.local()


@functools.cache
def library() -> Any:
    """The loaded library, its functions typed.

    Raises:
        BpfError: libbpf is not installed, or too old.
    """
    try:
        found = ctypes.CDLL("libbpf.so.1", use_errno=True)
        found.libbpf_minor_version.restype = ctypes.c_uint32
        found.libbpf_major_version.restype = ctypes.c_uint32
    except OSError as error:
        raise BpfError(
            "libbpf is not installed",
            why=str(error),
            remedy="apt-get install libbpf1",
        ) from None
    version = (int(found.libbpf_major_version()), int(found.libbpf_minor_version()))
    if version < MINIMUM:
        raise BpfError(
            f"libbpf {version[0]}.{version[1]} is too old",
            why=f"Hookline needs {MINIMUM[0]}.{MINIMUM[1]}",
            remedy="apt-get install libbpf1, from Debian 12 or newer",
        )
    _declare(found)
    found.libbpf_set_print(_CALLBACK)
    return found


def version() -> str:
    """libbpf's own version, such as ``"1.1.2"``; raises as `library` does."""
    found = library()
    found.libbpf_version_string.restype = ctypes.c_char_p
    return str(found.libbpf_version_string().decode()).removeprefix("v")


def _declare(found: Any) -> None:
    pointer, number, text, size = ctypes.c_void_p, ctypes.c_int, ctypes.c_char_p, ctypes.c_size_t
    unsigned = ctypes.c_uint32
    signatures: dict[str, tuple[Any, list[Any]]] = {
        "libbpf_set_print": (pointer, [_PRINT]),
        "bpf_object__open_mem": (pointer, [pointer, size, ctypes.POINTER(OpenOptions)]),
        "bpf_object__load": (number, [pointer]),
        "bpf_object__close": (None, [pointer]),
        "bpf_object__btf": (pointer, [pointer]),
        "btf__raw_data": (pointer, [pointer, ctypes.POINTER(unsigned)]),
        "bpf_object__next_program": (pointer, [pointer, pointer]),
        "bpf_program__name": (text, [pointer]),
        "bpf_program__section_name": (text, [pointer]),
        "bpf_program__type": (number, [pointer]),
        "bpf_program__set_type": (number, [pointer, number]),
        "bpf_program__expected_attach_type": (number, [pointer]),
        "bpf_program__set_expected_attach_type": (number, [pointer, number]),
        "bpf_program__set_attach_target": (number, [pointer, number, text]),
        "bpf_program__set_flags": (number, [pointer, unsigned]),
        "bpf_program__set_log_buf": (number, [pointer, pointer, size]),
        "bpf_program__autoload": (ctypes.c_bool, [pointer]),
        "bpf_program__set_autoload": (number, [pointer, ctypes.c_bool]),
        "bpf_program__fd": (number, [pointer]),
        "bpf_object__next_map": (pointer, [pointer, pointer]),
        "bpf_map__name": (text, [pointer]),
        "bpf_map__type": (number, [pointer]),
        "bpf_map__fd": (number, [pointer]),
        "bpf_map__key_size": (unsigned, [pointer]),
        "bpf_map__value_size": (unsigned, [pointer]),
        "bpf_map__max_entries": (unsigned, [pointer]),
        "bpf_map__set_max_entries": (number, [pointer, unsigned]),
        "bpf_map__map_flags": (unsigned, [pointer]),
        "bpf_map__map_extra": (ctypes.c_uint64, [pointer]),
        "bpf_map__set_map_extra": (number, [pointer, ctypes.c_uint64]),
        "bpf_map__btf_key_type_id": (unsigned, [pointer]),
        "bpf_map__btf_value_type_id": (unsigned, [pointer]),
        "bpf_map__is_internal": (ctypes.c_bool, [pointer]),
        "bpf_map__initial_value": (pointer, [pointer, ctypes.POINTER(size)]),
        "bpf_map__reuse_fd": (number, [pointer, number]),
        "libbpf_find_vmlinux_btf_id": (number, [text, number]),
    }
    for name, (result, arguments) in signatures.items():
        function = getattr(found, name)
        function.restype = result
        function.argtypes = arguments


_vsnprintf: Callable[..., int] = ctypes.CDLL(None).vsnprintf
ctypes.CDLL(None).vsnprintf.argtypes = [ctypes.c_char_p, ctypes.c_size_t, ctypes.c_char_p, ctypes.c_void_p]


def _write(level: int, layout: bytes, arguments: int) -> int:
    """libbpf's print callback. A va_list comes and goes as a pointer on every 64-bit machine we serve."""
    lines: list[str] | None = getattr(_collected, "lines", None)
    if level < _DEBUG and lines is not None:
        buffer = ctypes.create_string_buffer(8192)
        _vsnprintf(buffer, ctypes.c_size_t(len(buffer)), ctypes.c_char_p(layout), ctypes.c_void_p(arguments))
        lines.append(buffer.value.decode(errors="replace").removeprefix("libbpf: ").rstrip())
    return 0


@contextmanager
def messages() -> Iterator[list[str]]:
    """Collect what libbpf says in this thread while the block runs."""
    outer = getattr(_collected, "lines", None)
    lines: list[str] = []
    _collected.lines = lines
    try:
        yield lines
    finally:
        _collected.lines = outer


# Kept for as long as libbpf may call it.
_CALLBACK = _PRINT(_write)


def error_text(errno: int) -> str:
    """libbpf's meaning of an error number of its own, or the system's of any other."""
    return _OWN_ERRORS.get(errno) or errnos.errorcode.get(errno, str(errno))
