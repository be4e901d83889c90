"""What is loaded, as commands name and describe it: programs and maps by id, name or pin, and their documents for ``--json``."""

from __future__ import annotations

import contextlib
import os
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any, Protocol, TypeVar

from hookline.cli._errors import UsageError
from hookline.errors import HooklineError

if TYPE_CHECKING:
    from pathlib import Path

    from hookline.bpf import Holder, LinkInfo, Map, MapDefinition, Placement, Program, ProgramInfo

Document = dict[str, Any]

# The kernel keeps this much of a name.
NAME_LENGTH = 15
_SHOWN = 10
_LONGEST_ID = 10


class _Listed(Protocol):
    @property
    def id(self) -> int: ...
    @property
    def name(self) -> str: ...


_Any = TypeVar("_Any", bound=_Listed)


def open_program(text: str) -> Program:
    """The program that a person means: by id, name or pin.

    Raises:
        UsageError: It is a number that no id can be.
        HooklineError: No program is called so, or several are.
    """
    from hookline import bpf

    if "/" in text:
        return bpf.Program.from_pin(text)
    return bpf.Program.from_id(_number(text) if text.isdecimal() else _only(bpf.programs(), text, "program"))


def open_map(text: str) -> Map:
    """The map that a person means; as `open_program`."""
    from hookline import bpf

    if "/" in text:
        return bpf.Map.from_pin(text)
    return bpf.Map.from_id(_number(text) if text.isdecimal() else _only(bpf.maps(), text, "map"))


def _number(text: str) -> int:
    """An id, if it can be one."""
    number = int(text) if len(text) <= _LONGEST_ID else 0
    if not 0 < number < 1 << 32:
        raise UsageError(
            f"{text} cannot be an id",
            why=f"the kernel's ids are 1 to {(1 << 32) - 1}",
            remedy="hookline programs list and hookline maps list show them",
        )
    return number


def _only(listed: Iterable[_Any], name: str, what: str) -> int:
    everything = list(listed)
    found = [one.id for one in everything if one.name == name]
    found = found or [one.id for one in everything if one.name == name[:NAME_LENGTH]]
    if len(found) == 1:
        return found[0]
    if found:
        shown = ", ".join(map(str, found[:_SHOWN])) + (", …" if len(found) > _SHOWN else "")
        raise HooklineError(
            f"{len(found)} {what}s are called {name!r}",
            why=f"they have the ids {shown}",
            remedy=f"name one by its id or its pin: hookline {what}s list",
        )
    import difflib

    close = difflib.get_close_matches(name, {one.name for one in everything}, 3)
    raise HooklineError(
        f"no {what} is called {name!r}",
        why=f"{len(everything)} are loaded, and none has this name",
        remedy=f"did you mean {', '.join(close)}?" if close else f"hookline {what}s list shows them",
    )


def complete_program(incomplete: str) -> list[str]:
    """Ids, names and pins of programs."""
    from hookline import bpf

    return _complete(incomplete, bpf.programs, "program")


def complete_map(incomplete: str) -> list[str]:
    """Ids, names and pins of maps."""
    from hookline import bpf

    return _complete(incomplete, bpf.maps, "map")


def complete_user_object(incomplete: str) -> list[str]:
    """Names of the objects that were loaded by ``hookline programs load``."""
    from hookline.control import user_objects

    try:
        return [one.name for one in user_objects.listed() if one.name.startswith(incomplete)]
    except (HooklineError, OSError):
        return []


def _complete(incomplete: str, listed: Callable[[], Iterable[_Any]], kind: str) -> list[str]:
    from hookline import bpf

    try:
        if incomplete.startswith("/"):
            words = [str(path) for key, paths in bpf.pinned().items() if key[0] == kind for path in paths]
        else:
            words = [word for one in listed() for word in (str(one.id), one.name)]
    except (HooklineError, OSError):
        return []
    return sorted({word for word in words if word.startswith(incomplete)})


# -- documents


