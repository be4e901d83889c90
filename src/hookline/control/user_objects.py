"""Objects of users: loaded and attached by a command that ends, so everything is pinned.

Below ``…/host/objects/NAME/`` are ``programs/PROGRAM``, ``maps/MAP`` and ``links/PROGRAM-NUMBER``. A filter on clsact
has no link: its pin holds the program, and is called ``clsact:INTERFACE:DIRECTION:PROGRAM``. Whoever dies halfway leaves
pins that `unload` removes; whatever fails halfway removes its own. bpffs refuses dots in names: ``.bss`` is pinned as
``bss``, and ``eth0.5`` is written ``eth0,5``.
"""

from __future__ import annotations

import contextlib
import errno
import os
import re
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path

from hookline import bpf
from hookline.control._errors import Conflict, ControlError, NotThere
from hookline.model.names import BPFFS

__all__ = ["FOLDER", "UserObject", "listed", "load", "unload"]

FOLDER = BPFFS / "host" / "objects"
_NAME = re.compile(r"[A-Za-z0-9_-]{1,63}")
_CLSACT = "clsact:"
_TRAFFIC_CONTROL = {"tc": "auto", "tcx": "tcx", "clsact": "clsact"}


@dataclass(frozen=True)
class UserObject:
    """A loaded object.

    Attributes:
        name: Its own.
        folder: Where it is pinned.
        programs: The names of its programs.
        maps: The names of its maps, as they are pinned.
        links: The pins of its links and filters.
    """

    name: str
    folder: Path
    programs: tuple[str, ...]
    maps: tuple[str, ...]
    links: tuple[str, ...]


@dataclass(frozen=True)
class _Wanted:
    program: bpf.Program
    target: str


def load(
    path: str | os.PathLike[str],
    attach: Sequence[str] = (),
    *,
    programs: Sequence[str] = (),
    name: str = "",
    folder: Path | None = None,
) -> UserObject:
    """Load an object, attach its programs, and pin everything. On failure nothing stays behind.

    Args:
        path: The ``.bpf.o`` file.
        attach: ``KIND:WHERE`` for the one program whose type it fits, or ``PROGRAM=KIND:WHERE``.
        programs: Which programs to load; all where it is empty.
        name: What to call it; the file's name where it is empty.
        folder: Where to pin it, in place of `FOLDER` and the name.

    Raises:
        Conflict: Something of that name is loaded.
        ControlError: A target fits no program, or several.
        NotPermitted: A capability is missing.
        BpfError: The object cannot be loaded, or not attached so that it outlives this process.
    """
    _check_rights(f"cannot load {path}")
    name = name or re.sub(r"[^A-Za-z0-9_-]", "_", Path(path).name.removesuffix(".o").removesuffix(".bpf"))
    if folder is None:
        folder = FOLDER / _checked(name)
    with bpf.Object.open(path) as opened:
        if programs:
            opened.only(*programs)
        chosen = {title: one for title, one in opened.programs.items() if not programs or title in programs}
        wanted = [_wanted(chosen, text) for text in attach]
        bpf.ensure_bpffs()
        if folder.is_dir():
            raise Conflict(
                f"{name} is loaded already",
                why=f"{folder} is there",
                remedy=f"hookline programs unload {name}, or load it by another --name",
            )
        opened.load()
        try:
            return _pin_all(opened, chosen, wanted, name, folder)
        except BaseException:
            with contextlib.suppress(bpf.BpfError, OSError):
                _remove(folder)
            raise


def unload(name: str) -> UserObject:
    """Detach the programs of an object and remove its pins. What else holds its programs or maps keeps them.

    Args:
        name: Its name, or the folder of its pins.

    Raises:
        NotThere: None of that name is loaded.
        NotPermitted: A capability is missing.
    """
    _check_rights(f"cannot unload {name}")
    folder = Path(name) if "/" in name else FOLDER / _checked(name)
    if not folder.is_dir():
        loaded = ", ".join(one.name for one in listed())
        raise NotThere(
            f"no object {name!r} is loaded",
            remedy=f"there are {loaded}" if loaded else "there is none at all",
            why=f"nothing of that name is pinned below {FOLDER}"
            if "/" not in name
            else "there is no such folder",
        )
    found = _described(folder)
    if not (found.programs or found.maps or found.links) and any(folder.iterdir()):
        raise NotThere(
            f"{folder} holds no object",
            why="it has none of programs, maps and links",
            remedy="hookline programs list --mine shows what is pinned, and where",
        )
    _remove(folder)
    return found


def listed() -> Iterator[UserObject]:
    """Every loaded object of this node."""
    if FOLDER.is_dir():
        for folder in sorted(FOLDER.iterdir()):
            yield _described(folder)


def _checked(name: str) -> str:
    if not _NAME.fullmatch(name):
        raise ControlError(
            f"{name!r} cannot be an object's name",
            why="it is 1 to 63 letters, digits, underscores and hyphens",
            remedy="give it another: --name counter",
        )
    return name


