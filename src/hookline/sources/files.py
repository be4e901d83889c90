"""Resources from files: YAML or JSON, several documents to a file, ``kind: List``, folders, standard input.

`load` reads everything before it complains, so that one error names all that is wrong in all files. The line
of a wrong field is looked up only then.
"""

from __future__ import annotations

import os
import sys
from collections.abc import Iterable, Sequence
from pathlib import Path
from typing import Any, BinaryIO

import yaml

from hookline.model import FieldPath, InvalidResource, Origin, Problem, Resource, parse
from hookline.sources._json import read_json
from hookline.sources._yaml import Document, Lines, plain_value, read_yaml

STANDARD_INPUT = "standard input"
SUFFIXES = (".yaml", ".yml", ".json")
SIZE_LIMIT = 64 << 20

__all__ = ["dump", "load", "loads", "read"]


def load(paths: Iterable[str | os.PathLike[str]], *, stdin: BinaryIO | None = None) -> list[Resource]:
    """The resources of files and folders, in the order given.

    Args:
        paths: Files, folders (their ``*.yaml``, ``*.yml`` and ``*.json``, sorted; no subfolders), ``-``.
        stdin: What ``-`` reads, in place of the process's standard input.

    Returns:
        Resources whose `origin` says where each was read.

    Raises:
        InvalidResource: With every problem of every file.
    """
    resources: list[Resource] = []
    problems: list[Problem] = []
    for path in paths:
        try:
            given = os.fspath(path)
            if given == "-":
                data = _read(stdin or sys.stdin.buffer, STANDARD_INPUT)
                resources += _resources(data, STANDARD_INPUT, is_json=False, problems=problems)
            elif os.path.isdir(given):
                resources += _load_folder(given, problems)
            else:
                resources += _resources(_read_file(given), given, is_json=_is_json(given), problems=problems)
        except InvalidResource as error:
            problems += error.problems
    problems += _said_twice(resources)
    if problems:
        raise InvalidResource(problems)
    return resources


def read(path: str, *, may_be_empty: bool = False) -> list[Resource]:
    """The resources of one file.

    Args:
        path: The file.
        may_be_empty: Comments alone are no resource, and no mistake; without a byte it is one all the same.

    Raises:
        InvalidResource: With every problem of it.
    """
    problems: list[Problem] = []
    data = _read_file(path)
    resources = _resources(
        data, path, is_json=_is_json(path), problems=problems, may_be_empty=may_be_empty and bool(data)
    )
    problems += _said_twice(resources)
    if problems:
        raise InvalidResource(problems)
    return resources


def loads(text: str | bytes, path: str = "text", *, is_json: bool = False) -> list[Resource]:
    """The resources of a text, as `load` reads a file's; ``path`` is what errors call it."""
    problems: list[Problem] = []
    data = text.encode("utf-8", "surrogatepass") if isinstance(text, str) else text
    resources = _resources(data, path, is_json=is_json, problems=problems)
    problems += _said_twice(resources)
    if problems:
        raise InvalidResource(problems)
    return resources


def dump(resources: Iterable[Resource]) -> str:
    """The resources as YAML documents that `load`, and any YAML 1.1 or 1.2 reader, reads back as the same."""
    return yaml.dump_all(
        (resource.to_document() for resource in resources),
        Dumper=_Dumper,
        sort_keys=False,
        allow_unicode=True,
        width=110,
    )


class _Dumper(yaml.SafeDumper):
    """Quotes text that either this reader or a YAML 1.1 reader would take for a number or a switch."""

    def ignore_aliases(self, data: Any) -> bool:
        return True


def _represent_text(dumper: yaml.SafeDumper, text: str) -> yaml.ScalarNode:
    style = None if isinstance(plain_value(text), str) else "'"
    return dumper.represent_scalar("tag:yaml.org,2002:str", text, style=style)


_Dumper.add_representer(str, _represent_text)


