"""YAML as resources need it: fast, and without YAML 1.1's surprises.

libyaml's events are built into plain values here rather than by PyYAML's constructors: that takes half the
time, and lets a repeated key, an alias that unfolds into millions of values, or a tag be refused with its
line. Plain scalars follow YAML 1.2's core schema: ``on``, ``yes``, ``0777``, ``10:20``, ``1_000`` and dates
are text, as a reader expects of a configuration file. Keys are always text.
"""

from __future__ import annotations

import math
import re
from dataclasses import dataclass
from typing import Any, Final

import yaml
from yaml.events import (
    AliasEvent,
    DocumentStartEvent,
    MappingEndEvent,
    MappingStartEvent,
    ScalarEvent,
    SequenceEndEvent,
    SequenceStartEvent,
    StreamEndEvent,
)

from hookline.model import FieldPath, InvalidResource, Problem

_Parser: Any = getattr(yaml, "CSafeLoader", yaml.SafeLoader)

DEPTH_LIMIT = 64
ALIASED_LIMIT = 100_000
CORE_TAG = "tag:yaml.org,2002:"

_INTEGER = re.compile(r"[-+]?(0|[1-9][0-9]{0,39})|0x[0-9a-fA-F]{1,32}|0o[0-7]{1,40}")
_FLOAT = re.compile(r"[-+]?(\.[0-9]+|(0|[1-9][0-9]*)(\.[0-9]*)?)([eE][-+]?[0-9]+)?")
_WORDS: Final[dict[str, Any]] = {
    **dict.fromkeys(("", "~", "null", "Null", "NULL")),
    **dict.fromkeys(("true", "True", "TRUE"), True),
    **dict.fromkeys(("false", "False", "FALSE"), False),
}


@dataclass(frozen=True)
class Document:
    """A document's plain value, None where it is empty, and the line (from 1) on which that begins.

    Attributes:
        item_lines: The line of each entry of the list under ``items``, where there is one and they are known.
    """

    value: Any
    line: int
    item_lines: tuple[int, ...] = ()


def plain_value(text: str) -> Any:
    """What a scalar without quotes means: null, a switch, a number, or itself."""
    if text in _WORDS:
        return _WORDS[text]
    if text[0] not in "+-.0123456789":
        return text
    if _INTEGER.fullmatch(text):
        return int(text, 0)
    if _FLOAT.fullmatch(text) and len(text) <= 400:
        number = float(text)
        return text if math.isinf(number) else number
    return text


def read_yaml(text: str, path: str) -> list[Document]:
    """The documents of a YAML text, empty ones too.

    Raises:
        InvalidResource: It is not YAML, or not YAML that can describe resources; with line and column.
    """
    try:
        return _Builder(text, path).documents()
    except yaml.YAMLError as error:
        raise InvalidResource(_yaml_problem(error, text, path)) from None


class _PlainValues(dict[str, Any]):
    """`plain_value` with a memory: files repeat their words."""

    def __missing__(self, text: str) -> Any:
        value = self[text] = plain_value(text)
        return value


