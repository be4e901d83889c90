"""The files that an agent watches: read, applied, and what is wrong with them.

A file is read when it was written and closed, or when one was renamed to its name; what is only half written is never seen. One
that is broken changes nothing: what it last said stays until it says something else or goes away.
"""

from __future__ import annotations

import contextlib
import os
import time
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass, field

from inotify_simple import INotify, flags

from hookline.agent._errors import AgentError, unexpected
from hookline.agent._logs import error_fields, fields, log
from hookline.control import Applied, Conflict, Covered, Node
from hookline.errors import HooklineError
from hookline.model import Resource
from hookline.sources import files

EVENTS = (
    flags.CLOSE_WRITE
    | flags.MOVED_TO
    | flags.MOVED_FROM
    | flags.DELETE
    | flags.CREATE
    | flags.DELETE_SELF
    | flags.MOVE_SELF
    | flags.ONLYDIR
)
GONE = flags.DELETE_SELF | flags.MOVE_SELF | flags.IGNORED | flags.UNMOUNT
Signature = tuple[int, int, int, int]


@dataclass(slots=True)
class WatchedFile:
    """One file as it was last read.

    Attributes:
        references: The objects that it described when it was last good.
        problem: Why it is not in force as it is now; None where it is.
    """

    signature: Signature | None = None
    references: frozenset[str] = frozenset()
    problem: HooklineError | None = None


@dataclass(slots=True)
class Brought:
    """What became of a look at the files."""

    applied: list[Applied] = field(default_factory=list)
    refused: int = 0
    faults: int = 0


class Files:
    """Watched files and folders, and what was read from them.

    Args:
        paths: Files and folders, which need not be there yet; only a folder that is there, or ends with a slash, is one.
    """

    def __init__(self, paths: Iterable[str]) -> None:
        given = list(dict.fromkeys(paths))
        self.folders = tuple(os.path.abspath(p) for p in given if os.path.isdir(p) or p.endswith("/"))
        self.single = tuple(os.path.abspath(p) for p in given if os.path.abspath(p) not in self.folders)
        self.known: dict[str, WatchedFile] = {}
        self._owners: dict[str, str] = {}

    def __bool__(self) -> bool:
        return bool(self.folders or self.single)

    def __contains__(self, source: str) -> bool:
        """Whether what has this source is the watched files' own."""
        return source in self.single or os.path.dirname(source) in self.folders

    def counts(self, path: str) -> bool:
        """Whether a path is one that is read."""
        name = os.path.basename(path)
        in_folder = os.path.dirname(path) in self.folders and not name.startswith(".")
        return path in self.single or (in_folder and name.endswith(files.SUFFIXES))

    def there(self) -> list[str]:
        """The files that are there now."""
        found = [path for path in self.single if os.path.exists(path)]
        for folder in self.folders:
            with contextlib.suppress(OSError):
                found += [os.path.join(folder, name) for name in sorted(os.listdir(folder))]
        return [path for path in dict.fromkeys(found) if self.counts(path) and not os.path.isdir(path)]

    def changed(self) -> set[str]:
        """Files that are not as they were when they were last read, and those that were refused then."""
        now = self.there()
        different = {path for path in now if self._is_different(path)}
        return different | {path for path in self.known if path not in now}

    def _is_different(self, path: str) -> bool:
        known = self.known.get(path)
        return known is None or known.problem is not None or known.signature != _signature(path)

    # -- bringing

    def bring(self, node: Node, changed: Iterable[str] | None = None) -> Brought:
        """Reads these files, all of them with None, and has the node follow. Errors are kept with the file and logged."""
        whole = changed is None
        wanted = set(self.there()) | set(self.known) if changed is None else set(changed)
        # What was refused may have waited for what changes now, such as an object that moves from one file to another.
        wanted |= {path for path, known in self.known.items() if known.problem is not None}
        result = Brought()
        read = dict(self._read(sorted(wanted), result))
        read = self._without_duplicates(read)
        broken = {path for path, known in self.known.items() if known.problem is not None}
        result.refused = len(wanted & broken)
        if whole:
            covered = Covered(frozenset((*self.single, *read)), frozenset(self.folders), frozenset(broken))
        else:
            covered = Covered(frozenset(read))
        if not read and not whole:
            return result
        try:
            result.applied.append(self._apply(node, read, covered))
        except Exception as error:
            if len(read) == 1:
                self._refuse(next(iter(read)), error, result)
                result.refused += 1
            else:
                if not isinstance(error, HooklineError):
                    _log_fault(error, f"{len(read)} files", result)
                self._bring_singly(node, read, result)
        return result

    def _bring_singly(self, node: Node, read: dict[str, list[Resource]], result: Brought) -> None:
        """One of them is refused: the others are not to wait for it."""
        for path, resources in read.items():
            try:
                result.applied.append(self._apply(node, {path: resources}, Covered(frozenset({path}))))
            except Exception as error:
                self._refuse(path, error, result)
                result.refused += 1

    def _apply(self, node: Node, read: dict[str, list[Resource]], covered: Covered) -> Applied:
        start = time.monotonic()
        applied = node.apply([one for resources in read.values() for one in resources], prune=covered)
        took_ms = (time.monotonic() - start) * 1e3
        for path, resources in read.items():
            known = self.known[path]
            if known.problem is not None:
                log.info("file is good again", extra=fields(file=path))
            known.problem = None
            self._disown(path)
            known.references = frozenset(one.reference for one in resources)
            self._owners |= dict.fromkeys(known.references, path)
            if not resources and known.signature is None:
                del self.known[path]
        counts = {
            action: sum(one.action == action for one in applied.plan.resources)
            for action in ("create", "change", "remove")
        }
        if any(counts.values()) or applied.plan.changes:
            shown = next(iter(read)) if len(read) == 1 else f"{len(read)} files"
            log.info(
                "files applied",
                extra=fields(
                    file=shown,
                    created=counts["create"],
                    changed=counts["change"],
                    removed=counts["remove"],
                    took_ms=round(took_ms, 1),
                ),
            )
        for warning in applied.plan.warnings:
            log.warning("note", extra=fields(note=warning))
        return applied

    def _read(self, paths: Sequence[str], result: Brought) -> Iterator[tuple[str, list[Resource]]]:
        for path in paths:
            known = self.known.setdefault(path, WatchedFile())
            known.signature = _signature(path)
            if known.signature is None:
                known.problem = None
                yield path, []
                continue
            try:
                yield path, files.read(path, may_be_empty=path not in self.single)
            except Exception as error:
                self._refuse(path, error, result)

    def _without_duplicates(self, read: dict[str, list[Resource]]) -> dict[str, list[Resource]]:
        """Refuses files that describe what another watched file does."""
        claimed: dict[str, str] = {}
        good = {}

        def owner(reference: str, path: str) -> str | None:
            other = claimed.get(reference) or self._owners.get(reference)
            # One that is read as well lets go of what it no longer has.
            if other is None or other == path or (other in read and reference not in claimed):
                return None
            return other

        for path, resources in read.items():
            twice = next((one for one in resources if owner(one.reference, path)), None)
            if twice is not None:
                error = Conflict(
                    f"{path}: {twice.reference}",
                    why=f"the same object is already in {owner(twice.reference, path)}",
                    remedy="keep one of them",
                )
                self._refuse(path, error)
                # What it last said stays its own.
                claimed |= dict.fromkeys(self.known[path].references, path)
                continue
            good[path] = resources
            claimed |= {one.reference: path for one in resources}
        return good

    def _disown(self, path: str) -> None:
        for reference in self.known[path].references:
            if self._owners.get(reference) == path:
                del self._owners[reference]

    def _refuse(self, path: str, error: Exception, result: Brought | None = None) -> None:
        """Keeps the error with its file. One that nobody expected is the file's too: the others must not wait for it."""
        known = self.known[path]
        if not isinstance(error, HooklineError):
            _log_fault(error, path, result)
            error = unexpected(error)
        if known.problem is None or known.problem.as_dict() != error.as_dict():
            log.error("file refused, what it last said stays", extra=fields(file=path, **error_fields(error)))
        known.problem = error

    def problems(self) -> dict[str, HooklineError]:
        """What is wrong with each file that is not in force as it is."""
        return {path: known.problem for path, known in self.known.items() if known.problem is not None}