def _load_folder(folder: str, problems: list[Problem]) -> list[Resource]:
    try:
        names = sorted(os.listdir(folder))
    except OSError as error:
        raise _unreadable(folder, error) from None
    resources: list[Resource] = []
    before = len(problems)
    for name in names:
        path = os.path.join(folder, name)
        if name.startswith(".") or not name.endswith(SUFFIXES) or os.path.isdir(path):
            continue
        try:
            resources += _resources(
                _read_file(path), path, is_json=_is_json(path), problems=problems, may_be_empty=True
            )
        except InvalidResource as error:
            problems += error.problems
    if not resources and len(problems) == before:
        inner = any(os.path.isdir(os.path.join(folder, name)) for name in names)
        raise InvalidResource(
            Problem(
                "the folder holds no resource in a *.yaml, *.yml or *.json file",
                remedy="its subfolders are not read: name them" if inner else "",
                place=folder,
            )
        )
    return resources


def _is_json(path: str) -> bool:
    return path.endswith(".json")


def _read_file(path: str) -> bytes:
    try:
        with Path(path).open("rb") as file:
            return _read(file, path)
    except OSError as error:
        raise _unreadable(path, error) from None
    except ValueError:
        raise InvalidResource(Problem("the name holds a zero byte", place=repr(path))) from None


def _read(file: BinaryIO, path: str) -> bytes:
    data = file.read(SIZE_LIMIT + 1)
    if len(data) > SIZE_LIMIT:
        raise InvalidResource(
            Problem(f"the file is larger than {SIZE_LIMIT >> 20} MiB", remedy="split it", place=path)
        )
    return data


def _unreadable(path: str, error: OSError) -> InvalidResource:
    match error:
        case FileNotFoundError():
            why, remedy = "there is no such file", "check the path"
        case PermissionError():
            why, remedy = "this user may not read it", "run as a user who may, or change its mode"
        case _:
            why, remedy = f"it cannot be read: {(error.strerror or str(error)).lower()}", ""
    return InvalidResource(Problem(why, remedy=remedy, place=path))


def _resources(
    data: bytes, path: str, *, is_json: bool, problems: list[Problem], may_be_empty: bool = False
) -> list[Resource]:
    """A file's resources; problems of single documents are added to the list, the file's own are raised."""
    try:
        text = data.decode("utf-8-sig")
    except UnicodeDecodeError as error:
        line = data.count(b"\n", 0, error.start) + 1
        raise InvalidResource(
            Problem(
                f"not UTF-8 text: byte {data[error.start]:#04x}",
                remedy="save it as UTF-8",
                place=f"{path}:{line}",
            )
        ) from None
    documents = read_json(text, path) if is_json else read_yaml(text, path)
    lines = Lines(text)
    resources = []
    for index, document in enumerate(documents):
        if document.value is None:
            continue
        for field, value, line in _expanded(document):
            try:
                resources.append(
                    parse(value, Origin(path, line), locate=_Locator(lines, index, field, line).line_of)
                )
            except InvalidResource as error:
                problems += error.problems
    if not may_be_empty and all(document.value is None for document in documents):
        raise InvalidResource(
            Problem(
                "the file holds no resource",
                remedy="write one with apiVersion, kind and metadata",
                place=path,
            )
        )
    return resources


def _expanded(document: Document) -> list[tuple[FieldPath, Any, int]]:
    """A document, or a ``kind: List``'s items, each with its path in the document and its line."""
    value = document.value
    if not (isinstance(value, dict) and value.get("kind") == "List" and isinstance(value.get("items"), list)):
        return [((), value, document.line)]
    lines = document.item_lines
    if len(lines) != len(value["items"]):  # JSON, or a list that stands elsewhere and is taken in by an alias
        lines = (document.line,) * len(value["items"])
    return [
        (("items", position), item, line)
        for position, (item, line) in enumerate(zip(value["items"], lines, strict=True))
    ]


class _Locator:
    """Finds the lines of one document's fields."""

    def __init__(self, lines: Lines, index: int, prefix: FieldPath, line: int) -> None:
        self._lines = lines
        self._index = index
        self._prefix = prefix
        self._line = line

    def line_of(self, field: FieldPath) -> int:
        if not field:
            return self._line
        return self._lines.line_of(self._index, self._prefix + field, self._line)


def _said_twice(resources: Sequence[Resource]) -> list[Problem]:
    """A problem for every object that an earlier document has already described."""
    first: dict[str, Resource] = {}
    problems = []
    for resource in resources:
        earlier = first.setdefault(resource.reference, resource)
        if earlier is not resource:
            problems.append(
                Problem(
                    f"the same object is already at {earlier.origin}",
                    remedy="keep one of them",
                    place=str(resource.origin),
                    reference=resource.reference,
                )
            )
    return problems