def _places(programs: dict[str, bpf.Program]) -> str:
    """Where the first program that has places can be attached."""
    found = ((name, form) for name, one in programs.items() for form in bpf.target_forms(one.type))
    return next((f"write for example {name}={form}" for name, form in found), "attach nothing: load it alone")


def _wanted(programs: dict[str, bpf.Program], text: str) -> _Wanted:
    """Which program a specification means."""
    title, equals, target = text.partition("=")
    if equals and "/" not in title and ":" not in title:
        if title not in programs:
            raise ControlError(
                f"there is no program {title!r}",
                remedy=f"there are {', '.join(programs)}",
                why="the object has none of this name, or --program leaves it out",
            )
        return _Wanted(programs[title], target)
    kind = text.partition(":")[0]
    types = bpf.target_types(text)
    fitting = [one for one in programs.values() if one.type in types]
    if len(fitting) == 1:
        return _Wanted(fitting[0], text)
    if not fitting:
        has = ", ".join(f"{name} ({one.type})" for name, one in programs.items())
        raise ControlError(
            f"no program can be attached to {text}",
            why=f"{kind} takes {' or '.join(types)}, and there are {has}",
            remedy=_places(programs),
        )
    raise ControlError(
        f"{text} could be for {', '.join(one.name for one in fitting)}",
        remedy=f"say which: {fitting[0].name}={text}",
        why="several programs are of the type that it takes",
    )


def _pin_all(
    opened: bpf.Object, programs: dict[str, bpf.Program], wanted: Sequence[_Wanted], name: str, folder: Path
) -> UserObject:
    bpf.pin.directory(folder)
    for title, program in programs.items():
        program.pin(folder / "programs" / _safe(title))
    for title, one in opened.maps.items():
        one.pin(folder / "maps" / _safe(title.lstrip(".")))
    for number, one_wanted in enumerate(wanted):
        _attach(one_wanted, folder / "links", number)
    return _described(folder)


def _attach(wanted: _Wanted, folder: Path, number: int) -> None:
    """Attach a program, so that it stays."""
    program, target = wanted.program, wanted.target
    kind, _, where = target.partition(":")
    interface, _, direction = where.partition(":")
    if kind in _TRAFFIC_CONTROL and direction in ("ingress", "egress"):
        # A filter on clsact belongs to the interface: its pin comes first, and says where the filter is.
        place = folder / f"{_CLSACT}{_safe(interface)}:{direction}:{_safe(program.name)}"
        bpf.pin.directory(folder)
        made = program.attach_tc(interface, direction, hook=_TRAFFIC_CONTROL[kind], pin=place)  # type: ignore[arg-type]
        if isinstance(made, bpf.Link):
            # It was tcx after all, whose link needs no such name.
            made.unpin()
            _pin(made, folder / f"{_safe(program.name)}-{number}")
        made.close()
        return
    link = program.attach(target)
    _pin(link, folder / f"{_safe(program.name)}-{number}")
    link.close()


def _pin(link: bpf.Link | bpf.ClsactFilter | bpf.LinkGroup, place: Path) -> None:
    """Pin what was attached; where that cannot be, take it off again."""
    try:
        link.pin(place)
    except BaseException:
        link.detach()
        link.close()
        raise


def _described(folder: Path) -> UserObject:
    def inside(part: str) -> tuple[str, ...]:
        return tuple(path.name for path in _entries(folder / part))

    return UserObject(folder.name, folder, inside("programs"), inside("maps"), inside("links"))


def _remove(folder: Path) -> None:
    """Detach and unpin what is below a folder, and remove it."""
    for path in _entries(folder / "links"):
        if path.is_dir():
            bpf.LinkGroup.from_pin(path).detach()
        elif path.name.startswith(_CLSACT):
            _remove_filter(path)
        else:
            with bpf.Link.from_pin(path) as link:
                link.detach()
    for part in ("links", "programs", "maps"):
        for path in _entries(folder / part):
            bpf.pin.remove(path)
        with contextlib.suppress(FileNotFoundError):
            (folder / part).rmdir()
    with contextlib.suppress(FileNotFoundError):
        folder.rmdir()
    if folder.parent == FOLDER:
        # The folders of this node go with the last thing in them.
        with contextlib.suppress(OSError):
            for parent in (FOLDER, *FOLDER.parents[:2]):
                parent.rmdir()


def _remove_filter(path: Path) -> None:
    _, interface, direction, _ = path.name.split(":", 3)
    try:
        found = bpf.ClsactFilter.from_pin(path, interface.replace(",", "."), direction)  # type: ignore[arg-type]
    except bpf.BpfError as error:
        # The filter is gone, or its interface: nothing is left but the pin.
        if error.errno not in (errno.ENOENT, errno.ENODEV):
            raise
    else:
        found.detach()


def _check_rights(what: str) -> None:
    if bpf.lacking("CAP_BPF"):
        raise bpf.NotPermitted(what, capability="CAP_BPF CAP_NET_ADMIN CAP_PERFMON")


def _entries(folder: Path) -> list[Path]:
    return sorted(folder.iterdir()) if folder.is_dir() else []


def _safe(name: str) -> str:
    return name.replace(".", ",")
