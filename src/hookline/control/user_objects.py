"""Objects of users: loaded and attached by a command that ends, so everything is pinned.

Below ``…/host/objects/NAME/`` are ``programs/PROGRAM``, ``maps/MAP`` and ``links/PROGRAM-NUMBER``. A filter on clsact
has no link: its pin holds the program, and is called ``clsact:INTERFACE:DIRECTION:PROGRAM:NAMESPACE:INDEX``, by the inode
of its network namespace and the interface's number there. bpffs refuses dots in names: ``.bss`` is pinned as ``bss``, and
``eth0.5`` is written ``eth0,5``.

What is called NAME is complete. An object is made, and taken apart, as ``~NAME``: one rename makes it appear or go. All
of this is done under a lock on the folder that both are in, which the kernel lets go of with its process; so a ``~NAME``
that one finds under the lock is what a killed process has left, and the next `load` or `unload` of the name clears it away,
attachments and all. Whatever fails halfway removes its own.

A filter is only ever removed where it holds the very program that is pinned, in the namespace of the pin's name. Folders
that `load` made on the way to another place are marked by the sticky bit, and go when they are empty.
"""

from __future__ import annotations

import contextlib
import errno
import fcntl
import os
import re
import socket
import time
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path

from hookline import bpf, net
from hookline.control._errors import Conflict, ControlError, NotThere
from hookline.model.names import BPFFS

__all__ = ["FOLDER", "UserObject", "listed", "load", "unload"]

FOLDER = BPFFS / "host" / "objects"
_NAME = re.compile(r"[A-Za-z0-9_][A-Za-z0-9_-]{0,62}")
_PARTS = ("links", "programs", "maps")
_CLSACT = "clsact:"
_HALF = "~"
_MADE_HERE = 0o1700
_WAIT_SECONDS, _POLL_SECONDS = 30.0, 0.02
# How long the kernel may take to take a network namespace apart that nothing refers to.
_VANISHING_SECONDS = 3.0
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
        complete: False while it is loaded or unloaded, and for what is left where that was killed.
    """

    name: str
    folder: Path
    programs: tuple[str, ...]
    maps: tuple[str, ...]
    links: tuple[str, ...]
    complete: bool = True


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
        Conflict: Something of that name is loaded, or another load or unload does not end.
        ControlError: A target fits no program, or several.
        NotPermitted: A capability is missing.
        BpfError: The object cannot be loaded, or not attached so that it outlives this process.
    """
    _check_rights(f"cannot load {path}")
    name = name or re.sub(r"^-|[^A-Za-z0-9_-]", "_", Path(path).name.removesuffix(".o").removesuffix(".bpf"))
    if folder is None:
        folder = FOLDER / _checked(name)
    elif folder.name.startswith(_HALF):
        raise ControlError(
            f"cannot pin at {folder}", why=f"{_HALF} is for what is half loaded", remedy="name it otherwise"
        )
    with bpf.Object.open(path) as opened:
        if programs:
            opened.only(*programs)
        chosen = {title: one for title, one in opened.programs.items() if not programs or title in programs}
        wanted = [_wanted(chosen, text) for text in attach]
        bpf.pin.check_lasting(folder)
        bpf.ensure_bpffs()
        _check_free(folder, name)
        opened.load()
        with _alone(folder.parent):
            half = _half(folder)
            try:
                _check_free(folder, name)
                _remove(half)  # what a killed one has left
                _pin_all(opened, chosen, wanted, half)
                half.rename(folder)
            except BaseException:
                with contextlib.suppress(bpf.BpfError, OSError):
                    _remove(half)
                    _remove_parents(folder)
                raise
        return _described(folder)


def unload(name: str) -> UserObject:
    """Detach the programs of an object and remove its pins. What else holds its programs or maps keeps them.

    Args:
        name: Its name, or the folder of its pins.

    Raises:
        NotThere: None of that name is loaded.
        NotPermitted: A capability is missing.
        ControlError: A filter is in a network namespace that cannot be found. All else is unloaded.
        Conflict: Another load or unload does not end.
    """
    _check_rights(f"cannot unload {name}")
    folder = Path(name).absolute() if "/" in name else FOLDER / _checked(name)
    half = _half(folder)
    _check_there(folder, name)
    with _alone(folder.parent):
        _check_there(folder, name)
        found = _described(folder if folder.is_dir() else half)
        if folder.is_dir():
            folder.rename(half)
        _remove(half)
        _remove_parents(folder)
    return found


