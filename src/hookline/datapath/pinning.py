"""What the data paths' functions share: objects of compiled programs, and what is pinned of them in bpffs.

What a function of a node's data path is, is in the kernel and pinned below a folder of its own:

    maps/NAME              every map
    programs/NAME          every program
    links/HOOK:INTERFACE   every attachment; a mode that was asked for follows

Every step may be the last one of a process that is killed, so whoever comes next looks at what is there.
"""

from __future__ import annotations

import os
import socket
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from functools import cache
from pathlib import Path
from typing import Literal

from hookline import bpf
from hookline.errors import HooklineError

Direction = Literal["ingress", "egress"]
AttachedLink = bpf.Link | bpf.ClsactFilter


@dataclass(frozen=True, slots=True)
class Attachment:
    """One program on one hook.

    Attributes:
        hook: ``xdp`` with its mode, ``tcx`` or ``clsact`` with the direction, ``raw_tracepoint``, ``cgroup``.
        interface: Empty for programs that are on none.
        change: What `activate` did: nothing (``kept``), ``attached``, ``updated`` or ``detached``.
    """

    program: str
    hook: str
    interface: str
    change: str


@cache
def object_bytes(path: Path) -> bytes:
    """A compiled object.

    Raises:
        HooklineError: It was not compiled.
    """
    try:
        return path.read_bytes()
    except FileNotFoundError:
        raise HooklineError(
            f"the kernel programs are not compiled: {path} is missing",
            why="a checkout holds their sources only",
            remedy="make setup",
        ) from None


# Links


def link_pin(pins: Path, program: str, interface: str, mode: str = "auto") -> Path:
    """The pin of one attachment. bpffs refuses dots, which interfaces' names may have, and these have no colons."""
    parts = [program, *filter(None, [interface]), *([mode] if mode != "auto" else [])]
    return pins / "links" / ":".join(parts).replace(".", ",")


def parse_pin(path: Path) -> tuple[str, str]:
    """Program and interface of an attachment's pin."""
    program, *rest = path.name.split(":")
    return program, rest[0].replace(",", ".") if rest else ""


def pins_of(pins: Path, program: str, interface: str) -> list[Path]:
    """The pins of one attachment, whatever the mode."""
    return [path for path in entries(pins / "links") if parse_pin(path) == (program, interface)]


def attached(pins: Path) -> list[tuple[str, str]]:
    """Program and interface of every attachment that is pinned."""
    return [parse_pin(path) for path in entries(pins / "links")]


def attachments(pins: Path, directions: Mapping[str, Direction]) -> list[Attachment]:
    """Every attachment as it is; those whose interface is gone are left out.

    Args:
        pins: The function's folder.
        directions: Of the programs of traffic control.
    """
    found = []
    for path in entries(pins / "links"):
        program, interface = parse_pin(path)
        link = open_link(path, interface, directions.get(program))
        if link is not None:
            with link:
                found.append(Attachment(program, hook_of(link), interface, "kept"))
    return found


def detach(pins: Path, program: str, interface: str, direction: Direction | None) -> Attachment:
    """Detaches one program and unpins its link."""
    hook = ""
    for path in pins_of(pins, program, interface):
        link = open_link(path, interface, direction)
        if link is not None:
            with link:
                hook = hook_of(link)
                link.detach()
        if path.exists():
            path.unlink()
    return Attachment(program, hook, interface, "detached")


def open_link(path: Path, interface: str, direction: Direction | None) -> AttachedLink | None:
    """The attachment that is pinned there; None where there is none, or its interface is gone."""
    if not path.exists():
        return None
    index = ifindex(interface) if interface else 0
    if interface and not index:
        return None
    try:
        link = bpf.Link.from_pin(path)
    except bpf.BpfError:
        if direction is None:
            return None
        # Where the kernel has no tcx, the pin is the program's, and the filter is found by it.
        try:
            return bpf.ClsactFilter.from_pin(path, interface, direction)
        except bpf.BpfError:
            return None
    if link.info.interface_index == index and not link.info.detached:
        return link
    link.close()
    return None


def hook_of(link: AttachedLink) -> str:
    """The hook's name and, for XDP, the mode."""
    return f"{link.hook} {link.mode}" if link.mode else link.hook


def program_id(link: AttachedLink) -> int:
    """The program that is attached."""
    return link.program_id if isinstance(link, bpf.ClsactFilter) else link.info.program_id


def ifindex(interface: str) -> int:
    """An interface's index in this network namespace; 0 where there is none of that name."""
    try:
        return socket.if_nametoindex(interface)
    except OSError:
        return 0


# Maps and programs


def whole(pins: Path, maps: Iterable[str], programs: Iterable[str]) -> bool:
    """Whether all of these are pinned."""
    return all((pins / "maps" / name).exists() for name in maps) and all(
        (pins / "programs" / name).exists() for name in programs
    )


def exists(pins: Path) -> bool:
    """Whether anything is pinned there."""
    return any((pins / kind).is_dir() for kind in ("maps", "programs", "links"))


def pin_all(pins: Path, maps: Mapping[str, bpf.Map], programs: Mapping[str, bpf.Program]) -> None:
    """Pins maps and programs under their names, whatever another version has there."""
    things: tuple[tuple[str, Mapping[str, bpf.Map | bpf.Program]], ...] = (
        ("maps", maps),
        ("programs", programs),
    )
    for folder, named in things:
        (pins / folder).mkdir(parents=True, exist_ok=True)
        for name, thing in named.items():
            pin_in_place(thing, pins / folder / name)


def pin_in_place(thing: bpf.Map | bpf.Program, path: Path) -> None:
    """Pins a map or program under a name that another version may have; the change of hands is one step."""
    if path.exists():
        with type(thing).from_pin(path) as there:
            if there.id == thing.id:
                return
    fresh = path.with_name(path.name + "~")
    if fresh.exists():
        fresh.unlink()
    thing.pin(fresh)
    os.replace(fresh, path)


def unpin(pins: Path) -> None:
    """Removes all pins of a function, and the folders that are empty then."""
    for folder in ("links", "programs", "maps"):
        for path in entries(pins / folder):
            path.unlink()
        if (pins / folder).is_dir():
            (pins / folder).rmdir()
    for parent in (pins, *pins.parents):
        # Up to the mount itself, as long as nobody else has something there.
        if parent.is_mount() or not parent.is_dir() or any(parent.iterdir()):
            break
        parent.rmdir()


def same_shape(new: bpf.Map, path: Path) -> bool:
    """Whether a pinned map has the same type, layout and size."""
    with bpf.Map.from_pin(path) as old:
        return (
            new.type == old.type
            and new.key_dtype == old.key_dtype
            and new.value_dtype == old.value_dtype
            and new.max_entries == old.max_entries
        )


def carry_over(path: Path, into: bpf.Map) -> None:
    """Copies a map's entries into one of another size, as many as fit, where their layout is the same."""
    with bpf.Map.from_pin(path) as old:
        if old.key_dtype == into.key_dtype and old.value_dtype == into.value_dtype:
            keys, values = old.read()
            into.write(keys[: into.max_entries], values[: into.max_entries])


def entries(folder: Path) -> list[Path]:
    """What is in a folder, which need not be there."""
    return sorted(folder.iterdir()) if folder.is_dir() else []
