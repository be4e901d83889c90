"""Whether a file is an eBPF object that can be opened, before libbpf sees it.

libbpf answers a bad object with -EINVAL and trusts what libelf makes of damaged headers. These checks say
what is wrong and what to do, and keep damaged files away from C code.
"""

from __future__ import annotations

import io
import struct
import sys

from hookline.bpf._errors import ObjectError
from hookline.bpf._types._btf import Btf, Kind

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
        _check_types(Btf(sections[".BTF"]))
    except ObjectError as error:
        raise ObjectError(f"{name} is damaged", why=str(error), remedy=_RECOMPILE) from None


_REFERRING = {
    Kind.PTR, Kind.ARRAY, Kind.TYPEDEF, Kind.VOLATILE, Kind.CONST, Kind.RESTRICT, Kind.FUNC, Kind.FUNC_PROTO,
    Kind.VAR, Kind.DECL_TAG, Kind.TYPE_TAG,
}  # fmt: skip
_HOLDING = {Kind.ARRAY, Kind.TYPEDEF, Kind.VOLATILE, Kind.CONST, Kind.RESTRICT, Kind.TYPE_TAG}
_STRUCTURES = {Kind.STRUCT, Kind.UNION}


def _check_types(btf: Btf) -> None:
    """Check what libbpf trusts: references lead to types of the right kinds, and no type holds itself.

    Raises:
        ObjectError: One does not.
    """
    for number in range(len(btf)):
        found = btf[number]
        targets = [found.target] if found.kind in _REFERRING else []
        targets += [member.type_id for member in found.members]
        if any(target >= len(btf) for target in targets):
            raise _damaged_types(f"type {number} refers to one that does not exist")
        if found.kind is Kind.FUNC and btf[found.target].kind is not Kind.FUNC_PROTO:
            raise _damaged_types(f"function {number} has no prototype")
        if found.kind is Kind.DATASEC:
            kinds = {btf[member.type_id].kind for member in found.members}
            if not kinds <= {Kind.VAR, Kind.FUNC}:
                raise _damaged_types(f"section {number} holds what is no variable")
    _check_nesting(btf)


def _check_nesting(btf: Btf) -> None:
    """Raise where a type holds itself, directly or through others (pointers hold nothing)."""
    finished: set[int] = set()
    for start in range(len(btf)):
        path: list[tuple[int, list[int]]] = [] if start in finished else [(start, _held(btf, start))]
        within = {number for number, _ in path}
        while path:
            number, rest = path[-1]
            if not rest:
                path.pop()
                within.discard(number)
                finished.add(number)
                continue
            following = rest.pop()
            if following in within:
                raise _damaged_types(f"type {following} holds itself")
            if following not in finished:
                path.append((following, _held(btf, following)))
                within.add(following)


def _held(btf: Btf, number: int) -> list[int]:
    found = btf[number]
    if found.kind in _HOLDING:
        return [found.target]
    return [member.type_id for member in found.members] if found.kind in _STRUCTURES else []


def _damaged_types(why: str) -> ObjectError:
    return ObjectError("the type information (BTF) is damaged", why=why, remedy=_RECOMPILE)


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
