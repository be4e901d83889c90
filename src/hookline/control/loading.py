"""What a change is given: resources from files, and the sources that it speaks for."""

from __future__ import annotations

import os
from collections.abc import Iterable, Sequence
from dataclasses import dataclass

from hookline.model import Resource
from hookline.sources import files

PathLike = str | os.PathLike[str]
SHOWN_SOURCES = 5


def load(what: PathLike | Resource | Iterable[PathLike | Resource]) -> list[Resource]:
    """The resources of files and folders, and those given as they are.

    Raises:
        model.InvalidResource: With all that is wrong in all files.
    """
    given = [what] if isinstance(what, str | os.PathLike | Resource) else list(what)
    resources = [item for item in given if isinstance(item, Resource)]
    paths = [item for item in given if not isinstance(item, Resource)]
    return resources + (files.load(paths) if paths else [])


@dataclass(frozen=True, slots=True)
class Covered:
    """The sources that a change with ``prune`` speaks for: files, and whatever was once a file of these folders.

    ``excluded`` are files that it says nothing of, such as broken ones.
    """

    files: frozenset[str]
    folders: frozenset[str] = frozenset()
    excluded: frozenset[str] = frozenset()

    @classmethod
    def of(
        cls, what: PathLike | Resource | Iterable[PathLike | Resource], loaded: Iterable[Resource]
    ) -> Covered:
        """What a change with these paths and resources speaks for."""
        given = [what] if isinstance(what, str | os.PathLike | Resource) else list(what)
        paths = [os.path.abspath(item) for item in given if not isinstance(item, Resource)]
        folders = frozenset(path for path in paths if os.path.isdir(path))
        return cls(frozenset(paths) | {source_of(resource) for resource in loaded}, folders)

    def __contains__(self, source: str) -> bool:
        if source not in self.files and not (self.folders and os.path.dirname(source) in self.folders):
            return False
        return source not in self.excluded


def cause_of_apply(
    what: PathLike | Resource | Iterable[PathLike | Resource], loaded: Iterable[Resource]
) -> str:
    """``apply`` with the paths that were given, else with where the resources came from."""
    given = [what] if isinstance(what, str | os.PathLike | Resource) else what
    paths = (
        [str(item) for item in given if not isinstance(item, Resource)] if isinstance(given, Sequence) else []
    )
    names = dict.fromkeys(paths or (source_of(resource) for resource in loaded))
    shown = list(names)[:SHOWN_SOURCES]
    more = f" and {len(names) - len(shown)} more" if len(names) > len(shown) else ""
    return f"apply {', '.join(shown)}{more}".rstrip()


def source_of(resource: Resource) -> str:
    """What sets a resource: the path of its file."""
    if resource.origin is None:
        return "python"
    path = resource.origin.path
    return path if path == files.STANDARD_INPUT else os.path.abspath(path)