def _log_fault(error: Exception, path: str, result: Brought | None) -> None:
    if result is not None:
        result.faults += 1
    log.error("unexpected error, the agent goes on", extra=fields(part="files", file=path), exc_info=error)


class Watcher:
    """Notices which files change. Its descriptor becomes readable when one did.

    Raises:
        AgentError: A folder cannot be watched, for want of it or of inotify watches.
    """

    def __init__(self, watched: Files) -> None:
        self._files = watched
        self._inotify = INotify(nonblocking=True)
        self._folders: dict[int, str] = {}
        try:
            self.rewatch(strict=True)
        except AgentError:
            self.close()
            raise

    def fileno(self) -> int:
        """The descriptor to wait for."""
        return int(self._inotify.fileno())

    def close(self) -> None:
        """Stops watching."""
        self._inotify.close()

    def rewatch(self, *, strict: bool = False) -> bool:
        """Watches folders that are not watched, such as one that was removed and made again. Whether there were any."""
        wanted = {*self._files.folders, *map(os.path.dirname, self._files.single)}
        added = False
        for folder in wanted - set(self._folders.values()):
            try:
                self._folders[self._inotify.add_watch(folder, EVENTS)] = folder
                added = True
            except OSError as error:
                if strict:
                    raise AgentError(
                        f"{folder} cannot be watched",
                        why=error.strerror or str(error),
                        remedy="sysctl -w fs.inotify.max_user_watches=65536"
                        if error.errno == 28
                        else "make the folder first",
                    ) from error
        return added

    def read(self) -> set[str] | None:
        """The files that changed; None where anything may have."""
        found: set[str] = set()
        anything = False
        for event in self._inotify.read(timeout=0):
            if event.mask & flags.Q_OVERFLOW:
                anything = True
                continue
            folder = self._folders.get(event.wd)
            if folder is None:
                continue
            if event.mask & GONE:
                del self._folders[event.wd]
                if not event.mask & flags.IGNORED:
                    with contextlib.suppress(OSError):
                        self._inotify.rm_watch(event.wd)
                anything = True
                continue
            path = os.path.join(folder, event.name)
            if self._files.counts(path):
                if not event.mask & flags.CREATE or _is_whole(path):
                    found.add(path)
            elif os.path.islink(path) or event.mask & flags.ISDIR:
                anything = True  # a folder of links, as Kubernetes mounts a ConfigMap, changes all at once
        return None if anything else found


def _is_whole(path: str) -> bool:
    """Whether a name that has just been made is of a file that was there before: a link. Others are awaited."""
    try:
        return os.path.islink(path) or os.stat(path).st_nlink > 1
    except OSError:
        return False


def _signature(path: str) -> Signature | None:
    try:
        found = os.stat(path)
    except OSError:
        return None
    return found.st_mtime_ns, found.st_size, found.st_ino, found.st_dev
