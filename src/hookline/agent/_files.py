"""The files that an agent watches: read, applied, and what is wrong with them.

A file is read when it was written and closed, or when one was renamed to its name. One that is open for writing is left alone,
where the file system can tell; one of whose change no message told is read once two looks found it the same; one that changed
while it was read is read again. One that is broken changes nothing: what it last said stays until it says something else or goes
away. Gone is what the kernel says is not there: a file that cannot be looked at is not, nor one whose whole folder is missing.
"""

from __future__ import annotations

import contextlib
import ctypes
import errno
import fcntl
import os
import signal
import stat
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
SETTLED_S = 2.0
"""A file that no message told of is read when it was the same for so long, in two looks at least."""
WRITTEN_S = 10.0
"""A file that is open for writing for so long is a problem; then it is read once two looks found it the same."""
AGAIN_FIRST_S, AGAIN_LONGEST_S = 0.01, 10.0
"""When a file that is being written is tried again, twice as long each time; a look finds what takes longer."""
_TRIES, _TRY_EVERY_S = 3, 0.001
_LOCAL = {
    0xEF53: "ext4",
    0x58465342: "xfs",
    0x9123683E: "btrfs",
    0x01021994: "tmpfs",
    0x858458F6: "ramfs",
    0x794C7630: "overlay",
    0xF2F52010: "f2fs",
    0x2FC12FC1: "zfs",
    0xCA451A4E: "bcachefs",
    0x4D44: "vfat",
    0x2011BAB0: "exfat",
    0x3153464A: "jfs",
}
"""File systems whose every writer the kernel knows (statfs(2))."""