class _Builder:
    """Builds plain values from a text's events."""

    def __init__(self, text: str, path: str) -> None:
        self._next = _Parser(text).get_event
        self._path = path
        self._plain = _PlainValues()
        self._anchors: dict[str, Any] = {}
        self._sizes: dict[int, int] = {}
        self._aliased = 0
        self._entry_lines: dict[int, tuple[int, ...]] = {}

    def documents(self) -> list[Document]:
        found: list[Document] = []
        while type(event := self._next()) is not StreamEndEvent:
            if type(event) is DocumentStartEvent:
                self._anchors.clear()
                self._sizes.clear()
                first = self._next()
                value = self._value(first, 1)
                items = value.get("items") if isinstance(value, dict) else None
                found.append(Document(value, first.start_mark.line + 1, self._entry_lines.pop(id(items), ())))
                self._entry_lines.clear()
        return found

    def _value(self, event: Any, depth: int) -> Any:
        kind = type(event)
        if kind is ScalarEvent:
            if event.implicit[0]:
                value = self._plain[event.value]
            elif event.implicit[1]:
                value = event.value
            else:
                value = self._tagged(event)
        elif kind is MappingStartEvent:
            value = self._mapping(event, depth)
        elif kind is SequenceStartEvent:
            value = self._sequence(event, depth)
        else:
            return self._alias(event)
        if event.anchor is not None:
            self._anchors[event.anchor] = value
        return value

    def _mapping(self, start: Any, depth: int) -> dict[str, Any]:
        self._check_collection(start, depth, "map")
        result: dict[str, Any] = {}
        merged: list[dict[str, Any]] = []
        following, build, plain = self._next, self._value, self._plain
        while type(event := following()) is not MappingEndEvent:
            if type(event) is not ScalarEvent:
                raise self._refused(event, "a key is text, and here it is not", "")
            key = event.value
            if event.anchor is not None:
                self._anchors[event.anchor] = key
            if key == "<<" and event.implicit[0]:
                merged += self._merged(event, depth)
                continue
            if key in result:
                raise self._refused(
                    event, f"the key {key[:60]!a} is given twice in one mapping", "keep one of them"
                )
            event = following()
            # The common case of _value(), kept here: it saves a call for most of a file's nodes.
            if (
                type(event) is ScalarEvent
                and event.anchor is None
                and (event.implicit[0] or event.implicit[1])
            ):
                result[key] = plain[event.value] if event.implicit[0] else event.value
            else:
                result[key] = build(event, depth + 1)
        for other in merged:
            for key, value in other.items():
                result.setdefault(key, value)
        return result

    def _merged(self, key: Any, depth: int) -> list[dict[str, Any]]:
        value = self._value(self._next(), depth + 1)
        others = value if isinstance(value, list) else [value]
        if not all(isinstance(other, dict) for other in others):
            raise self._refused(key, "<< takes in mappings, and this is none", "")
        return others

    def _sequence(self, start: Any, depth: int) -> list[Any]:
        self._check_collection(start, depth, "seq")
        result = []
        lines = []
        following, build = self._next, self._value
        while type(event := following()) is not SequenceEndEvent:
            if depth == 2:
                lines.append(event.start_mark.line + 1)
            result.append(build(event, depth + 1))
        if depth == 2:
            self._entry_lines[id(result)] = tuple(lines)
        return result

    def _check_collection(self, start: Any, depth: int, tag: str) -> None:
        if depth > DEPTH_LIMIT:
            raise self._refused(start, f"nested more than {DEPTH_LIMIT} deep", "")
        if not start.implicit and start.tag not in (None, "!", CORE_TAG + tag):
            raise self._refused(
                start, f"the tag {start.tag[:60]!a} has no meaning in a resource", "remove it"
            )

    def _tagged(self, event: Any) -> Any:
        text, tag = event.value, event.tag
        if tag == CORE_TAG + "str":
            return text
        value = self._plain[text]
        wanted = {"int": int, "float": float, "bool": bool, "null": type(None)}.get(
            tag.removeprefix(CORE_TAG)
        )
        if wanted is float and type(value) is int:
            return float(value)
        if wanted is None or type(value) is not wanted:
            raise self._refused(event, f"the tag {tag[:60]!a} has no meaning here", "remove it")
        return value

    def _alias(self, event: Any) -> Any:
        if type(event) is not AliasEvent or event.anchor not in self._anchors:
            raise self._refused(event, f"the alias *{event.anchor} stands for nothing before it", "")
        value = self._anchors[event.anchor]
        self._aliased += self._size(value)
        if self._aliased > ALIASED_LIMIT:
            raise self._refused(
                event, f"the aliases unfold into more than {ALIASED_LIMIT} values", "write the values out"
            )
        return value

    def _size(self, value: Any) -> int:
        """How many values an alias unfolds into. Containers are known by identity."""
        if not isinstance(value, dict | list):
            return 1
        known = self._sizes.get(id(value))
        if known is None:
            inner = value.values() if isinstance(value, dict) else value
            known = self._sizes[id(value)] = 1 + sum(self._size(one) for one in inner)
        return known

    def _refused(self, event: Any, why: str, remedy: str) -> InvalidResource:
        mark = event.start_mark
        return InvalidResource(
            Problem(why, remedy=remedy, place=f"{self._path}:{mark.line + 1}:{mark.column + 1}")
        )


def _yaml_problem(error: yaml.YAMLError, text: str, path: str) -> Problem:
    """libyaml's complaint with the line that it stumbled over."""
    if not isinstance(error, yaml.MarkedYAMLError) or error.problem_mark is None:
        position = getattr(error, "position", None)
        line = text.count("\n", 0, position) + 1 if isinstance(position, int) else 1
        reason = getattr(error, "reason", None) or str(error)
        return Problem(
            f"not valid YAML: {reason}",
            remedy="mend the file there; until then nothing of it is applied",
            place=f"{path}:{line}",
        )
    mark = error.problem_mark
    lines = text.splitlines() or [""]
    # A text that ends too early is broken after its last line; that line's end says more.
    line, column = (mark.line, mark.column) if mark.line < len(lines) else (len(lines) - 1, len(lines[-1]))
    broken = lines[line]
    indent = broken[: len(broken) - len(broken.lstrip())]
    place = f"{path}:{line + 1}:{column + 1}"
    if "\t" in indent:
        return Problem(
            "not valid YAML: a tab indents this line",
            remedy="YAML indents with spaces: replace the tab",
            place=place,
        )
    why = f"not valid YAML: {error.problem or 'it cannot be read'}"
    if error.context:
        why += f" {error.context}"
        if error.context_mark is not None and error.context_mark.line != line:
            why += f" that begins on line {error.context_mark.line + 1}"
    shown = broken.strip()[:60]
    return Problem(
        why + (f", at {shown!r}" if shown.isprintable() and shown else ""),
        remedy="mend the file there; until then nothing of it is applied",
        place=place,
    )


class Lines:
    """The lines of a text's fields, found by reading it once more when the first is asked for."""

    def __init__(self, text: str) -> None:
        self._text = text
        self._roots: list[Any] | None = None

    def line_of(self, index: int, field: FieldPath, otherwise: int) -> int:
        """The line of a document's field, or of its nearest parent that is written there."""
        if self._roots is None:
            try:
                self._roots = list(yaml.compose_all(self._text, Loader=_Parser))
            except yaml.YAMLError:
                self._roots = []  # JSON that is not quite YAML
        if index >= len(self._roots):
            return otherwise
        node, line = self._roots[index], otherwise
        for step in field:
            if isinstance(node, yaml.MappingNode) and isinstance(step, str):
                found = [(key, value) for key, value in node.value if key.value == step]
                if not found:
                    break
                key, node = found[0]
                line = key.start_mark.line + 1
            elif isinstance(node, yaml.SequenceNode) and isinstance(step, int) and step < len(node.value):
                node = node.value[step]
                line = node.start_mark.line + 1
            else:
                break
        return line
