"""What is wrong with a document, and where: `Problem`, and the error that carries them, `InvalidResource`.

A problem names the place (file and line), the object, the field, the offending value and what is allowed,
so that it can be mended without reading anything else.
"""

from __future__ import annotations

import difflib
import re
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass

from hookline.errors import HooklineError

FieldPath = tuple[str | int, ...]
"""The way to a field from its document's root: ``("spec", "ports", 0, "port")``."""

Locate = Callable[[FieldPath], int]
"""Finds the line (from 1) on which a field of the document stands, or its nearest parent."""

LINES_SHOWN = 20
TEXT_SHOWN = 60
PLAIN_KEY = re.compile(r"[A-Za-z0-9_-]{1,63}")


@dataclass(frozen=True)
class Origin:
    """Where a document was read: a file (or "standard input") and the line, from 1, on which it begins."""

    path: str
    line: int = 1

    def __str__(self) -> str:
        return f"{self.path}:{self.line}"


@dataclass(frozen=True)
class Problem:
    """One thing that is wrong.

    Args:
        why: The offending value and what is allowed, one plain sentence.
        remedy: What to write instead, where that is known.
        place: ``file:line``, ``file:line:column`` or empty.
        reference: The object, as far as its document names it.
        field: The field, such as ``spec.ports[0].port``, or empty for the document itself.
        path: The same, step by step.
    """

    why: str
    remedy: str = ""
    place: str = ""
    reference: str = ""
    field: str = ""
    path: FieldPath = ()

    @property
    def what(self) -> str:
        """The place, the object and the field, ``a.yaml:3: Service/default/a: spec.ports[0].port``."""
        return ": ".join(part for part in (self.place, self.reference, self.field) if part) or "the document"

    def __str__(self) -> str:
        return f"{self.what}: {self.why}" + (f" ({self.remedy})" if self.remedy else "")


class InvalidResource(HooklineError):  # noqa: N818  (named for what it is, as the other errors are)
    """One or more documents do not say what they must.

    With one problem, `what`, `why` and `remedy` are that problem's. With several, `why` has one line for
    each; `problems` always has all of them.
    """

    def __init__(self, problems: Problem | Sequence[Problem]) -> None:
        self.problems: tuple[Problem, ...] = (problems,) if isinstance(problems, Problem) else tuple(problems)
        if len(self.problems) == 1:
            only = self.problems[0]
            super().__init__(only.what, why=only.why, remedy=only.remedy)
            return
        lines = [str(problem) for problem in self.problems[:LINES_SHOWN]]
        if len(self.problems) > LINES_SHOWN:
            lines.append(f"and {len(self.problems) - LINES_SHOWN} more")
        super().__init__(f"{len(self.problems)} problems", why="\n".join(lines))

    def __str__(self) -> str:
        if len(self.problems) == 1:
            return super().__str__()
        return f"{self.what}:\n{self.why}"


class Refused(ValueError):  # noqa: N818
    """Raised by a model's own validators: a plain sentence instead of pydantic's words.

    Args:
        why: The offending value and what is allowed.
        remedy: What to write instead.
        at: The field, from the model whose validator refuses; empty for the validated value itself.
    """

    def __init__(self, why: str, *, remedy: str = "", at: FieldPath = ()) -> None:
        super().__init__(f"{why} ({remedy})" if remedy else why)
        self.complaints: tuple[tuple[FieldPath, str, str], ...] = ((at, why, remedy),)

    @classmethod
    def all(cls, refusals: Sequence[Refused]) -> Refused:
        """Several refusals of one model as one error, so that all are reported together."""
        together = cls("; ".join(str(refusal) for refusal in refusals))
        together.complaints = tuple(complaint for refusal in refusals for complaint in refusal.complaints)
        return together


def field_text(path: Iterable[str | int]) -> str:
    """A path as the user writes it: ``spec.ports[0].port``, ``metadata.labels["a.b/c"]``."""
    text = ""
    for step in path:
        if isinstance(step, int):
            text += f"[{step}]"
        elif PLAIN_KEY.fullmatch(step):
            text += f".{step}" if text else step
        else:
            text += f"[{value_text(step)}]"
    return text


def value_text(value: object) -> str:
    """A value, short enough for an error's sentence and never with a control character in it."""
    match value:
        case None:
            return "null"
        case bool():
            return "true" if value else "false"
        case int() | float():
            text = f"{value:#x}" if isinstance(value, int) and abs(value) >= 1 << 200 else str(value)
            return text if len(text) <= TEXT_SHOWN else text[: TEXT_SHOWN - 1] + "…"
        case str():
            text = value if len(value) <= TEXT_SHOWN else value[: TEXT_SHOWN - 1] + "…"
            if text.isprintable() and '"' not in text and "\\" not in text:
                return f'"{text}"'
            return ascii(text)
        case list() | tuple():
            return "an empty list" if not value else "a list"
        case dict():
            return "an empty mapping" if not value else "a mapping"
    return f"a {type(value).__name__}"


def did_you_mean(word: str, known: Iterable[str]) -> str:
    """The nearest known word as ``did you mean X?``, or nothing where none is near."""
    plain = {_plain(candidate): candidate for candidate in known}
    near = difflib.get_close_matches(_plain(word[:253]), plain, n=1, cutoff=0.6)
    return f"did you mean {plain[near[0]]}?" if near else ""


def _plain(word: str) -> str:
    return word.lower().replace("_", "").replace("-", "")
