"""Attachments that are more, or less, than one link, with a link's manners.

A perf event is opened for each CPU, so sampling a machine takes several links: a `LinkGroup`. Sockets and, before Linux
6.10, socket maps hold their program themselves: a `HeldByTarget` takes it off again.
"""

from __future__ import annotations

import os
import warnings
from abc import ABC, abstractmethod
from collections.abc import Sequence
from pathlib import Path
from types import TracebackType
from typing import Self

from hookline.bpf import pin
from hookline.bpf._errors import BpfError
from hookline.bpf._links._link import Link, refuse_second_pin
from hookline.bpf._owner import Owner
from hookline.bpf._programs._handle import ProgramHandle

__all__ = ["HeldByTarget", "LinkGroup"]


class LinkGroup(Owner):
    """Several links of one program, used as one.

    Attributes:
        links: The links.
        pinned: The folder of its pins, as far as this object knows.
    """

    mode = None

    def __init__(self, links: Sequence[Link], *, pinned: Path | None = None) -> None:
        self.links = tuple(links)
        self.pinned = pinned

    @classmethod
    def from_pin(cls, path: str | os.PathLike[str]) -> Self:
        """Adopt the links that are pinned in a folder.

        Raises:
            BpfError: There is no such folder, or something else than links is in it.
        """
        folder = pin.location(path)
        if not folder.is_dir():
            raise BpfError(
                f"{folder} is no folder of pinned links",
                errno=2,
                remedy=f"find {pin.BPFFS} -type f lists the pins",
            )
        links: list[Link] = []
        try:
            for entry in sorted(folder.iterdir()):
                links.append(Link.from_pin(entry))
        except BaseException:
            for link in links:
                link.close()
            raise
        return cls(links, pinned=folder)

    @property
    def hook(self) -> str:
        """The kind of hook: ``"perf_event"``."""
        return self.links[0].hook if self.links else ""

    def update(self, new: ProgramHandle, *, expected: ProgramHandle | None = None) -> None:
        """Replace the program in each link; see `Link.update`."""
        for link in self.links:
            link.update(new, expected=expected)

    def pin(self, path: str | os.PathLike[str]) -> None:
        """Pin each link into a new folder, so that they outlive the process.

        Raises:
            BpfError: The path is taken, or not in bpffs; or the links are pinned already.
        """
        refuse_second_pin(self, *self.links)
        folder = pin.location(path)
        if folder.exists():
            raise BpfError(f"cannot pin the links at {folder}", errno=17, why="something is pinned there")
        try:
            for number, link in enumerate(self.links):
                link.pin(folder / f"{number:04}")
        except BaseException:
            self.pinned = folder
            self.unpin()
            raise
        self.pinned = folder

    def unpin(self) -> None:
        """Remove the pins and their folder; the program stays attached while this object is open."""
        for link in self.links:
            link.unpin()
        if self.pinned is not None:
            if self.pinned.is_dir():
                self.pinned.rmdir()
            self.pinned = None

    def detach(self) -> None:
        """Take the program off everywhere at once and remove the pins."""
        for link in self.links:
            link.detach()
        self.unpin()

    def close(self) -> None:
        """Give the descriptors back; unpinned links go with theirs. Closing twice is harmless."""
        for link in self.links:
            link.close()

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        if self.pinned is None and not self._forked:
            self.detach()
        self.close()

    def __repr__(self) -> str:
        place = f", pinned at {self.pinned}" if self.pinned else ""
        return f"<LinkGroup of {len(self.links)}{place}>"


class HeldByTarget(Owner, ABC):
    """A program that its target holds itself, without a link; `close` takes it off.

    Attributes:
        hook: The kind of hook: ``"socket"``, ``"sockmap"``.
        pinned: Always None: there is nothing to pin.
    """

    mode = None
    pinned: Path | None = None

    def __init__(self, hook: str, what: str) -> None:
        self.hook = hook
        self._what = what
        self._attached = True

    @abstractmethod
    def _take_off(self) -> None:
        """Detach; a target that is gone is no error."""

    @abstractmethod
    def _let_go(self) -> None:
        """Give descriptors back."""

    @abstractmethod
    def update(self, new: ProgramHandle, *, expected: ProgramHandle | None = None) -> None:
        """Replace the program."""

    def pin(self, path: str | os.PathLike[str]) -> None:
        """Refused: what holds the program is its target.

        Raises:
            BpfError: Always.
        """
        raise BpfError(
            f"{self!r} cannot be pinned at {pin.BPFFS / os.fspath(path)}",
            why="it is no link: the program lives as long as what it is attached to",
            remedy="leave() keeps it attached when this object goes",
        )

    def unpin(self) -> None:
        """There is never a pin."""
        self.pinned = None

    def leave(self) -> None:
        """Keep the program attached for as long as its target lives, and forget about it."""
        self._attached = False
        self._let_go()

    def detach(self) -> None:
        """Take the program off. Twice is no error."""
        if self._attached:
            self._take_off()
            self.leave()

    def close(self) -> None:
        """As `detach`; in a forked child, `leave`: the hook is its parent's."""
        if self._forked:
            self.leave()
        self.detach()

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.close()

    def __del__(self) -> None:
        if getattr(self, "_attached", False):
            if not self._forked:
                warnings.warn(
                    f"{self!r} was neither closed nor left", ResourceWarning, source=self, stacklevel=2
                )
            self.leave()

    def __repr__(self) -> str:
        return f"<Attachment to {self._what}{'' if self._attached else ', detached'}>"
