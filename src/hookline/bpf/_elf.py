"""Whether a file is an eBPF object that can be opened, before libbpf sees it.

libbpf answers a bad object with -EINVAL and trusts what libelf makes of damaged headers. These checks say
what is wrong and what to do, and keep damaged files away from C code.
"""

from __future__ import annotations

import io
import struct
import sys

from hookline.bpf._btf import Btf
from hookline.bpf._errors import ObjectError

__all__ = ["validate"]

_EM_BPF = 247
_HEADER = struct.Struct("<16sHHIQQQIHHHHHH")
_RECOMPILE = "compile it again with clang -O2 -g -target bpf"


def validate(data: bytes, name: str) -> None:
    """Check that the bytes are an eBPF object for this machine, whole and in today's form.

    Raises:
        ObjectError: They are not; it says why and what to do.
    """
    _check_header(data, name)
    from elftools.common.exceptions import ELFError
    from elftools.elf.elffile import ELFFile

    sections: dict[str, bytes] = {}
    try:
        elf = ELFFile(io.BytesIO(data))
        for index in range(elf.num_sections()):
            section = elf.get_section(index)
            header = section.header
            if header["sh_type"] != "SHT_NOBITS":
                if header["sh_offset"] + header["sh_size"] > len(data):
                    raise _truncated(name, f"section {section.name!r} ends beyond the file")
                sections[section.name] = section.data()
    except ELFError as error:
        raise ObjectError(f"{name} is damaged", why=str(error), remedy=_RECOMPILE) from None
    except (
        ValueError,
        KeyError,
        IndexError,
        TypeError,
        AttributeError,
        OverflowError,
        struct.error,
    ) as error:
        # What pyelftools lets through when headers point to nowhere.
        raise ObjectError(
            f"{name} is damaged", why=f"its headers make no sense: {error}", remedy=_RECOMPILE
        ) from None
    if "maps" in sections:
        raise ObjectError(
            f"{name} defines its maps in the old style",
            why='SEC("maps") with struct bpf_map_def is refused by libbpf 1.0 and newer',
            remedy="define each by its BTF form: struct { __uint(type, BPF_MAP_TYPE_HASH); __type(key, …); "
            '__type(value, …); __uint(max_entries, …); } name SEC(".maps");',
        )
    if not sections.get(".BTF"):
        raise ObjectError(
            f"{name} has no type information (BTF)",
            why="it was compiled without -g, or stripped",
            remedy=_RECOMPILE,
        )
    try:
        Btf(sections[".BTF"])
    except ObjectError as error:
        raise ObjectError(f"{name} is damaged", why=str(error), remedy=_RECOMPILE) from None


def _check_header(data: bytes, name: str) -> None:
    if data[:4] != b"\x7fELF":
        why = "it is empty" if not data else "it does not begin with ELF's magic number"
        raise ObjectError(f"{name} is not an eBPF object", why=why, remedy=_RECOMPILE)
    if len(data) < _HEADER.size:
        raise _truncated(name, f"it has {len(data)} bytes, less than an ELF header")
    order = {1: "little", 2: "big"}.get(data[5])
    if order is not None and order != sys.byteorder:
        raise ObjectError(
            f"{name} is for {order}-endian machines",
            why=f"this one is {sys.byteorder}-endian",
            remedy=f"compile it with -target {'bpfel' if sys.byteorder == 'little' else 'bpfeb'}",
        )
    if data[4] != 2 or order is None:
        raise ObjectError(f"{name} is not an eBPF object", why="it is not 64-bit ELF", remedy=_RECOMPILE)
    layout = struct.Struct(("<" if order == "little" else ">") + _HEADER.format[1:])
    _, kind, machine, _, _, _, sections, _, _, _, _, entry, count, _ = layout.unpack_from(data)
    if machine != _EM_BPF:
        raise ObjectError(
            f"{name} is not an eBPF object",
            why=f"it is ELF for machine {machine}, and eBPF is {_EM_BPF}",
            remedy="compile it with clang -target bpf",
        )
    if kind != 1:
        raise ObjectError(
            f"{name} is not an eBPF object", why="it is not a relocatable file", remedy=_RECOMPILE
        )
    if sections + entry * count > len(data):
        raise _truncated(
            name, f"it has {len(data)} bytes, and its headers speak of {sections + entry * count}"
        )


def _truncated(name: str, why: str) -> ObjectError:
    return ObjectError(f"{name} is truncated", why=why, remedy="copy or compile it again")
