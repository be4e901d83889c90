"""Who keeps programs, maps, links and types alive: processes by their descriptors, and pins in every mounted bpffs."""

from __future__ import annotations

import contextlib
import ctypes
import os
import re
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Literal

from hookline.bpf import _syscall
from hookline.bpf._errors import NotPermitted
from hookline.bpf._syscall import Command

__all__ = ["Holder", "ObjectKey", "descriptors", "holders", "pinned"]

Kind = Literal["program", "map", "link", "btf"]
ObjectKey = tuple[Kind, int]
# How /proc names such a descriptor, and the field of its fdinfo that has the number.
_FIELDS: dict[str, tuple[Kind, str]] = {
    "bpf-prog": ("program", "prog_id"),
    "bpf-map": ("map", "map_id"),
    "bpf_link": ("link", "link_id"),
    "bpf-link": ("link", "link_id"),
    "btf": ("btf", "btf_id"),
}
_ANONYMOUS = re.compile(r"anon_inode:\[?([\w-]+)")


@dataclass(frozen=True)
class Holder:
    """A process that holds a descriptor.

    Attributes:
        process: Its number.
        command: Its name, at most 15 characters.
        descriptors: The numbers of its descriptors for the same object.
    """

    process: int
    command: str
    descriptors: tuple[int, ...]


def holders() -> dict[ObjectKey, tuple[Holder, ...]]:
    """Which processes hold what: ``{("program", 7): (Holder(…),)}``.

    Processes whose descriptors may not be read (without CAP_SYS_PTRACE: those of other users) are absent.
    """
    found: dict[ObjectKey, dict[int, list[int]]] = {}
    for process, fd, label in descriptors(*_FIELDS):
        kind, field = _FIELDS[label]
        with contextlib.suppress(OSError):
            text = Path(f"/proc/{process}/fdinfo/{fd}").read_text()
            match = re.search(rf"^{field}:\s*(\d+)", text, re.MULTILINE)
            if match:
                found.setdefault((kind, int(match[1])), {}).setdefault(process, []).append(fd)
    return {
        key: tuple(Holder(process, _command(process), tuple(fds)) for process, fds in by_process.items())
        for key, by_process in found.items()
    }


def descriptors(*labels: str) -> Iterator[tuple[int, int, str]]:
    """Process, number and label of every open descriptor of these kinds, as far as they may be read."""
    for folder in Path("/proc").iterdir():
        if not folder.name.isdigit():
            continue
        with contextlib.suppress(OSError):
            for name in os.listdir(folder / "fd"):
                with contextlib.suppress(OSError):
                    match = _ANONYMOUS.match(os.readlink(folder / "fd" / name))
                    if match and match[1] in labels:
                        yield int(folder.name), int(name), match[1]


def pinned() -> dict[ObjectKey, tuple[Path, ...]]:
    """What is pinned where, in every bpffs that is mounted in this mount namespace.

    Raises:
        NotPermitted: Pins may not be opened: CAP_BPF is missing.
    """
    found: dict[ObjectKey, list[Path]] = {}
    for mount in _mounts():
        for folder, _, names in os.walk(mount):
            for name in names:
                place = Path(folder, name)
                key = _object(place)
                if key is not None:
                    found.setdefault(key, []).append(place)
    return {key: tuple(sorted(places)) for key, places in found.items()}


def _mounts() -> list[str]:
    """Where bpffs is mounted, each instance once."""
    seen: dict[tuple[str, str], str] = {}
    for line in Path("/proc/self/mountinfo").read_text().splitlines():
        words, _, kind = line.partition(" - ")
        if kind.startswith("bpf "):
            device, root, place = words.split()[2:5]
            seen.setdefault((device, root), place.replace("\\040", " "))
    return list(seen.values())


def _object(place: Path) -> ObjectKey | None:
    name = ctypes.create_string_buffer(os.fsencode(place))
    fd = _syscall.call(Command.OBJ_GET, _syscall.attributes("QII", _syscall.address(name), 0, 0))
    if fd == -1:
        raise NotPermitted(f"cannot open the pin {place}", capability="CAP_BPF")
    if fd < 0:
        # Not a pin (an iterator's file, say), or gone meanwhile.
        return None
    try:
        match = _ANONYMOUS.match(os.readlink(f"/proc/self/fd/{fd}"))
        kind, field = _FIELDS[match[1] if match else ""]
        number = re.search(rf"^{field}:\s*(\d+)", Path(f"/proc/self/fdinfo/{fd}").read_text(), re.MULTILINE)
        return (kind, int(number[1])) if number else None
    except KeyError:
        return None
    finally:
        os.close(fd)


def _command(process: int) -> str:
    try:
        return Path(f"/proc/{process}/comm").read_text().rstrip("\n")
    except OSError:
        return "?"