@dataclass(slots=True)
class WatchedFile:
    """One file as it was last read.

    Attributes:
        references: The objects that it described when it was last good.
        problem: Why it is not in force as it is now; None where it is.
        waiting: It is being written, and is read when it is whole.
        since: Since when it waits, by the monotonic clock.
        overdue: It waits for so long that this was said.
        delay_s: After which it is tried again, at `again_at`.
    """

    signature: Signature | None = None
    references: frozenset[str] = frozenset()
    problem: HooklineError | None = None
    waiting: bool = False
    since: float = 0.0
    overdue: bool = False
    delay_s: float = 0.0
    again_at: float = 0.0

    def done(self) -> None:
        """It waits no more."""
        self.waiting = self.overdue = False


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
        settled_s: Seconds for which a file must be the same before a look reads it.

    Attributes:
        awaited: Files whose names were taken away: what is there again is read when it was written and closed.
        unsettled: Whether the last look found files that are different and are to be looked at once more.
        lost: Why nothing can be said of a folder's files; what they said stays.
        stale: Why objects of files that went while no agent was there are not removed yet.
        written_s: How long a file may be open for writing until that is a problem.
    """

    def __init__(
        self, paths: Iterable[str], settled_s: float = SETTLED_S, written_s: float = WRITTEN_S
    ) -> None:
        given = list(dict.fromkeys(paths))
        self.folders = tuple(os.path.abspath(p) for p in given if os.path.isdir(p) or p.endswith("/"))
        self.single = tuple(os.path.abspath(p) for p in given if os.path.abspath(p) not in self.folders)
        self.known: dict[str, WatchedFile] = {}
        self.awaited: set[str] = set()
        self.unsettled = False
        self.lost: dict[str, str] = {}
        self.stale: HooklineError | None = None
        self.settled_s, self.written_s = settled_s, written_s
        self._settled: set[str] = set()
        self._owners: dict[str, str] = {}
        self._seen: dict[str, tuple[Signature, float]] = {}
        self._devices: dict[str, str] = {}
        self._names: dict[str, list[str]] = {}
        self._noted: dict[str, str] | None = None
        self._uncovered = {*self.folders, *map(os.path.dirname, self.single)}
        self.look_at_folders()

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
        """The files that are there: in folders at the last look at these, so that one that was lost then has none."""
        found = [path for path in self.single if not _is_gone(path)]
        for folder in self.folders:
            found += [os.path.join(folder, name) for name in self._names.get(folder, ())]
        return [path for path in dict.fromkeys(found) if self.counts(path) and not os.path.isdir(path)]

    def look_at_folders(self) -> None:
        """Finds out which folders are not there, or not what they were; says what is new."""
        lost = {}
        self._names = {}
        for folder in (*self.folders, *{os.path.dirname(path) for path in self.single}):
            try:
                device = _file_system(folder)
                self._names[folder] = names = sorted(os.listdir(folder))
                empty = not any(self.counts(os.path.join(folder, name)) for name in names)
            except OSError as error:
                lost[folder] = (error.strerror or str(error)).lower()
                continue
            if device != self._devices.setdefault(folder, device):
                if empty:
                    lost[folder] = (
                        "another file system is there, without any file: the one that was there is unmounted"
                    )
                else:
                    self._devices[folder] = device
        for folder, why in lost.items():
            if self.lost.get(folder) != why:
                log.error(
                    "folder is lost, what its files said stays",
                    extra=fields(folder=folder, why=why, remedy="mount it or make it again"),
                )
        for folder in self.lost.keys() - lost.keys():
            log.info("folder is there again", extra=fields(folder=folder))
        self.lost = lost

    def changed(self, *, links: bool = False) -> set[str]:
        """Files that are not as they were when they were last read, those that were refused then, those that are gone.

        Args:
            links: Another file behind a link is whole at once: a message said that a link changed.
        """
        self.look_at_folders()
        now = self.there()
        found = set()
        self.unsettled = False
        seen, self._seen = self._seen, {}
        self._settled = set()
        for path in now:
            try:
                signature = _signature(path)
            except OSError:
                found.add(path)  # it is said when it is read
                continue
            known = self.known.get(path)
            if signature is None:
                continue
            if known is not None and known.waiting:
                self._say_overdue(path)
            if known is not None and not known.waiting and known.signature == signature:
                if known.problem is not None:
                    found.add(path)
                continue
            at = time.monotonic()
            before, since = seen.get(path, (None, at))
            since = since if before == signature else at
            if (links and os.path.islink(path)) or (before == signature and at - since >= self.settled_s):
                self.awaited.discard(path)
                self._settled.add(path)
                found.add(path)
            else:
                self.unsettled = True
            self._seen[path] = signature, since
        return found | {
            path for path in self.known if path not in now and os.path.dirname(path) not in self.lost
        }

    def due(self) -> set[str]:
        """Files that were being written and are to be tried again now."""
        now = time.monotonic()
        return {path for path, at in self._tries() if at <= now}

    def next_try_s(self) -> float | None:
        """When one of them is, from now; None where none waits for that."""
        first = min((at for _, at in self._tries()), default=None)
        return None if first is None else max(first - time.monotonic(), 0.0)

    def _tries(self) -> Iterator[tuple[str, float]]:
        for path, known in list(self.known.items()):
            if known.waiting and known.delay_s <= AGAIN_LONGEST_S and path not in self.awaited:
                yield path, known.again_at

    # -- bringing

    @property
    def is_due(self) -> bool:
        """Whether something is left to do, even where no file changed."""
        return bool(self._uncovered - self.lost.keys())

    def bring(self, node: Node, changed: Iterable[str] | None = None) -> Brought:
        """Reads these files, all of them with None, and has the node follow. Errors are kept with the file and logged."""
        whole = changed is None
        self._remember(node)
        if whole:
            self.look_at_folders()
        wanted = set(self.there()) | set(self.known) if changed is None else set(changed)
        # What was refused may have waited for what changes now, such as an object that moves from one file to another.
        wanted |= {
            path
            for path, known in self.known.items()
            if known.problem is not None and _is_as_read(path, known)
        }
        if whole:
            self._uncovered = {*self.folders, *map(os.path.dirname, self.single)}
            self.awaited.clear()
        result = Brought()
        read = dict(self._read(sorted(wanted), result))
        read = self._without_duplicates(read)
        broken = {path for path, known in self.known.items() if known.problem is not None}
        result.refused = len(wanted & broken)
        if whole:
            unread = {path for path, known in self.known.items() if known.waiting} | broken
            unread |= {path for path in self.single if os.path.dirname(path) in self.lost}
            folders = frozenset(folder for folder in self.folders if folder not in self.lost)
            covered = Covered(frozenset((*self.single, *read)), folders, frozenset(unread))
        else:
            covered = Covered(frozenset(read))
        if read:
            self._bring_together(node, read, covered, result, whole=whole)
        if self.is_due:
            self._cover(node, result)
        self._note(node)
        return result

    def _bring_together(
        self, node: Node, read: dict[str, list[Resource]], covered: Covered, result: Brought, *, whole: bool
    ) -> None:
        try:
            result.applied.append(self._apply(node, read, covered))
            if whole:
                self._uncovered &= self.lost.keys()
        except Exception as error:
            if len(read) == 1:
                self._refuse(next(iter(read)), error, result)
                result.refused += 1
            else:
                if not isinstance(error, HooklineError):
                    _log_fault(error, f"{len(read)} files", result)
                self._bring_singly(node, read, result)

    def _cover(self, node: Node, result: Brought) -> None:
        """Removes what files described that nobody saw go, after whatever became of the others."""
        kept = frozenset((*self.known, *self.there()))
        folders = frozenset(folder for folder in self.folders if folder not in self.lost)
        single = frozenset(path for path in self.single if os.path.dirname(path) not in self.lost)
        try:
            result.applied.append(self._apply(node, {}, Covered(single, folders, kept)))
        except Exception as error:
            said = error
            if not isinstance(said, HooklineError):
                _log_fault(said, "those that are gone", result)
                said = unexpected(said)
            if self.stale is None or self.stale.as_dict() != said.as_dict():
                log.error(
                    "what files that are gone described is not removed yet",
                    extra=fields(**error_fields(said)),
                )
            self.stale = said
            return
        if self.stale is not None:
            log.info("what files that are gone described is removed")
        self.stale = None
        self._uncovered &= self.lost.keys()

    def _remember(self, node: Node) -> None:
        """Takes up where the folders were when what they say was applied, maybe by an agent before this one."""
        if self._noted is None:
            self._noted = node.watched_folders()
            self._devices |= {
                folder: there for folder, there in self._noted.items() if folder in self._devices
            }
            self.look_at_folders()

    def _note(self, node: Node) -> None:
        there = {folder: one for folder, one in self._devices.items() if folder not in self.lost}
        noted = self._noted or {}
        if {folder: noted.get(folder) for folder in there} == there:
            return
        try:
            node.note_watched_folders(there)
        except HooklineError as error:  # the next time does
            log.warning("where the folders are is not noted", extra=fields(**error_fields(error)))
        else:
            self._noted = noted | there

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
            shown = (
                next(iter(read))
                if len(read) == 1
                else f"{len(read)} files"
                if read
                else "those that are gone"
            )
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
            try:
                signature = _signature(path)
                if signature is None:
                    yield from self._gone(path)
                    continue
                if path in self.awaited or _is_written_still(path):
                    self._await(path)
                    if not (known.overdue and path in self._settled and self._seen[path][0] == signature):
                        continue
                found: list[Resource] | Exception
                try:
                    found = files.read(path, may_be_empty=path not in self.single)
                except Exception as error:
                    found = error
                after = _signature(path)
                if after is None:
                    yield from self._gone(path)
                    continue
                if after != signature:
                    self._await(path)
                    continue
            except (FileNotFoundError, NotADirectoryError):  # it went after the first look
                yield from self._gone(path)
                continue
            except OSError as error:
                known.done()
                self._refuse(path, unreadable(path, error), result)
                continue
            known.signature = signature
            known.done()
            if isinstance(found, Exception):
                self._refuse(path, found, result)
            else:
                yield path, found

    def _gone(self, path: str) -> Iterator[tuple[str, list[Resource]]]:
        """A file that is not there says nothing any more, unless its whole folder is not."""
        folder = os.path.dirname(path)
        if folder not in self.lost:
            self.look_at_folders()
        known = self.known[path]
        if folder in self.lost:
            if known.signature is None:
                del self.known[path]
            return
        known.signature, known.problem = None, None
        known.done()
        self.awaited.discard(path)
        yield path, []

    def _await(self, path: str) -> None:
        known = self.known[path]
        now = time.monotonic()
        if not known.waiting:
            log.info("file is being written, waiting", extra=fields(file=path))
            known.since, known.delay_s = now, AGAIN_FIRST_S / 2
        known.waiting = True
        known.delay_s *= 2
        known.again_at = now + known.delay_s

    def _say_overdue(self, path: str) -> None:
        known = self.known[path]
        if known.overdue or time.monotonic() - known.since < self.written_s:
            return
        known.overdue = True
        known.problem = AgentError(
            f"{path} is open for writing for more than {self.written_s:g} s",
            why="somebody has not closed it; it is read as it is once two looks find it the same",
            remedy=f"see who: fuser -v {path}; write another file and rename it",
        )
        log.error(
            "file is not closed, what it last said stays",
            extra=fields(file=path, **error_fields(known.problem)),
        )

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
        # A copy, since the node's thread goes on meanwhile.
        return {path: known.problem for path, known in list(self.known.items()) if known.problem is not None}


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
        self._places: dict[str, tuple[int, int]] = {}
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
        for number, folder in list(self._folders.items()):
            # Under the name there may be another folder now: a message tells of the old one's own end alone.
            if _place(folder) != self._places.get(folder):
                del self._folders[number]
                with contextlib.suppress(OSError):
                    self._inotify.rm_watch(number)
        for folder in wanted - set(self._folders.values()):
            try:
                place = _place(folder)
                self._folders[self._inotify.add_watch(folder, EVENTS)] = folder
                if place is not None:
                    self._places[folder] = place
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
                if event.mask & (flags.MOVED_FROM | flags.DELETE):
                    # If the name is there again at once, a new file is being written: it is read when it is whole.
                    self._files.awaited.add(path)
                    found.add(path)
                elif not event.mask & flags.CREATE or _is_whole(path):
                    self._files.awaited.discard(path)
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
    """What tells one content from another; None where there is no such file.

    Raises:
        OSError: It cannot be looked at, which does not mean that it is gone.
    """
    try:
        found = os.stat(path)
    except (FileNotFoundError, NotADirectoryError):
        return None
    if not stat.S_ISREG(found.st_mode):
        raise OSError(errno.EINVAL, "it is not a regular file")
    return found.st_mtime_ns, found.st_size, found.st_ino, found.st_dev


def _is_as_read(path: str, known: WatchedFile) -> bool:
    """Whether a refused file is what was refused, or cannot be looked at as before. Another content waits until it is whole."""
    try:
        return not known.waiting and _signature(path) in (known.signature, None)
    except OSError:
        return True


def _is_gone(path: str) -> bool:
    try:
        return _signature(path) is None
    except OSError:
        return False


def _file_system(folder: str) -> str:
    """Which file system a folder is on: its own number where it has one, since that of the device may change with a boot."""
    return f"{os.statvfs(folder).f_fsid or os.stat(folder).st_dev:x}"


def _place(folder: str) -> tuple[int, int] | None:
    try:
        found = os.stat(folder)
    except OSError:
        return None
    return found.st_dev, found.st_ino


def _is_written(path: str) -> bool:
    """Whether somebody has a file open for writing, as far as its file system can tell.

    A lease for reading is refused then, with EAGAIN (fcntl(2), F_SETLEASE). NFS and SMB say the same for want of a delegation
    or an oplock, so it counts where the file system is this machine's own. The lease is given back at once; a writer who comes in
    between waits until then, and the signal that tells of him is one that is ignored unless asked for.

    Raises:
        OSError: It cannot be opened.
    """
    descriptor = os.open(path, os.O_RDONLY | os.O_CLOEXEC | os.O_NONBLOCK)
    try:
        fcntl.fcntl(descriptor, fcntl.F_SETSIG, signal.SIGURG)
        try:
            fcntl.fcntl(descriptor, fcntl.F_SETLEASE, fcntl.F_RDLCK)
        except OSError as error:
            return error.errno == errno.EAGAIN and _is_local(descriptor)
        fcntl.fcntl(descriptor, fcntl.F_SETLEASE, fcntl.F_UNLCK)
        return False
    finally:
        os.close(descriptor)


def _is_local(descriptor: int) -> bool:
    """Whether a file's every writer is a process of this machine."""
    # struct statfs begins with the type, a long; 512 bytes hold it on every processor.
    found = (ctypes.c_long * (512 // ctypes.sizeof(ctypes.c_long)))()
    if ctypes.CDLL(None, use_errno=True).fstatfs(descriptor, found):
        return False
    return found[0] & 0xFFFFFFFF in _LOCAL


def _is_written_still(path: str) -> bool:
    """The same, once more for a writer who is just done: the message of his end is a moment earlier than that."""
    for _ in range(_TRIES):
        if not _is_written(path):
            return False
        time.sleep(_TRY_EVERY_S)
    return True


def unreadable(path: str, error: OSError) -> AgentError:
    """What is said of a file that cannot be looked at."""
    why = (error.strerror or str(error)).lower()
    return AgentError(
        f"{path} cannot be read", why=why, remedy="mend it; to remove its objects, remove the file"
    )
