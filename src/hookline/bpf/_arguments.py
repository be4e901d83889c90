"""What callers give: words of a fixed set, numbers of a range, texts. The kernel takes some wrong ones for others."""

from __future__ import annotations

import ctypes
import difflib
import errno as errnos
import operator
import os
from collections.abc import Mapping
from typing import TypeVar

from hookline.bpf._errors import BpfError, TargetError

__all__ = ["c_text", "cookie_number", "number", "one_of", "path_text", "process_number"]

_Value = TypeVar("_Value")


def one_of(values: Mapping[str, _Value], name: str, what: str) -> _Value:
    """The value of a name; the error for an unknown one lists all."""
    if name not in values:
        close = difflib.get_close_matches(str(name), values, 1)
        there = ", ".join(filter(None, values))
        remedy = f"did you mean {close[0]}?" if close else "write one of them"
        raise TargetError(f"there is no {what} {name!r}", why=f"there are {there}", remedy=remedy)
    return values[name]


def number(value: int, what: str, low: int, high: int) -> int:
    """A number, both ends of its range included."""
    found = operator.index(value)
    if not low <= found <= high:
        raise BpfError(
            f"{found} is no {what}",
            errno=errnos.EINVAL,
            why=f"it must be from {low} to {high}",
            remedy="give another number",
        )
    return found


def cookie_number(value: int) -> int:
    """A cookie, which the kernel keeps in 64 bits."""
    return number(value, "cookie", 0, (1 << 64) - 1)


def process_number(value: int) -> int:
    """A process or thread. 0 is none: some calls would take it for the caller, others for every process."""
    if operator.index(value) == 0:
        raise BpfError(
            "0 is no process",
            errno=errnos.EINVAL,
            why="the kernel takes it for others",
            remedy="os.getpid() is this one, None stands for all",
        )
    return number(value, "process", 1, (1 << 31) - 1)


def path_text(value: str | os.PathLike[str], what: str) -> str:
    """A path or name as text, without a zero byte: the kernel would stop reading there."""
    text = os.fspath(value)
    if "\0" in text:
        why = "it has a zero byte"
        raise BpfError(f"{text!r} is no {what}", errno=errnos.EINVAL, why=why, remedy="leave the byte out")
    return text


def c_text(value: str | os.PathLike[str], what: str) -> ctypes.Array[ctypes.c_char]:
    """A path or name for the kernel, as `path_text` checks it."""
    return ctypes.create_string_buffer(os.fsencode(path_text(value, what)))