@dataclass
class Around:
    """What the kernel does not say of a program or map itself: where it is attached and pinned, and by which links."""

    placements: dict[int, list[Placement]] = field(default_factory=dict)
    links: dict[int, list[LinkInfo]] = field(default_factory=dict)
    pins: dict[Any, tuple[Path, ...]] = field(default_factory=dict)
    users: dict[int, list[int]] = field(default_factory=dict)

    @classmethod
    def look(cls, programs: Sequence[ProgramInfo]) -> Around:
        """Ask the whole system."""
        from hookline import bpf

        around = cls(pins=dict(bpf.pinned()))
        for placement in bpf.placements():
            around.placements.setdefault(placement.program_id, []).append(placement)
        for link in bpf.links():
            around.links.setdefault(link.program_id, []).append(link)
        for program in programs:
            for number in program.map_ids:
                around.users.setdefault(number, []).append(program.id)
        return around

    def is_ours(self, program_id: int) -> bool:
        """Whether Hookline pinned the program, or a link of it."""
        from hookline import bpf

        root = bpf.pin.BPFFS / "hookline"
        keys = [("program", program_id), *(("link", link.id) for link in self.links.get(program_id, []))]
        return any(root in path.parents for key in keys for path in self.pins.get(key, ()))


def program_document(info: ProgramInfo, around: Around) -> Document:
    """A program in a list."""
    return {
        "id": info.id,
        "type": info.type,
        "name": info.name,
        "tag": info.tag,
        "loaded_at": int(info.loaded_at),
        "uid": info.uid,
        "gpl_compatible": info.gpl_compatible,
        "instructions": info.instructions,
        "jited_bytes": info.jited_bytes,
        "memory_bytes": info.memory_bytes,
        "map_ids": list(info.map_ids),
        "btf_id": info.btf_id,
        "run_count": info.run_count,
        "run_time_ns": info.run_time_ns,
        "recursion_misses": info.recursion_misses,
        "attached": [placement_document(one) for one in around.placements.get(info.id, [])],
        "pins": [str(path) for path in around.pins.get(("program", info.id), ())],
        "ours": around.is_ours(info.id),
    }


def placement_document(one: Placement) -> Document:
    """Where a program is attached."""
    return {
        "hook": one.hook,
        "target": one.target,
        "detail": one.detail,
        "namespace": one.namespace,
        "link_id": one.link_id,
    }


def program_details(program: Program, around: Around) -> Document:
    """Everything about one program."""
    from hookline import bpf

    info = program.info
    held = bpf.holders()
    document = program_document(info, around)
    document |= {
        "verified_instructions": info.verified_instructions,
        "attach_target": info.attach_target,
        "functions": _functions(program),
        "maps": [_map_brief(number) for number in info.map_ids],
        "links": [
            {
                "id": link.id,
                "type": link.type,
                "pins": [str(path) for path in around.pins.get(("link", link.id), ())],
                "holders": _holders(held.get(("link", link.id), ())),
            }
            for link in around.links.get(info.id, [])
        ],
        "holders": _holders(held.get(("program", info.id), ())),
    }
    return document


def _functions(program: Program) -> list[Document]:

    try:
        code = program.xlated()
    except HooklineError:
        return []  # hidden from this user; everything else is still worth showing
    return [
        {"name": one.name, "prototype": one.prototype, "instructions": one.count} for one in code.functions
    ]


def _holders(holders: Iterable[Holder]) -> list[Document]:
    """The processes that hold something, without this one: it has just opened it to look."""
    return [
        {"process": one.process, "command": one.command, "descriptors": list(one.descriptors)}
        for one in holders
        if one.process != os.getpid()
    ]


def _map_brief(number: int) -> Document:
    from hookline import bpf

    with contextlib.suppress(HooklineError), bpf.Map.from_id(number) as found:
        return {"id": number, "name": found.name, "type": found.type}
    return {"id": number, "name": "?", "type": "?"}


def map_document(definition: MapDefinition, around: Around) -> Document | None:
    """A map in a list; None where it went away meanwhile."""
    from hookline import bpf

    try:
        opened = bpf.Map.from_id(definition.id)
    except bpf.NotPermitted:
        raise
    except bpf.BpfError:
        return None
    with opened:
        return {
            "id": definition.id,
            "type": definition.type,
            "name": definition.name,
            "key_bytes": definition.key_size,
            "value_bytes": definition.value_size,
            "max_entries": definition.max_entries,
            "flags": definition.flags,
            "memory_bytes": opened.memory_bytes,
            "frozen": opened.frozen,
            "btf_id": definition.btf_id,
            "programs": around.users.get(definition.id, []),
            "pins": [str(path) for path in around.pins.get(("map", definition.id), ())],
        }


def places(document: Document) -> str:
    """Where a program is attached, for a table."""
    shown = []
    for one in document["attached"]:
        words = ":".join(word for word in (one["hook"], one["target"], one["detail"]) if word)
        shown.append(f"{words} @{one['namespace']}" if one["namespace"] else words)
    return ", ".join(shown)