def listed() -> Iterator[UserObject]:
    """Every loaded object of this node, and what is left of those whose load or unload was killed."""
    with contextlib.suppress(PermissionError):
        for folder in _entries(FOLDER):
            yield _described(folder)


def _checked(name: str) -> str:
    if not _NAME.fullmatch(name):
        raise ControlError(
            f"{name!r} cannot be an object's name",
            why="it is 1 to 63 letters, digits, underscores and hyphens, the first no hyphen",
            remedy="name it otherwise",
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


def _half(folder: Path) -> Path:
    """Where an object is made and taken apart."""
    return folder.with_name(_HALF + folder.name)


def _check_free(folder: Path, name: str) -> None:
    """Refuse a place that is taken; an empty folder is not."""
    if not folder.exists() or (folder.is_dir() and not any(folder.iterdir())):
        return
    if any((folder / part).is_dir() for part in _PARTS):
        raise Conflict(
            f"{name} is loaded already",
            why=f"{folder} is there",
            remedy=f"hookline programs unload {name if folder.parent == FOLDER else folder}, "
            "or load it by another --name",
        )
    raise Conflict(f"cannot pin at {folder}", why="something else is there", remedy="pin it elsewhere")


def _check_there(folder: Path, name: str) -> None:
    """Refuse what is no object, whole or half."""
    if not folder.is_dir() and not _half(folder).is_dir():
        loaded = ", ".join(one.name for one in listed())
        raise NotThere(
            f"no object {name!r} is loaded",
            remedy=f"there are {loaded}" if loaded else "there is none at all",
            why=f"nothing of that name is pinned below {FOLDER}"
            if "/" not in name
            else "there is no such folder",
        )
    inside = [path.name for path in _entries(folder)]
    if inside and not set(inside) <= set(_PARTS):
        raise NotThere(
            f"{folder} holds no object",
            why=f"it has more than {', '.join(_PARTS)}",
            remedy="hookline programs list --mine shows what is pinned, and where",
        )


@contextlib.contextmanager
def _alone(folder: Path) -> Iterator[None]:
    """Make a folder, and be the only load or unload at work in it.

    Raises:
        Conflict: Another one does not end.
    """
    deadline = time.monotonic() + _WAIT_SECONDS
    while True:
        try:
            _make(folder)
            descriptor = os.open(folder, os.O_RDONLY | os.O_DIRECTORY | os.O_CLOEXEC)
        except (FileNotFoundError, bpf.BpfError) as error:
            if error.errno != errno.ENOENT or time.monotonic() > deadline:
                raise
            continue  # another one has just removed the folder, with the last thing in it
        try:
            _lock(descriptor, folder, deadline)
            if _is_at(descriptor, folder):
                yield
                return
        finally:
            os.close(descriptor)


def _lock(descriptor: int, folder: Path, deadline: float) -> None:
    while True:
        try:
            return fcntl.flock(descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            if time.monotonic() > deadline:
                raise Conflict(
                    f"another load or unload is at work in {folder}",
                    why=f"it has not ended for {_WAIT_SECONDS:g} s",
                    remedy="wait for it, or end it",
                ) from None
            time.sleep(_POLL_SECONDS)


def _is_at(descriptor: int, folder: Path) -> bool:
    """Whether a folder that was opened is still the one of this path."""
    try:
        return os.path.samestat(os.fstat(descriptor), folder.stat())
    except FileNotFoundError:
        return False


def _make(folder: Path) -> None:
    """Make a folder, and mark those on the way that were not there; not this node's, which others use too."""
    if folder == FOLDER:
        bpf.pin.directory(folder)
    for one in reversed([path for path in (folder, *folder.parents) if not path.exists()]):
        bpf.pin.directory(one)
        one.chmod(_MADE_HERE)


def _remove_parents(folder: Path) -> None:
    """Remove the folders above that were made for it, or that are this node's, once nothing is in them."""
    with contextlib.suppress(OSError):
        for parent in folder.parents:
            ours = parent in (FOLDER, *FOLDER.parents[:2])
            if not ours and parent.stat().st_mode & 0o1777 != _MADE_HERE:
                break
            parent.rmdir()


def _pin_all(
    opened: bpf.Object, programs: dict[str, bpf.Program], wanted: Sequence[_Wanted], folder: Path
) -> None:
    bpf.pin.directory(folder)
    for title, program in programs.items():
        program.pin(folder / "programs" / _safe(title))
    for title, one in opened.maps.items():
        one.pin(folder / "maps" / _safe(title.lstrip(".")))
    for number, one_wanted in enumerate(wanted):
        _attach(one_wanted, folder / "links", number)


def _attach(wanted: _Wanted, folder: Path, number: int) -> None:
    """Attach a program, so that it stays."""
    program, target = wanted.program, wanted.target
    kind, _, where = target.partition(":")
    interface, _, direction = where.partition(":")
    if kind in _TRAFFIC_CONTROL and direction in ("ingress", "egress"):
        # A filter on clsact belongs to the interface: its pin comes first, and says where the filter is.
        words = (
            _safe(interface),
            direction,
            _safe(program.name),
            str(net.own_number()),
            str(_index(interface)),
        )
        place = folder / (_CLSACT + ":".join(words))
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

    complete = not folder.name.startswith(_HALF)
    name = folder.name.removeprefix(_HALF)
    return UserObject(name, folder, inside("programs"), inside("maps"), inside("links"), complete)


def _remove(folder: Path) -> None:
    """Detach and unpin what is below a folder, and remove it. One that is not there is no error.

    Raises:
        ControlError: A filter is in a network namespace that cannot be found; its pin stays, alone.
    """
    hidden = []
    for path in _entries(folder / "links"):
        if path.is_dir():
            bpf.LinkGroup.from_pin(path).detach()
        elif not path.name.startswith(_CLSACT):
            with bpf.Link.from_pin(path) as link:
                link.detach()
        elif not _remove_filter(path):
            hidden.append(path)
    for part in _PARTS:
        for path in _entries(folder / part):
            if path not in hidden:
                bpf.pin.remove(path)
    for path in hidden:
        _forget_filter(path, folder)
    for empty in (*(folder / part for part in _PARTS), folder):
        with contextlib.suppress(FileNotFoundError):
            empty.rmdir()


def _remove_filter(path: Path) -> bool:
    """Remove a pinned filter; False where its network namespace cannot be found."""
    _, _, direction, _, namespace, index = path.name.split(":")
    where = None
    if int(namespace) != net.own_number():
        try:
            where = net.find(int(namespace))
        except net.NetworkNotPermitted:
            return False
        if where is None:
            return False
    with net.inside(where):
        try:
            found = bpf.ClsactFilter.from_pin(path, int(index), direction)  # type: ignore[arg-type]
        except bpf.BpfError as error:
            # The filter is gone, or its interface: nothing is left but the pin.
            if error.errno not in (errno.ENOENT, errno.ENODEV):
                raise
        else:
            found.detach()
    return True


def _forget_filter(path: Path, folder: Path) -> None:
    """Remove the pin of a filter whose network namespace cannot be found, if that namespace is gone.

    It is gone if nothing holds the program once this pin does not.
    """
    _, interface, direction, _, namespace, _ = path.name.split(":")
    with bpf.Program.from_pin(path) as program:
        number = program.id
    bpf.Program.from_id(number).close()  # who may not ask later must not begin
    bpf.pin.remove(path)
    deadline = time.monotonic() + _VANISHING_SECONDS
    while True:
        try:
            alive = bpf.Program.from_id(number)
        except bpf.BpfError as error:
            if error.errno != errno.ENOENT:
                raise
            return
        with alive:
            if time.monotonic() > deadline:
                alive.pin(path)
                name = folder.name.removeprefix(_HALF)
                whole = name if folder.parent == FOLDER else folder.with_name(name)
                raise ControlError(
                    f"the filter on {interface}'s {direction} cannot be removed; all else of {name} is unloaded",
                    why=f"it is in the network namespace net:[{namespace}], which has no name in /run/netns and no "
                    "process that can be seen",
                    remedy=f"unload it from inside: nsenter --net=FILE hookline programs unload {whole}",
                )
        time.sleep(_POLL_SECONDS)


def _index(interface: str) -> int:
    """The number of an interface here; 0 where it is absent, which attaching says better."""
    try:
        return socket.if_nametoindex(interface)
    except OSError:
        return 0


def _check_rights(what: str) -> None:
    if bpf.lacking("CAP_BPF"):
        raise bpf.NotPermitted(what, capability="CAP_BPF CAP_NET_ADMIN CAP_PERFMON")


def _entries(folder: Path) -> list[Path]:
    return sorted(folder.iterdir()) if folder.is_dir() else []


def _safe(name: str) -> str:
    return name.replace(".", ",")
