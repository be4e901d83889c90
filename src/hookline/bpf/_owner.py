"""What all handles share: what they own is given back once, and by the process that made it."""

from __future__ import annotations

import os
from typing import NoReturn, Self

from hookline.bpf._errors import BpfError

__all__ = ["Owner"]


class Owner:
    """Base of all that owns a descriptor, or a program's place on a hook.

    A copy would close the same descriptor number again, which may be another file's by then; so copy, deepcopy and
    pickle are refused. A process that was forked has the descriptors, and does not own the place on the hook: what
    ends by itself there, as a ``with`` block does, gives descriptors back only.
    """

    _process = 0

    def __new__(cls, *_: object, **__: object) -> Self:
        made = super().__new__(cls)
        made._process = os.getpid()
        return made

    @property
    def _forked(self) -> bool:
        """Whether this is a child of the process that made the object."""
        return self._process != os.getpid()

    def __reduce__(self) -> NoReturn:
        raise BpfError(
            f"{self!r} cannot be copied or pickled",
            why="each copy would close the same descriptor",
            remedy="duplicate() makes one with a life of its own"
            if hasattr(self, "duplicate")
            else "share this one, or open another",
        )
